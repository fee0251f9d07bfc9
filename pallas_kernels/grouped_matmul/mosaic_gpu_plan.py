"""Sizes of the grouped_matmul kernels, their division of work, and the layout of their shared memory.

A task is up to ``TASK_ROWS`` rows of one group. Its first row is rounded down to a multiple of ALIGN, because the
hardware copies whole tiles of that many rows; the rows of the group before it are multiplied and not stored.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.hopper.mosaic import plgpu

CONSUMERS = 2
SLAB = 64  # rows of one wgmma
TASK_ROWS = 3 * SLAB
DEPTH = 64  # of the common dimension per pipeline stage: 128 bytes of bfloat16
ALIGN = 8
OUT_SLOTS = 3  # of 64 x 64 finished numbers, per consumer
# Registers per thread. At launch 3 x 128 threads have 168 each; the three warpgroups redistribute that total.
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 232, 40


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of one compiled kernel."""

    rows: int  # M
    groups: int  # E
    common: int  # the dimension that is summed over; for the gradient of the weights, X
    columns: int  # Y
    transposed: bool  # multiply with the transposed matrix of each group
    n_blocks: int  # persistent thread blocks
    stages: int = 3

    @property
    def width(self) -> int:
        """Columns of a tile of the output, of which ``columns`` is a multiple."""
        return 256 if self.columns % 256 == 0 else 128

    @property
    def tasks(self) -> int:
        """The most tasks that any division of the rows into groups, and rows behind them, can give."""
        return (self.rows + min(self.groups + 1, self.rows) * (TASK_ROWS + ALIGN - 2)) // TASK_ROWS


class Tasks(NamedTuple):
    """Rows [low, high) of a task belong to its group; it multiplies TASK_ROWS rows from ``first`` on.

    Rows behind the last group are those of group E: they become 0.
    """

    count: Any  # [1]: the tasks that there are
    group: Any  # [tasks]
    first: Any
    low: Any
    high: Any


def make_tasks(group_sizes: Int[Array, " E"], plan: Plan) -> Tasks:
    """Sums and searches are comparisons of everything with everything: XLA fuses them into a few small kernels.

    ``jnp.cumsum`` and ``jnp.searchsorted`` are loops of launches on a GPU, longer than a small product.
    """
    sizes = group_sizes.astype(jnp.int32)
    sizes = jnp.concatenate([sizes, plan.rows - sizes.sum(keepdims=True)])
    end = running_sum(sizes)
    begin = end - sizes
    aligned = begin // ALIGN * ALIGN
    counts = jnp.where(sizes > 0, -(-(end - aligned) // TASK_ROWS), 0)
    last = running_sum(counts)
    task = jnp.arange(plan.tasks, dtype=jnp.int32)
    group = jnp.minimum((last <= task[:, None]).sum(axis=1, dtype=jnp.int32), plan.groups)
    first = aligned[group] + (task - (last - counts)[group]) * TASK_ROWS
    low, high = jnp.maximum(first, begin[group]), jnp.minimum(first + TASK_ROWS, end[group])
    return Tasks(last[-1:], group, first, low, high)


def running_sum(numbers: Int[Array, " E"]) -> Int[Array, " E"]:
    """The sum of each number and all before it."""
    index = jnp.arange(numbers.shape[0])
    return jnp.where(index <= index[:, None], numbers, 0).sum(axis=1)


def operand(*shape: int) -> Any:
    """Shared memory of a wgmma operand in bfloat16: tiles of 8 rows of 128 bytes, swizzled."""
    return plgpu.SMEM(
        shape, jnp.bfloat16, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    )


def output() -> Any:
    """Shared memory of finished rows. Tiles of one row, so that any number of rows can be copied out."""
    return plgpu.SMEM(
        (CONSUMERS, OUT_SLOTS, SLAB, 64),
        jnp.bfloat16,
        transforms=(plgpu.TilingTransform((1, 64)), plgpu.SwizzleTransform(128)),
    )
