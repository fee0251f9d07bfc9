"""Sizes of the sparse_mla kernel, its division of work, and the layout of its shared memory.

A work item is one query, HEADS of its heads and one split of its keys. Its keys come in pairs of blocks of KEYS: the
blocks of a pair go to ``Scratch.keys[0]`` and ``keys[1]``, and 0 or 1 is the block's slot.

A tile is 8 rows of 64 bfloat16 columns in shared memory. The eight 16-byte chunks of a row are swizzled: chunk c of
row r is stored at place c ^ (r % 8). A row of keys crosses 9 tiles, 0 to 7 with the latent and 8 with k_rope.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels.hopper.mosaic import pl, plgpu

LATENT, ROPE = 512, 64  # kv_lora_rank and qk_rope_head_dim of V3.2 and GLM-5
COLUMNS = LATENT + ROPE
HALF = LATENT // 2  # output columns that one consumer accumulates
HEADS = 64  # of one work item: the M of wgmma
KEYS = 64  # of one block
PAIR = 2 * KEYS
SCALE_BLOCK = (
    128  # values of an FP8 latent that share a scale, as in DeepSeek's cache: the columns of one group
)

TILE_BYTES = 1024
ROW_GROUP_BYTES = COLUMNS // 64 * TILE_BYTES  # from 8 rows of keys to the next 8
# The four groups of tiles whose arrival is signalled, by the half of the row that they belong to: half 0 is the left
# half of the latent, half 1 the right half and k_rope. A product starts as soon as its group has arrived; the halves
# are overwritten separately.
GROUPS = ((range(0, 2), range(2, 4)), (range(4, 6), range(6, 9)))
N_GROUPS = 4

TRANSFORMS = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
PER_HEAD = plgpu.Layout.WGMMA.reduce(1)
PER_KEY = plgpu.Layout.WGMMA.reduce(0)

NO_KEY = -3e38  # initial logit of a missing key; finite, so that inf - inf cannot arise
SMALLEST_SCALE = 1e-6
NO_MAXIMUM = -1e30  # running maximum before any key: far above NO_KEY * SMALLEST_SCALE
SLACK = 8.0  # binary orders of magnitude by which a logit may exceed the running maximum; P stays below 2^8

# Registers per thread (consumers, producer), by whether the latents are FP8. At launch 3 x 128 threads have 168 each;
# the three warpgroups redistribute that total. Converting takes more of them than copying.
REGISTERS = {False: (224, 56), True: (216, 72)}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of one compiled kernel."""

    B: int
    T: int
    N: int  # heads, a multiple of HEADS
    K: int
    n_splits: int  # of each query's keys
    pairs: int  # of key blocks in one split
    scale: float
    fp8: bool
    n_multiprocessors: int
    interpret: bool = False

    @property
    def head_groups(self) -> int:
        return self.N // HEADS

    @property
    def items(self) -> int:
        return self.B * self.T * self.head_groups * self.n_splits

    @property
    def blocks(self) -> int:
        """Persistent thread blocks."""
        return min(self.items, self.n_multiprocessors)

    @property
    def scale_log2(self) -> float:
        """Softmax is computed in base 2."""
        return self.scale * math.log2(math.e)

    @property
    def out_dtype(self) -> Any:
        """Splits are merged in float32."""
        return jnp.bfloat16 if self.n_splits == 1 else jnp.float32


