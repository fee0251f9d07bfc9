"""The steps of the index_scores kernel that Pallas cannot express, and their twins for the interpreter.

Pallas can neither reduce the registers of one wgmma chain while the next is in flight, nor store a part of a tensor
under a mask. ``Hardware`` writes these steps in MLIR and PTX through ``plgpu.inline_mgpu``, which the
Mosaic GPU interpreter does not run; ``Interpreted`` does the same in plain Pallas.
"""

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.hopper import mosaic
from pallas_kernels.hopper import thread_code as tc
from pallas_kernels.hopper.mosaic import arith, ir, pl, plgpu
from pallas_kernels.hopper.thread_code import Word
from pallas_kernels.index_scores.mosaic_gpu_plan import (
    BLOCK,
    COLUMNS,
    CONSUMERS,
    PARTS,
    WIDTH,
    Inputs,
    Place,
    Plan,
)

NEG_INF_BITS = 0xFF800000
_SPLAT = plgpu.Layout.WG_SPLAT  # a scalar


@runtime_checkable
class Steps(Protocol):
    """What the kernel asks of the hardware. Types are Any: tracers, or registers that stand for arrays."""

    def give_first_turn(self, warpgroup: Any) -> None:
        """Once, before a consumer's first ``score``."""

    def take_last_turn(self, warpgroup: Any) -> None:
        """Once, after a consumer's last ``score``."""

    def score(self, inputs: Inputs, out: Any, keys: Any, queries: Any, w: Any, place: Place) -> None:
        """Writes the scores of the calling consumer's 64 keys of a key block for the queries of a group.

        Args:
          keys: [BLOCK WIDTH] in shared memory.
          queries: [COLUMNS WIDTH] in shared memory.
          w: [COLUMNS] in registers.
        """

    def fill(self, out: Any, sequence: Any, group: Any, begin: Any, end: Any) -> None:
        """Writes -inf for all queries of a group over keys [begin, end); begin is a multiple of 4."""


