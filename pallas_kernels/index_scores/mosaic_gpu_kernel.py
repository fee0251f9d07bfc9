"""The index_scores kernel: three warpgroups of a persistent thread block, and the barriers between them.

A producer brings the group's queries, its weights and the keys with TMA, in rings of shared memory, and writes -inf
over keys that no query of the group may see. Two consumers each multiply 64 keys by all heads of the group's queries
in two wgmma chains (64 x 128). A consumer reduces one chain in registers while the next one, or the other
consumer's, is multiplied. Per dot product the reduction costs two instructions: relu(x) = (x + |x|) / 2, where |x|
is a free operand modifier and the half is in the weights.

Barriers (i is a slot of a ring, c a consumer). An arrival is that of a warpgroup or of a TMA copy; at turn, of a
thread.

| barrier | arrivals | who arrives | who waits | what it protects |
|---|---|---|---|---|
| q_full[i] | 2 | TMA: q_ring[i], w_ring[i] | consumers, per work item | queries and weights until they have arrived |
| q_free[i] | 2 | each consumer, after its last key block | producer | queries and weights until both have used them |
| k_full[i] | 1 | TMA: k_ring[i] | consumers, per key block | the keys until they have arrived |
| k_free[i] | 2 | each consumer, after its scores | producer | the keys until both have multiplied them |
| turn[c] | 256 | the other consumer, after its first chain | consumer c, before its first | no data: see ``Hardware`` |

Work items without visible keys use no slot of a ring.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hopper.launch import persistent_kernel
from pallas_kernels.hopper.mosaic import pl, plgpu
from pallas_kernels.index_scores.mosaic_gpu_plan import (
    BLOCK,
    COLUMNS,
    CONSUMER_REGISTERS,
    CONSUMERS,
    PRODUCER_REGISTERS,
    Q_STAGES,
    Inputs,
    Place,
    Plan,
    Scratch,
    scratch_types,
)
from pallas_kernels.index_scores.mosaic_gpu_steps import Hardware, Interpreted, Steps


@functools.cache
def build(plan: Plan) -> Callable[[Inputs], jax.Array]:
    """The kernel: Inputs -> scores [B T S], float32."""
    steps = Interpreted(plan) if plan.interpret else Hardware(plan)

    def body(inputs, out, scratch):
        warpgroup = lax.axis_index("warpgroup")
        index = lax.axis_index("block")
        n_items = (plan.items - index + plan.n_blocks - 1) // plan.n_blocks
        block = _Block(plan, steps, inputs, out, scratch, index, n_items)
        pl.when(warpgroup < CONSUMERS)(functools.partial(_consume, block, warpgroup))
        pl.when(warpgroup == CONSUMERS)(functools.partial(_produce, block))

    return persistent_kernel(
        body,
        out_type=jax.ShapeDtypeStruct((plan.B, plan.T, plan.S), jnp.float32),
        scratch=scratch_types(plan),
        n_blocks=plan.n_blocks,
        warpgroups=CONSUMERS + 1,
    )


class _Item(NamedTuple):
    """A work item: key blocks [low, high) hold all keys of the chunk that some query of the group may see."""

    sequence: Any
    group: Any  # of the sequence
    chunk: Any
    low: Any
    high: Any


class _Used(NamedTuple):
    """How many slots of the rings were used so far. The next slot is this modulo the ring's size."""

    queries: Any
    keys: Any


@dataclasses.dataclass(frozen=True)
class _Block:
    """What the warpgroups of a thread block share."""

    plan: Plan
    steps: Steps
    inputs: Inputs
    out: Any
    scratch: Scratch
    index: Any  # of the block in the grid
    n_items: Any  # work items of the block

    def item(self, n):
        """This block's n-th work item."""
        plan = self.plan
        i = self.index + n * plan.n_blocks
        groups = plan.B * plan.groups
        group, chunk = lax.rem(lax.rem(i, groups) * plan.spread, groups), lax.div(i, groups)
        low = jnp.maximum(lax.div(self.inputs.first[group], BLOCK), chunk * plan.chunk)
        high = jnp.minimum(lax.div(self.inputs.last[group] + BLOCK - 1, BLOCK), (chunk + 1) * plan.chunk)
        low = jnp.minimum(low, (chunk + 1) * plan.chunk)
        sequence, group = lax.div(group, plan.groups), lax.rem(group, plan.groups)
        return _Item(sequence, group, chunk, low, jnp.maximum(low, high))

    def for_each_item(self, body):
        """``used = body(item, used)`` for all items of the block; returns the last ``used``."""
        return lax.fori_loop(
            0, self.n_items, lambda n, used: body(self.item(n), used), _Used(jnp.int32(0), jnp.int32(0))
        )


