"""The sparse_mla kernel: three warpgroups of a persistent thread block, and the barriers between them.

    producer     gathers the rows of latent and k_rope into keys[0] and keys[1], converting those of an FP8 cache
    consumer 0   S0 = Q K[0]^T, softmax, publishes P0; out[:, :256] += P0 V0, then += P1 V1
    consumer 1   S1 = Q K[1]^T; out[:, 256:] += P0 V0 beside the softmax of S1, publishes P1, then += P1 V1

The running maximum passes from block to block (consumer 0, consumer 1, consumer 0 of the next pair), so both halves
of the output see the same sequence of rescalings and no P is ever rescaled. keys[0] is free for the next rows while
keys[1] is multiplied, and the other way round. The maximum is raised only when a logit exceeds it by SLACK. Almost
always no row changes, and the 256 multiplications of a rescaling leave the critical path. The producer gathers for
the next work item while the consumers write out the last one.

Barriers (s is a slot, h a half). An arrival is that of a warpgroup or of a TMA copy; at rows_ready, of a thread.

| barrier | arrivals | who arrives | who waits | what it protects |
|---|---|---|---|---|
| start[c] | 1 | producer, once | consumer c, once | rows_ready until it is initialised |
| q_ready | 3 | TMA: q_left, q_right, q_rope | both consumers | the queries until they have arrived |
| q_free | 2 | each consumer, after its last S | producer | the queries until both have multiplied them |
| rows_ready[s, group] | Hardware.arrivals | producer's threads | consumer s | a group of tiles; no_key[s] |
| keys_free[s][h] | 1 | consumer h, after P V of slot s | producer | half h of keys[s]; P0 is in half 1 of keys[0] |
| p_ready[s][h] | 1 | consumer s | the other consumer | half of P[s], maximum(s); after the last pair total(s) |

Consumer h starts P V only after P is ready, hence after S: keys_free covers both products. In the same way p_ready[0]
of the next pair tells consumer 1 that P1 and maximum(1) have been read.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hopper.launch import persistent_kernel
from pallas_kernels.hopper.mosaic import pl, plgpu
from pallas_kernels.sparse_mla.mosaic_gpu_fp8 import HardwareFp8
from pallas_kernels.sparse_mla.mosaic_gpu_hardware import Hardware
from pallas_kernels.sparse_mla.mosaic_gpu_plan import (
    GROUPS,
    HALF,
    HEADS,
    KEYS,
    LATENT,
    NO_MAXIMUM,
    PAIR,
    PER_HEAD,
    PER_KEY,
    REGISTERS,
    SLACK,
    Inputs,
    Plan,
    Scratch,
    scratch_types,
)
from pallas_kernels.sparse_mla.mosaic_gpu_steps import Interpreted, InterpretedFp8, Steps

STEPS: dict[tuple[bool, bool], Callable[[int], Steps]] = {  # by Plan.fp8 and Plan.interpret
    (False, False): Hardware,
    (False, True): Interpreted,
    (True, False): HardwareFp8,
    (True, True): InterpretedFp8,
}


@functools.cache
def build(plan: Plan) -> Callable[[Inputs], list[jax.Array]]:
    """The kernel: Inputs -> [out [n_splits BT N LATENT] in ``plan.out_dtype``, lse [n_splits BT N] float32]."""
    steps = STEPS[plan.fp8, plan.interpret](plan.K)

    def body(inputs, out, lse, scratch):
        warpgroup = lax.axis_index("warpgroup")
        index = lax.axis_index("block")
        n_items = (plan.items - index + plan.blocks - 1) // plan.blocks
        block = _Block(plan, steps, inputs, out, lse, scratch, index, n_items)
        pl.when(warpgroup == 0)(functools.partial(_consume, block, 0))
        pl.when(warpgroup == 1)(functools.partial(_consume, block, 1))
        pl.when(warpgroup == 2)(functools.partial(_produce, block))

    return persistent_kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((plan.n_splits, plan.B * plan.T, plan.N, LATENT), plan.out_dtype),
            jax.ShapeDtypeStruct((plan.n_splits, plan.B * plan.T, plan.N), jnp.float32),
        ],
        scratch=scratch_types(plan),
        n_blocks=plan.blocks,
        warpgroups=3,
        approx_math=True,
        reduction_scratch_bytes=0,  # rows are reduced within four lanes
    )


@dataclasses.dataclass(frozen=True)
class _Block:
    """What the warpgroups of a thread block share."""

    plan: Plan
    steps: Steps
    inputs: Inputs
    out: Any
    lse: Any
    scratch: Scratch
    index: Any  # of the block in the grid
    n_items: Any  # work items of the block

    def place(self, i):
        """(row of the flattened queries, first head, split) of this block's i-th work item.

        Neighbouring blocks hold the head groups of one query: the second gather of a row hits the L2 cache.
        """
        plan = self.plan
        item = self.index + i * plan.blocks
        rows = plan.B * plan.T
        return (
            item // plan.head_groups % rows,
            item % plan.head_groups * HEADS,
            item // (plan.head_groups * rows),
        )


class _State(NamedTuple):
    """What a consumer carries from pair to pair."""

    acc: Any  # [HEADS HALF], its half of the output, relative to exp2(highest)
    highest: Any  # [HEADS] running maximum, in base 2
    total: Any  # [HEADS] sum of the probabilities it computed


def _consume(block, consumer):
    """Consumer 0 or 1: half of the output of every work item."""
    plgpu.set_max_registers(REGISTERS[block.plan.fp8][0], action="increase")
    plgpu.barrier_wait(block.scratch.start.at[consumer])
    add_pair = (_add_pair_0, _add_pair_1)[consumer]

    def item(i, _):
        plgpu.barrier_wait(block.scratch.q_ready)
        empty = _State(
            plgpu.layout_cast(jnp.zeros((HEADS, HALF), jnp.float32), plgpu.Layout.WGMMA),
            plgpu.layout_cast(jnp.full((HEADS,), NO_MAXIMUM, jnp.float32), PER_HEAD),
            plgpu.layout_cast(jnp.zeros((HEADS,), jnp.float32), PER_HEAD),
        )
        state = lax.fori_loop(0, block.plan.pairs, functools.partial(add_pair, block, i), empty)
        _write(block, i, consumer, state)
        return ()

    lax.fori_loop(0, block.n_items, item, ())


def _add_pair_0(block, i, t, state):
    """Consumer 0's part of the t-th pair of work item i."""
    steps, scratch = block.steps, block.scratch
    s = _logits(block, 0, i, t)
    highest0 = _raised(block, state.highest, s)
    scratch.maximum(0)[...] = highest0
    alpha = jnp.exp2(state.highest - highest0)
    acc, total = steps.rescale(state.acc, alpha), state.total * alpha
    for half in range(2):
        p16, row_sum = _publish(block, s, highest0, 0, half)
        acc = steps.start_matmul(acc, p16, scratch.keys.at[0, :, pl.ds(0, HALF)], half)
        total = total + row_sum
    acc = steps.finish_matmul(acc)
    plgpu.barrier_arrive(scratch.keys_free[0][0])

    plgpu.barrier_wait(scratch.p_ready[1].at[0])
    highest1 = _load(scratch.maximum(1))
    alpha = jnp.exp2(highest0 - highest1)
    acc = steps.rescale(acc, alpha)
    acc = steps.start_matmul(acc, scratch.p1, scratch.keys.at[1, :, pl.ds(0, HALF)], 0)
    plgpu.barrier_wait(scratch.p_ready[1].at[1])
    acc = steps.start_matmul(acc, scratch.p1, scratch.keys.at[1, :, pl.ds(0, HALF)], 1)
    acc = steps.finish_matmul(acc)
    plgpu.barrier_arrive(scratch.keys_free[1][0])
    return _State(acc, highest1, total * alpha)


