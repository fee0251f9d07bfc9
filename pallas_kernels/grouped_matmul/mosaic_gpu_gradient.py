"""The gradient of the matrices on Hopper: rows.T @ d_out over the rows of each group, without atomics.

The producer brings 64 rows of both operands per stage. Each consumer multiplies 64 columns of the rows by all columns
of the tile. Of a group's first and last stage the rows of other groups are zeroed in shared memory, by selection and
in both operands, so that nothing which they hold can reach the sum.

Barriers (i is a slot of the ring). An arrival is that of a warpgroup or of a TMA copy.

| barrier | arrivals | who arrives | who waits | what it protects |
|---|---|---|---|---|
| full[i] | 2 | TMA: rows[i], d_out[i] | consumers, per stage | the operands until they have arrived |
| zeroed | 2 | each consumer, after its part | consumers, if rows are foreign | the operands until both are zeroed |
| free[i] | 2 | each consumer, one stage later | producer | the operands until both have multiplied them |
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.grouped_matmul.mosaic_gpu_plan import (
    ALIGN,
    CONSUMER_REGISTERS,
    CONSUMERS,
    DEPTH,
    PRODUCER_REGISTERS,
    SLAB,
    Plan,
    operand,
    output,
)
from pallas_kernels.grouped_matmul.mosaic_gpu_product import drain, for_each, free_slot
from pallas_kernels.hopper.launch import persistent_kernel
from pallas_kernels.hopper.mosaic import pl, plgpu

ROWS = CONSUMERS * SLAB  # of a tile


class Scratch(NamedTuple):
    rows: Any  # [stages DEPTH ROWS]
    d_out: Any  # [stages DEPTH width]
    out: Any
    full: Any
    zeroed: Any
    free: Any


class Tile(NamedTuple):
    """Rows [row, row + ROWS) and columns [column, column + width) of a group's matrix, which sums rows [low, high)."""

    group: Any
    low: Any
    high: Any
    row: Any
    column: Any

    @property
    def first(self) -> Any:
        return pl.multiple_of(lax.div(self.low, ALIGN) * ALIGN, ALIGN)

    @property
    def steps(self) -> Any:
        return jnp.where(self.low < self.high, lax.div(self.high - self.first + DEPTH - 1, DEPTH), 0)


@functools.cache
def build(plan: Plan) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """(rows [M X], d_out [M Y], ends [E] int32, the row behind each group) -> [E X Y] in bfloat16."""
    scratch = Scratch(
        rows=operand(plan.stages, DEPTH, ROWS),
        d_out=operand(plan.stages, DEPTH, plan.width),
        out=output(),
        full=plgpu.Barrier(num_arrivals=2, num_barriers=plan.stages),
        zeroed=plgpu.Barrier(num_arrivals=CONSUMERS),
        free=plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=plan.stages),
    )

    def body(rows, d_out, ends, out, scratch):
        warpgroup = lax.axis_index("warpgroup")
        pl.when(warpgroup < CONSUMERS)(lambda: _consume(plan, ends, out, scratch, warpgroup))
        pl.when(warpgroup == CONSUMERS)(lambda: _produce(plan, rows, d_out, ends, scratch))

    return persistent_kernel(
        body,
        out_type=jax.ShapeDtypeStruct((plan.groups, plan.common, plan.columns), jnp.bfloat16),
        scratch=scratch,
        n_blocks=plan.n_blocks,
        warpgroups=CONSUMERS + 1,
    )


def _for_each_tile(plan: Plan, ends: Any, body: Callable[[Tile, Any], Any]) -> Any:
    """``used = body(tile, used)`` for the tiles of this thread block, all tiles of a group after each other."""
    across = plan.columns // plan.width
    per_group = plan.common // ROWS * across
    index = lax.axis_index("block")

    def find(n):
        i = jnp.minimum(index + n * plan.n_blocks, plan.groups * per_group - 1)
        group, tile = lax.div(i, per_group), lax.rem(i, per_group)
        low = jnp.where(group == 0, 0, ends[jnp.maximum(group - 1, 0)])
        return Tile(group, low, ends[group], lax.div(tile, across) * ROWS, lax.rem(tile, across) * plan.width)

    mine = lax.div(plan.groups * per_group - index + plan.n_blocks - 1, plan.n_blocks)
    return for_each(mine, find, body)