def _consume(block, warpgroup):
    """A consumer: the scores of 64 keys of every key block."""
    scratch, steps, stages = block.scratch, block.steps, block.plan.stages
    plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")

    def score(item, used):
        q_slot = lax.rem(used.queries, Q_STAGES)
        plgpu.barrier_wait(scratch.q_full.at[q_slot])
        w = plgpu.load(scratch.w_ring.at[q_slot], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)

        def one_block(key_block, used_keys):
            slot = lax.rem(used_keys, stages)
            plgpu.barrier_wait(scratch.k_full.at[slot])
            place = Place(item.sequence, item.group, key_block)
            keys, queries = scratch.k_ring.at[slot], scratch.q_ring.at[q_slot]
            steps.score(block.inputs, block.out, keys, queries, w, place)
            plgpu.barrier_arrive(scratch.k_free.at[slot])
            return used_keys + 1

        used_keys = lax.fori_loop(item.low, item.high, one_block, used.keys)
        plgpu.barrier_arrive(scratch.q_free.at[q_slot])
        return _Used(used.queries + 1, used_keys)

    steps.give_first_turn(warpgroup)
    block.for_each_item(lambda item, used: _if_visible(item, score, used))
    steps.take_last_turn(warpgroup)


def _if_visible(item, work, used):
    """``work(item, used)``, or ``used`` where no key of the item is visible."""
    return lax.cond(item.low < item.high, functools.partial(work, item), lambda used: used, used)


def _produce(block):
    """The producer: queries, weights and keys by TMA, and -inf where no key is visible."""
    plan, inputs, scratch = block.plan, block.inputs, block.scratch
    plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

    def load(item, used):
        q_slot = lax.rem(used.queries, Q_STAGES)
        pl.when(used.queries >= Q_STAGES)(lambda: plgpu.barrier_wait(scratch.q_free.at[q_slot]))
        heads = pl.ds(item.group * COLUMNS, COLUMNS)
        full = scratch.q_full.at[q_slot]
        plgpu.copy_gmem_to_smem(inputs.q.at[item.sequence, heads], scratch.q_ring.at[q_slot], full)
        plgpu.copy_gmem_to_smem(inputs.weights.at[item.sequence, heads], scratch.w_ring.at[q_slot], full)

        def one_block(key_block, used_keys):
            slot = lax.rem(used_keys, plan.stages)
            pl.when(used_keys >= plan.stages)(lambda: plgpu.barrier_wait(scratch.k_free.at[slot]))
            keys = inputs.k.at[item.sequence, pl.ds(key_block * BLOCK, BLOCK)]
            plgpu.copy_gmem_to_smem(keys, scratch.k_ring.at[slot], scratch.k_full.at[slot])
            return used_keys + 1

        return _Used(used.queries + 1, lax.fori_loop(item.low, item.high, one_block, used.keys))

    def bring(item, used):
        used = _if_visible(item, load, used)
        keys_per_chunk = plan.chunk * BLOCK
        stop = jnp.minimum((item.chunk + 1) * keys_per_chunk, plan.S)
        for begin, end in (
            (item.chunk * keys_per_chunk, jnp.minimum(item.low * BLOCK, stop)),
            (jnp.minimum(item.high * BLOCK, stop), stop),
        ):
            block.steps.fill(block.out, item.sequence, item.group, begin, end)
        return used

    used = block.for_each_item(bring)
    for count, size, free in (
        (used.queries, Q_STAGES, scratch.q_free),
        (used.keys, plan.stages, scratch.k_free),
    ):  # leave none pending

        def drain(i, _, size=size, free=free):
            plgpu.barrier_wait(free.at[lax.rem(i, size)])

        lax.fori_loop(jnp.maximum(count - size, 0), count, drain, None)