class Hardware:
    """Two consumers that multiply at the same time share the tensor cores, and then leave them idle together.

    So they take turns. A part of a key block is reduced while the next one, already issued, is multiplied. The turn
    passes on when the first part is done, so that the other consumer's products are queued behind the second.
    """

    def __init__(self, plan: Plan):
        self.plan = plan

    def give_first_turn(self, warpgroup):
        """The first turn is consumer 0's."""
        _once(warpgroup, 1, "bar.arrive", 0)

    def take_last_turn(self, warpgroup):
        """The turn that consumer 1 gave last, and that nobody else takes."""
        _once(warpgroup, 0, "bar.sync", 0)

    def score(self, inputs, out, keys, queries, w, place):
        plan = self.plan
        tiled, ref = plgpu.RefType(plan.transforms), plgpu.RefType()
        bounds = inputs.key_start, inputs.key_stop
        scales = () if inputs.k_scale is None else (inputs.k_scale,)
        types = (
            *(tiled, tiled, plgpu.Layout.WGMMA.reduce(0), Place(_SPLAT, _SPLAT, _SPLAT)),
            *((ref, ref), ref, (ref,) * len(scales)),
        )

        @plgpu.inline_mgpu(arg_types=types)
        def score(ctx, keys, queries, w, place, bounds, out, scales):
            del ctx
            sequence, group, key_block = (Word(*mosaic.registers(x)) for x in place)
            lane, warp = tc.thread_index() & 31, tc.thread_index() >> 5  # warps 0 .. 7 of the consumers
            # A lane holds rows lane // 4 and lane // 4 + 8 of its warp's 16 and every fourth pair of columns.
            # After the sum over the four lanes of a row it holds one of the two rows and every second query.
            key = key_block * BLOCK + (warp << 4) + (lane >> 2) + ((lane & 2) << 2)
            safe_key = key.minimum(plan.S - 1)
            factor = tc.load_global_float(_at(scales[0], sequence, plan.S, safe_key)) if scales else None
            weights = mosaic.registers(w)
            per_part = plan.queries // PARTS
            for part, dots in enumerate(self._multiply(keys, queries)):
                first_query = group * plan.queries + part * per_part
                own_queries = [first_query + 2 * i + (lane & 1) for i in range(per_part // 2)]
                safe_queries = [query.minimum(plan.T - 1) for query in own_queries]
                intervals = [
                    [tc.load_global(_at(x, sequence, plan.T, t)) for x in bounds] for t in safe_queries
                ]
                sums = self._weighted_sums(dots, weights[part * len(dots) // 4 :])
                for i, (query, (begin, end)) in enumerate(zip(own_queries, intervals, strict=True)):
                    low, high = (_halve(x, y, lane, 1) for x, y in zip(*sums[2 * i : 2 * i + 2], strict=True))
                    score = _halve(low, high, lane, 2)
                    if factor is not None:
                        score = tc.multiply(score, factor)
                    visible = (key >= begin) & (key < end)
                    bits = visible.select(tc.float_bits(score), NEG_INF_BITS)
                    with tc.when((key < plan.S) & (query < plan.T)):
                        row = sequence * plan.T + query
                        tc.store_global(tc.global_address(out).plus(row, 4 * plan.S).plus(key, 4), bits)

        score(keys, queries, w, place, bounds, out, scales)

    def _weighted_sums(self, dots: list[ir.Value], weights: list[ir.Value]) -> list[list[Any]]:
        """Sums of weight x 2 relu(dot) over the lane's columns: [query of the part][upper or lower row]."""
        sums: list[list[Any]] = [[None, None] for _ in range(self.plan.queries // PARTS)]
        for i, (eight, half, c) in enumerate(np.ndindex(len(dots) // 4, 2, 2)):
            query = eight * 8 // self.plan.n_heads
            sums[query][half] = tc.add_relu(dots[i], tc.lane_of(weights[eight], c), sums[query][half])
        return sums

    def _multiply(self, keys: ir.Value, queries: ir.Value) -> Iterator[list[ir.Value]]:
        """The dot products of 64 keys with COLUMNS / PARTS heads at a time, as registers in wgmma's order."""
        row_bytes = WIDTH * self.plan.itemsize
        warpgroup = tc.thread_index() >> 7
        keys_at = tc.shared_address(keys) + warpgroup * (64 * row_bytes)
        queries_at = tc.shared_address(queries)
        width = COLUMNS // PARTS
        n = width // 2  # registers of a part
        kind, depth, flags = ("e4m3", 32, "") if self.plan.itemsize == 1 else ("bf16", 16, ", 0, 0")
        f32 = ir.F32Type.get()
        _turn("bar.sync", warpgroup)
        issued = []
        for part in range(PARTS):
            a = _descriptor(keys_at, 8 * row_bytes)
            b = _descriptor(queries_at + part * width * row_bytes, 8 * row_bytes)
            registers = ", ".join(f"${i}" for i in range(n))
            text = "{ .reg .pred p, q; .reg .b64 a, b; .reg .b32 one; mov.b32 one, 1;"
            text += "setp.eq.u32 p, one, 1; setp.ne.u32 q, one, 1; wgmma.fence.sync.aligned;"
            for offset in range(0, row_bytes, 32):
                # 32 bytes further on in a swizzled row of 128; the next 128 bytes are one tile of eight rows away
                step = (offset % 128 + offset // 128 * 1024) >> 4
                text += (
                    f"add.s64 a, ${n}, {step}; add.s64 b, ${n + 1}, {step};"
                    f"wgmma.mma_async.sync.aligned.m64n{width}k{depth}.f32.{kind}.{kind} "
                    f"{{{registers}}}, a, b, {'p' if offset else 'q'}, 1, 1{flags};"
                )
            text += "wgmma.commit_group.sync.aligned; }"
            issued.append(tc.ptx(text, a, b, returns=[f32] * n))
        for part, values in enumerate(issued):
            values = _wait(values, PARTS - 1 - part)
            if part == 0:
                _turn("bar.arrive", Word(1) - warpgroup)
            yield values

    def fill(self, out, sequence, group, begin, end):
        plan = self.plan

        @plgpu.inline_mgpu(arg_types=(_SPLAT,) * 4 + (plgpu.RefType(),))
        def fill(ctx, sequence, group, begin, end, out):
            del ctx
            sequence, group, begin, end = (Word(*mosaic.registers(x)) for x in (sequence, group, begin, end))
            thread = tc.thread_index() & 127
            width = 4 if plan.S % 4 == 0 else 1  # words per store: rows begin on 16-byte boundaries, or not
            minus_infinity = Word(NEG_INF_BITS)

            def row(t: Word, _: list[Word]) -> list[Word]:
                row_at = tc.global_address(out).plus(sequence * plan.T + t, 4 * plan.S)

                def store(s: Word, _: list[Word]) -> list[Word]:
                    if width == 4:
                        tc.store_global_x4(row_at.plus(s, 4), [minus_infinity] * 4)
                    else:
                        tc.store_global(row_at.plus(s, 4), minus_infinity)
                    return []

                tc.loop(begin + thread * width, end, 128 * width, [], store)
                return []

            t = group * plan.queries
            tc.loop(t, (t + plan.queries).minimum(plan.T), 1, [], row)

        fill(sequence, group, begin, end, out)


class Interpreted:
    def __init__(self, plan: Plan):
        self.plan = plan

    def give_first_turn(self, warpgroup):
        pass

    def take_last_turn(self, warpgroup):
        pass

    def score(self, inputs, out, keys, queries, w, place):
        plan, warpgroup = self.plan, lax.axis_index("warpgroup")

        def accumulate(acc):
            plgpu.wgmma(acc, keys.at[pl.ds(warpgroup * 64, 64)], queries.transpose((1, 0)))
            return acc[...]

        dots = pl.run_scoped(accumulate, plgpu.ACC((64, COLUMNS), jnp.float32))
        sequence, group, key_block = place
        weighted = ((dots + jnp.abs(dots)) * w).reshape(64, plan.queries, plan.n_heads).sum(axis=2)
        for key in range(64):
            for query in range(plan.queries):
                s, t = key_block * BLOCK + warpgroup * 64 + key, group * plan.queries + query

                @pl.when((s < plan.S) & (t < plan.T))
                def _store(key=key, query=query, s=s, t=t):
                    score = weighted[key, query] * (
                        1.0 if inputs.k_scale is None else inputs.k_scale[sequence, s]
                    )
                    visible = (inputs.key_start[sequence, t] <= s) & (s < inputs.key_stop[sequence, t])
                    out[sequence, t, s] = jnp.where(visible, score, -jnp.inf)

    def fill(self, out, sequence, group, begin, end):
        for query in range(self.plan.queries):
            t = group * self.plan.queries + query

            def write(s, _, t=t):
                @pl.when(t < self.plan.T)
                def _store():
                    out[sequence, t, s] = -jnp.inf

            lax.fori_loop(begin, end, write, None)


def _turn(instruction: str, warpgroup: Word) -> None:
    """bar.sync or bar.arrive on the barrier that gives ``warpgroup`` its turn. Mosaic uses barriers 0 to 8."""
    tc.ptx(f"{instruction} $0, {CONSUMERS * 128};", (warpgroup + 9).ir)


def _once(warpgroup, which: int, instruction: str, turn: int) -> None:
    """In warpgroup ``which``: the instruction on the barrier of a turn."""

    @pl.when(warpgroup == which)
    def _():
        @plgpu.inline_mgpu()
        def act(ctx):
            del ctx
            _turn(instruction, Word(turn))

        act()


def _wait(values: list[ir.Value], pending: int) -> list[ir.Value]:
    """The registers of a wgmma once at most ``pending`` later groups are still running."""
    tied = ",".join([*["=f"] * len(values), *map(str, range(len(values)))])
    return tc.ptx_in_place(f"wgmma.wait_group.sync.aligned {pending};", values, tied)


def _descriptor(address: Word, stride: int) -> ir.Value:
    """wgmma's descriptor of rows of 128 swizzled bytes, groups of eight rows ``stride`` bytes apart."""
    fixed = 1 << 62 | (stride >> 4) << 32 | 1 << 16
    start = arith.extui(tc.i64(), ((address & 0x3FFFF) >> 4).ir)
    return arith.ori(start, arith.constant(tc.i64(), ir.IntegerAttr.get(tc.i64(), fixed)))


def _at(ref: ir.Value, row: Word, width: int, column: Word) -> tc.Address:
    return tc.global_address(ref).plus(row, 4 * width).plus(column, 4)


def _halve(x: ir.Value, y: ir.Value, lane: Word, distance: int) -> ir.Value:
    """The sum over two lanes that differ in bit ``distance``: of x where the bit is 0, of y where it is 1."""
    upper = (lane & distance) > 0
    return tc.add(tc.select_float(upper, y, x), tc.exchange(tc.select_float(upper, x, y), distance))
