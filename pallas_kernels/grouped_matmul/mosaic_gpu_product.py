"""The grouped product on Hopper: a producer and two consumers per persistent thread block.

The producer brings the rows of a task and the matching part of its group's matrix by TMA, in a ring of shared memory.
Each consumer multiplies all rows by half of the tile's columns, 64 rows per wgmma. So a group of up to 185 rows reads
its matrix once, and what its rows do not fill is neither copied nor multiplied in whole slabs of 64.

Barriers (i is a slot of the ring). An arrival is that of a warpgroup or of a TMA copy.

| barrier | arrivals | who arrives | who waits | what it protects |
|---|---|---|---|---|
| full[i] | 2 | TMA: rows[i], weights[i] | consumers, per stage | the operands until they have arrived |
| free[i] | 2 | each consumer, one stage later | producer | the operands until both have multiplied them |
"""

import functools
import itertools
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
    OUT_SLOTS,
    PRODUCER_REGISTERS,
    SLAB,
    TASK_ROWS,
    Plan,
    Tasks,
    operand,
    output,
)
from pallas_kernels.hopper.launch import persistent_kernel
from pallas_kernels.hopper.mosaic import pl, plgpu

SLABS = TASK_ROWS // SLAB


class Scratch(NamedTuple):
    rows: Any  # [stages TASK_ROWS DEPTH]
    weights: Any  # [stages DEPTH width], or [stages width DEPTH]
    out: Any
    full: Any
    free: Any


class Tile(NamedTuple):
    """A task and its columns [column, column + width)."""

    group: Any
    first: Any
    low: Any
    high: Any
    column: Any

    @property
    def slabs(self) -> Any:
        """How many slabs hold rows of the group."""
        return lax.div(self.high - self.first + SLAB - 1, SLAB)


@functools.cache
def build(plan: Plan) -> Callable[[jax.Array, jax.Array, Tasks], jax.Array]:
    """(rows [M X], weights [E X Y] or, transposed, [E Y X], tasks) -> [M Y] in bfloat16."""
    part = (plan.width, DEPTH) if plan.transposed else (DEPTH, plan.width)
    scratch = Scratch(
        rows=operand(plan.stages, TASK_ROWS, DEPTH),
        weights=operand(plan.stages, *part),
        out=output(),
        full=plgpu.Barrier(num_arrivals=2, num_barriers=plan.stages),
        free=plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=plan.stages),
    )

    def body(rows, weights, tasks, out, scratch):
        warpgroup = lax.axis_index("warpgroup")
        pl.when(warpgroup < CONSUMERS)(lambda: _consume(plan, tasks, out, scratch, warpgroup))
        pl.when(warpgroup == CONSUMERS)(lambda: _produce(plan, rows, weights, tasks, scratch))

    return persistent_kernel(
        body,
        out_type=jax.ShapeDtypeStruct((plan.rows, plan.columns), jnp.bfloat16),
        scratch=scratch,
        n_blocks=plan.n_blocks,
        warpgroups=CONSUMERS + 1,
    )


def _for_each_tile(plan: Plan, tasks: Tasks, body: Callable[[Tile, Any], Any]) -> Any:
    """``used = body(tile, used)``. Tiles that run at the same time share a matrix where a group has several tasks."""
    across = plan.columns // plan.width
    index = lax.axis_index("block")
    n_tiles = tasks.count[0] * across

    def find(n):
        i = jnp.maximum(jnp.minimum(index + n * plan.n_blocks, n_tiles - 1), 0)
        task, column = lax.div(i, across), lax.rem(i, across) * plan.width
        return Tile(tasks.group[task], tasks.first[task], tasks.low[task], tasks.high[task], column)

    return for_each(lax.div(n_tiles - index + plan.n_blocks - 1, plan.n_blocks), find, body)


def for_each(count: Any, find: Callable[[Any], Any], body: Callable[[Any, Any], Any]) -> Any:
    """``used = body(find(n), used)`` for n < count, from 0 on. The next ``find`` reads memory while ``body`` runs."""

    def one(n, carry):
        tile, used = carry
        following = find(n + 1)
        return following, body(tile, used)

    return lax.fori_loop(0, count, one, (find(jnp.int32(0)), jnp.int32(0)))[1]