def _produce(plan, rows, d_out, ends, scratch):
    plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

    def bring(tile, used):
        def stage(k, used):
            slot = lax.rem(used, plan.stages)
            pl.when(used >= plan.stages)(lambda: plgpu.barrier_wait(scratch.free.at[slot]))
            depth = pl.ds(pl.multiple_of(tile.first + k * DEPTH, ALIGN), DEPTH)
            full = scratch.full.at[slot]
            plgpu.copy_gmem_to_smem(
                rows.at[depth, pl.ds(pl.multiple_of(tile.row, ROWS), ROWS)], scratch.rows.at[slot], full
            )
            columns = pl.ds(pl.multiple_of(tile.column, 64), plan.width)
            plgpu.copy_gmem_to_smem(d_out.at[depth, columns], scratch.d_out.at[slot], full)
            return used + 1

        return lax.fori_loop(0, tile.steps, stage, used)

    used = _for_each_tile(plan, ends, bring)
    drain(plan.stages, used, scratch.free)


def _consume(plan, ends, out, scratch, warpgroup):
    plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
    own = pl.ds(warpgroup * SLAB, SLAB)

    def zero_foreign_rows(slot, first, low, high):
        """In this consumer's columns of the rows, and in its half of those of d_out."""
        half = plan.width // CONSUMERS
        row = first + plgpu.broadcasted_iota(jnp.int32, (DEPTH, 64), 0, layout=plgpu.Layout.WGMMA)
        keep = (row >= low) & (row < high)
        parts = [scratch.rows.at[slot, :, own]]
        parts += [
            scratch.d_out.at[slot, :, pl.ds(warpgroup * half + begin, 64)] for begin in range(0, half, 64)
        ]
        for part in parts:
            values = plgpu.load(part, layout=plgpu.Layout.WGMMA, optimized=False)
            part[...] = jnp.where(keep, values, jnp.bfloat16(0))
        plgpu.commit_smem()
        plgpu.barrier_arrive(scratch.zeroed)
        plgpu.barrier_wait(scratch.zeroed)

    def one(tile, used):
        def products(acc):
            def stage(k, used):
                slot = lax.rem(used, plan.stages)
                plgpu.barrier_wait(scratch.full.at[slot])
                first = tile.first + k * DEPTH
                foreign = (first < tile.low) | (first + DEPTH > tile.high)
                pl.when(foreign)(lambda: zero_foreign_rows(slot, first, tile.low, tile.high))
                rows = scratch.rows.at[slot, :, own].transpose((1, 0))
                plgpu.wgmma(acc, rows, scratch.d_out.at[slot])
                plgpu.wgmma_wait(1)
                before = lax.rem(used + plan.stages - 1, plan.stages)
                pl.when(k > 0)(lambda: plgpu.barrier_arrive(scratch.free.at[before]))
                return used + 1

            lax.fori_loop(0, tile.steps, stage, used)
            plgpu.wgmma_wait(0)
            last = lax.rem(used + tile.steps + plan.stages - 1, plan.stages)
            pl.when(tile.steps > 0)(lambda: plgpu.barrier_arrive(scratch.free.at[last]))
            return acc[...]

        values = pl.run_scoped(products, plgpu.ACC((SLAB, plan.width), jnp.float32)).astype(jnp.bfloat16)
        for part in range(plan.width // 64):
            slot = free_slot(scratch.out.at[warpgroup], part)
            slot[...] = values[:, part * 64 : (part + 1) * 64]
            plgpu.commit_smem()
            target = out.at[tile.group, pl.ds(pl.multiple_of(tile.row + warpgroup * SLAB, SLAB), SLAB)]
            plgpu.copy_smem_to_gmem(
                slot, target.at[:, pl.ds(pl.multiple_of(tile.column + part * 64, 64), 64)]
            )
        return used + tile.steps

    _for_each_tile(plan, ends, one)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