def _add_pair_1(block, i, t, state):
    """Consumer 1's part of the t-th pair of work item i."""
    steps, scratch = block.steps, block.scratch
    s = _logits(block, 1, i, t)
    plgpu.barrier_wait(scratch.p_ready[0].at[0])
    highest0 = _load(scratch.maximum(0))
    alpha0 = jnp.exp2(state.highest - highest0)
    acc = steps.rescale(state.acc, alpha0)
    acc = steps.start_matmul(acc, scratch.p0, scratch.keys.at[0, :, pl.ds(HALF, HALF)], 0)
    highest1 = _raised(block, highest0, s)
    scratch.maximum(1)[...] = highest1
    plgpu.barrier_wait(scratch.p_ready[0].at[1])
    acc = steps.start_matmul(acc, scratch.p0, scratch.keys.at[0, :, pl.ds(HALF, HALF)], 1)
    (p16_0, sum_0), (p16_1, sum_1) = (_publish(block, s, highest1, 1, half) for half in range(2))
    alpha1 = jnp.exp2(highest0 - highest1)
    total = state.total * (alpha0 * alpha1) + (sum_0 + sum_1)
    acc = steps.finish_matmul(acc)
    plgpu.barrier_arrive(scratch.keys_free[0][1])

    acc = steps.rescale(acc, alpha1)
    acc = steps.start_matmul(acc, p16_0, scratch.keys.at[1, :, pl.ds(HALF, HALF)], 0)
    acc = steps.start_matmul(acc, p16_1, scratch.keys.at[1, :, pl.ds(HALF, HALF)], 1)
    acc = steps.finish_matmul(acc)
    plgpu.barrier_arrive(scratch.keys_free[1][1])
    return _State(acc, highest1, total)


