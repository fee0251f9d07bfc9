"""Sizes of the index_scores kernel, its division of work, and the layout of its shared memory.

A group is the COLUMNS // n_heads neighbouring queries of a sequence whose heads fill one wgmma. A chunk is up to
``Plan.chunk`` consecutive key blocks of BLOCK keys. A work item is one group against one chunk.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels.hopper.mosaic import plgpu

WIDTH = 128  # index_head_dim
COLUMNS = 256  # query heads of a group: the widest wgmma
BLOCK = 128  # keys of a pipeline stage, 64 per consumer warpgroup
CONSUMERS = 2
PARTS = 2  # wgmma chains of a consumer per key block
Q_STAGES = 2
# Registers per thread. At launch 3 x 128 threads have 168 each; the three warpgroups redistribute that total.
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 232, 40


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of one compiled kernel."""

    B: int
    T: int
    S: int
    n_heads: int  # index heads, after padding to a divisor of COLUMNS
    itemsize: int  # bytes per element of q and k
    n_blocks: int  # persistent thread blocks
    chunk: int = 32  # key blocks of a work item
    interpret: bool = False

    @property
    def queries(self) -> int:
        """Queries of a group."""
        return COLUMNS // self.n_heads

    @property
    def groups(self) -> int:
        """Groups of a sequence."""
        return -(-self.T // self.queries)

    @property
    def chunks(self) -> int:
        """Chunks of a sequence."""
        return -(-self.S // (self.chunk * BLOCK))

    @property
    def items(self) -> int:
        return self.B * self.groups * self.chunks

    @property
    def stages(self) -> int:
        """Key blocks in shared memory."""
        return 8 if self.itemsize == 1 else 3

    @property
    def dtype(self) -> Any:
        return jnp.float8_e4m3fn if self.itemsize == 1 else jnp.bfloat16

    @property
    def transforms(self) -> tuple[Any, Any]:
        """Tiles of 8 rows of 128 bytes, swizzled: the layout of wgmma's operands."""
        return plgpu.TilingTransform((8, 128 // self.itemsize)), plgpu.SwizzleTransform(128)

    @property
    def spread(self) -> int:
        """A factor that permutes the groups so that neighbours in time are far apart in the sequence.

        Under a causal mask a work item has either keys to multiply or -inf to write; mixed in time, the two overlap.
        """
        groups = self.B * self.groups
        factor = max(int(groups * 0.618), 1)
        while math.gcd(factor, groups) > 1:
            factor += 1
        return factor if factor * groups < 2**31 else 1


class Inputs(NamedTuple):
    """The kernel's operands, padded by ``mosaic_gpu.run``."""

    q: Any  # [B, queries x n_heads, WIDTH]
    k: Any  # [B S WIDTH]
    weights: Any  # [B, queries x n_heads] float32, halved
    key_start: Any  # [B T] int32
    key_stop: Any
    first: Any  # [B x groups] int32: keys [first, last) are those that some query of the group may see
    last: Any
    k_scale: Any  # [B S] float32, or None


class Place(NamedTuple):
    """Which scores a consumer computes."""

    sequence: Any
    group: Any  # of the sequence
    key_block: Any  # of the sequence


class Scratch(NamedTuple):
    """Shared memory and barriers of a thread block, in the order of allocation. ``scratch_types`` has the types."""

    q_ring: Any  # [Q_STAGES COLUMNS WIDTH]
    k_ring: Any  # [stages BLOCK WIDTH]
    w_ring: Any  # [Q_STAGES COLUMNS]
    q_full: Any  # a barrier per slot of q_ring and w_ring
    q_free: Any
    k_full: Any  # a barrier per slot of k_ring
    k_free: Any


def scratch_types(plan: Plan) -> Scratch:
    return Scratch(
        q_ring=plgpu.SMEM((Q_STAGES, COLUMNS, WIDTH), plan.dtype, transforms=plan.transforms),
        k_ring=plgpu.SMEM((plan.stages, BLOCK, WIDTH), plan.dtype, transforms=plan.transforms),
        w_ring=plgpu.SMEM((Q_STAGES, COLUMNS), jnp.float32),
        q_full=plgpu.Barrier(num_arrivals=2, num_barriers=Q_STAGES),
        q_free=plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=Q_STAGES),
        k_full=plgpu.Barrier(num_barriers=plan.stages),
        k_free=plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=plan.stages),
    )