def split_keys(items: int, pairs: int, n_multiprocessors: int) -> tuple[int, int]:
    """(number of splits, pairs in each split) that finish soonest; few queries are split so that they fill the GPU.

    ``items`` counts work items without splits, ``pairs`` the pairs of key blocks of one query. All thread blocks run
    in rounds. A round takes as long as the pairs of one split, plus about one and a half pairs to load the queries,
    fill the pipeline and write the result.
    """

    def cost(n):
        return -(-items * n // n_multiprocessors) * (-(-pairs // n) + 1.5)

    # beyond two rounds, splits only add partial results to write and merge
    candidates = [n for n in range(1, pairs + 1) if n == 1 or items * n <= 2 * n_multiprocessors]
    n_splits = min(candidates, key=cost)
    per_split = -(-pairs // n_splits)
    return -(-pairs // per_split), per_split


class Inputs(NamedTuple):
    """The kernel's operands."""

    q_latent: Any  # [B T, N, LATENT]
    q_rope: Any  # [B T, N, ROPE]
    indices: Any  # [B T, K], int32
    latent: Any  # [B S LATENT], bfloat16 or float8_e4m3fn
    latent_scale: Any  # [B S LATENT / SCALE_BLOCK] float32, or None
    k_rope: Any  # [B S ROPE]

    def keys_of(self, row: Any, T: int) -> "KeyArrays":
        """The keys of the sequence that ``row`` of the flattened queries belongs to."""
        scale = None if self.latent_scale is None else self.latent_scale.at[row // T]
        return KeyArrays(self.latent.at[row // T], scale, self.k_rope.at[row // T])


class KeyArrays(NamedTuple):
    """One sequence's keys in device memory."""

    latent: Any
    scale: Any
    k_rope: Any


class Scratch(NamedTuple):
    """Shared memory and barriers of a thread block, in the order of allocation. ``scratch_types`` has the types."""

    q_left: Any  # [HEADS HALF], the left half of the latent queries
    q_right: Any
    q_rope: Any
    keys: Any  # [2 KEYS COLUMNS], by slot
    p1: Any  # [HEADS KEYS], probabilities of the keys in slot 1
    rows: Any  # 7 rows of 64 float32, see the properties; one array, because each is padded to 1024 bytes
    q_ready: Any
    q_free: Any
    keys_free: tuple[tuple[Any, Any], tuple[Any, Any]]  # [slot][half]
    p_ready: tuple[Any, Any]  # [slot], each a barrier per half of the block's keys
    start: Any  # a barrier per consumer
    interpreted_rows_ready: tuple[Any, ...]  # [N_GROUPS slot + group], in the interpreter only

    @property
    def p0(self) -> Any:
        """Probabilities of the keys in slot 0, over their rotated columns, which are dead once S0 is known."""
        return self.keys.at[0, :, pl.ds(LATENT, ROPE)]

    def maximum(self, slot: int) -> Any:
        """[HEADS] running maximum after the block in this slot."""
        return self.rows.at[slot]

    def total(self, consumer: int) -> Any:
        """[HEADS] sum of the probabilities that one consumer computed for a work item."""
        return self.rows.at[2 + consumer]

    @property
    def no_key(self) -> Any:
        """[2 KEYS] by slot: NO_KEY for a missing key, else 0."""
        return self.rows.at[pl.ds(4, 2)]

    @property
    def rows_ready(self) -> Any:
        """2 N_GROUPS barriers of 64 bits, [N_GROUPS slot + group]: a group of a slot's tiles has arrived.

        Pallas's barriers do not take the arrivals of cp.async, so ``Steps`` initialises and waits for these.
        """
        return self.rows.at[6]


def scratch_types(plan: Plan) -> Scratch:
    def tiled(*shape):
        return plgpu.SMEM(shape, dtype=jnp.bfloat16, transforms=TRANSFORMS)

    return Scratch(
        q_left=tiled(HEADS, HALF),
        q_right=tiled(HEADS, HALF),
        q_rope=tiled(HEADS, ROPE),
        keys=tiled(2, KEYS, COLUMNS),
        p1=tiled(HEADS, KEYS),
        rows=plgpu.SMEM((7, 64), jnp.float32),
        q_ready=plgpu.Barrier(num_arrivals=3),
        q_free=plgpu.Barrier(num_arrivals=2),
        keys_free=((plgpu.Barrier(), plgpu.Barrier()), (plgpu.Barrier(), plgpu.Barrier())),
        p_ready=(plgpu.Barrier(num_barriers=2), plgpu.Barrier(num_barriers=2)),
        start=plgpu.Barrier(num_barriers=2),
        interpreted_rows_ready=(plgpu.Barrier(),) * (2 * N_GROUPS if plan.interpret else 0),
    )