def _logits(block, slot, i, t):
    """Q K[slot]^T for the t-th pair of work item i; missing keys start at NO_KEY."""
    steps, scratch, pairs = block.steps, block.scratch, block.plan.pairs
    round_ = i * pairs + t
    queries = ((scratch.q_left, range(0, 4)), (scratch.q_right, range(4, 8)), (scratch.q_rope, range(8, 9)))
    s = None
    for group, tiles in enumerate(GROUPS[0] + GROUPS[1]):
        steps.wait_rows(scratch, slot, group, round_)
        if s is None:
            s = plgpu.load(scratch.no_key.at[slot], layout=PER_KEY, optimized=False)
            s = plgpu.layout_cast(lax.broadcast_in_dim(s, (HEADS, KEYS), [1]), plgpu.Layout.WGMMA)
        for q, q_tiles in queries:
            if shared := [tile for tile in tiles if tile in q_tiles]:
                width = 64 * len(shared)
                of_keys = scratch.keys.at[slot, :, pl.ds(64 * shared[0], width)]
                s = steps.start_matmul(s, q.at[:, pl.ds(64 * (shared[0] - q_tiles[0]), width)], of_keys)
    s = steps.finish_matmul(s)
    pl.when(t == pairs - 1)(lambda: plgpu.barrier_arrive(scratch.q_free))
    return s


def _raised(block, highest, s):
    """The running maximum after the logits s; a rise below SLACK is left for later."""
    found = s.max(axis=1) * block.plan.scale_log2
    return jnp.where(found > highest + SLACK, found, highest)


def _publish(block, s, highest, slot, half):
    """Stores P[slot], relative to exp2(highest), for half of the block's keys; returns it and its row sums."""
    s = s[:, half * KEYS // 2 : (half + 1) * KEYS // 2]
    p = jnp.exp2(s * block.plan.scale_log2 - lax.broadcast_in_dim(highest, s.shape, [0]))
    p16 = p.astype(jnp.bfloat16)
    block.steps.store_half((block.scratch.p0, block.scratch.p1)[slot], p16, half)
    plgpu.barrier_arrive(block.scratch.p_ready[slot].at[half])
    return p16, p.sum(axis=1)


def _load(per_head):
    return plgpu.load(per_head, layout=PER_HEAD, optimized=False)


def _write(block, i, consumer, state):
    """Writes a consumer's half of out and, as consumer 1, lse. The consumers exchange their sums in turn.

    In turn, so that neither barrier completes twice before it is waited for.
    """
    scratch, total = block.scratch, state.total
    if consumer == 1:
        plgpu.barrier_wait(scratch.p_ready[0].at[0])
    scratch.total(consumer)[...] = total
    plgpu.barrier_arrive(scratch.p_ready[consumer].at[0])
    if consumer == 0:
        plgpu.barrier_wait(scratch.p_ready[1].at[0])
    total = total + _load(scratch.total(1 - consumer))
    row, head, split = block.place(i)
    out = state.acc * lax.broadcast_in_dim(1.0 / jnp.where(total == 0.0, 1.0, total), state.acc.shape, [0])
    own_part = block.out.at[split, row, pl.ds(head, HEADS), pl.ds(HALF * consumer, HALF)]
    block.steps.store_out(own_part, out.astype(block.plan.out_dtype))
    if consumer == 1:
        natural = (state.highest + jnp.log2(total)) * math.log(2.0)
        block.lse[split, row, pl.ds(head, HEADS)] = jnp.where(total == 0.0, -jnp.inf, natural)


def _produce(block):
    """The producer: queries by TMA, keys row by row."""
    plan, steps, inputs, scratch = block.plan, block.steps, block.inputs, block.scratch
    plgpu.set_max_registers(REGISTERS[plan.fp8][1], action="decrease")
    steps.init_barriers(scratch)
    plgpu.barrier_arrive(scratch.start.at[0])
    plgpu.barrier_arrive(scratch.start.at[1])

    def item(i, _):
        row, head, split = block.place(i)
        pl.when(i > 0)(lambda: plgpu.barrier_wait(scratch.q_free))
        heads = pl.ds(head, HEADS)
        for source, target in (
            (inputs.q_latent.at[row, heads, pl.ds(0, HALF)], scratch.q_left),
            (inputs.q_latent.at[row, heads, pl.ds(HALF, HALF)], scratch.q_right),
            (inputs.q_rope.at[row, heads], scratch.q_rope),
        ):
            plgpu.copy_gmem_to_smem(source, target, scratch.q_ready)
        sources = inputs.keys_of(row, plan.T)

        def pair(t, state):
            found, ahead = state
            following = steps.load_indices(inputs.indices.at[row], (split * plan.pairs + t + 1) * PAIR)

            def wait_free(slot, half):
                wait = functools.partial(plgpu.barrier_wait, scratch.keys_free[slot][half])
                pl.when((i > 0) | (t > 0))(wait)

            ahead = steps.gather(scratch, sources, found, following, ahead, wait_free)
            return following, ahead

        first = steps.load_indices(inputs.indices.at[row], split * plan.pairs * PAIR)
        lax.fori_loop(0, plan.pairs, pair, (first, steps.prefetch(first, sources)))
        return ()

    lax.fori_loop(0, block.n_items, item, ())
    for barrier in (*scratch.keys_free[0], *scratch.keys_free[1], scratch.q_free):  # leave none pending
        plgpu.barrier_wait(barrier)