def _produce(plan, rows, weights, tasks, scratch):
    plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

    def bring(tile, used):
        matrix = weights.at[tile.group]
        columns = pl.ds(pl.multiple_of(tile.column, 64), plan.width)

        def stage(k, used):
            slot = lax.rem(used, plan.stages)
            pl.when(used >= plan.stages)(lambda: plgpu.barrier_wait(scratch.free.at[slot]))
            depth = pl.ds(pl.multiple_of(k * DEPTH, DEPTH), DEPTH)
            full = scratch.full.at[slot]
            source = matrix.at[columns, depth] if plan.transposed else matrix.at[depth, columns]
            plgpu.copy_gmem_to_smem(source, scratch.weights.at[slot], full)
            for slabs in range(1, SLABS + 1):

                @pl.when(tile.slabs == slabs)
                def _bring_rows(height=slabs * SLAB):
                    some = rows.at[pl.ds(pl.multiple_of(tile.first, ALIGN), height), depth]
                    plgpu.copy_gmem_to_smem(some, scratch.rows.at[slot, pl.ds(0, height)], full)

            return used + 1

        steps = jnp.where(tile.group < plan.groups, plan.common // DEPTH, 0)
        return lax.fori_loop(0, steps, stage, used)

    used = _for_each_tile(plan, tasks, bring)
    drain(plan.stages, used, scratch.free)


def drain(stages: int, used: Any, free: Any) -> None:
    """Waits for the last slots, so that no arrival is pending when the thread block ends."""

    def wait(i, _):
        plgpu.barrier_wait(free.at[lax.rem(i, stages)])

    lax.fori_loop(jnp.maximum(used - stages, 0), used, wait, None)


def _consume(plan, tasks, out, scratch, warpgroup):
    plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
    steps, half = plan.common // DEPTH, plan.width // CONSUMERS
    own = pl.ds(warpgroup * half, half)

    def multiply(slabs, tile, used):
        def products(*sums):
            def stage(k, used):
                slot = lax.rem(used, plan.stages)
                plgpu.barrier_wait(scratch.full.at[slot])
                if plan.transposed:
                    matrix = scratch.weights.at[slot, own].transpose((1, 0))
                else:
                    matrix = scratch.weights.at[slot, :, own]
                for slab, acc in enumerate(sums):
                    plgpu.wgmma(acc, scratch.rows.at[slot, pl.ds(slab * SLAB, SLAB)], matrix)
                plgpu.wgmma_wait(slabs)
                before = lax.rem(used + plan.stages - 1, plan.stages)
                pl.when(k > 0)(lambda: plgpu.barrier_arrive(scratch.free.at[before]))
                return used + 1

            lax.fori_loop(0, steps, stage, used)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(scratch.free.at[lax.rem(used + steps - 1, plan.stages)])
            return [acc[...] for acc in sums]

        for slab, values in enumerate(
            pl.run_scoped(products, *[plgpu.ACC((SLAB, half), jnp.float32)] * slabs)
        ):
            for part in range(half // 64):
                store(tile, slab, part, values[:, part * 64 : (part + 1) * 64].astype(jnp.bfloat16))

    def store(tile, slab, part, values):
        """64 columns of a slab, through shared memory."""
        first = tile.first + slab * SLAB
        begin = jnp.maximum(tile.low - first, 0)
        count = jnp.maximum(jnp.minimum(tile.high - first, SLAB) - begin, 0)
        slot = free_slot(scratch.out.at[warpgroup], slab * (half // 64) + part)
        slot[...] = values
        plgpu.commit_smem()
        column = pl.multiple_of(tile.column + warpgroup * half + part * 64, 64)
        _copy_out(slot, out, first, begin, count, pl.ds(column, 64))

    def fill(tile):
        zeros = plgpu.layout_cast(jnp.zeros((SLAB, 64), jnp.bfloat16), plgpu.Layout.WGMMA)
        for slab, part in itertools.product(range(SLABS), range(half // 64)):
            store(tile, slab, part, zeros)

    def one(tile, used):
        inside = tile.group < plan.groups
        for slabs in range(1, SLABS + 1):
            pl.when(inside & (tile.slabs == slabs))(functools.partial(multiply, slabs, tile, used))
        pl.when(~inside)(functools.partial(fill, tile))
        return used + jnp.where(inside, steps, 0)

    _for_each_tile(plan, tasks, one)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def free_slot(slots: Any, nth: int) -> Any:
    """Where to put the nth 64 columns of a tile, once the copies that read this shared memory are done.

    Every tile begins with slot 0, so its first columns wait for all copies of the tile before.
    """
    if nth == 0:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    elif nth >= OUT_SLOTS:
        plgpu.wait_smem_to_gmem(OUT_SLOTS - 1, wait_read_only=True)
    return slots.at[nth % OUT_SLOTS]


def _copy_out(slot, out, first, begin, count, columns):
    """Rows [begin, begin + count) of a slot, in pieces of 64, 32, ... 1 rows: TMA copies have fixed sizes."""
    row, size = begin, SLAB
    while size:

        @pl.when((count & size) != 0)
        def _copy(row=row, size=size):
            source, target = slot.at[pl.ds(row, size)], out.at[pl.ds(first + row, size), columns]
            plgpu.copy_smem_to_gmem(source, target, commit_group=False)

        row, size = row + (count & size), size // 2
    plgpu.commit_smem_to_gmem_group()
