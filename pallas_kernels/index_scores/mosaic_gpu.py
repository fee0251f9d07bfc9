"""index_scores on Hopper: keys x query heads on the tensor cores, ReLU and weighted sum in registers.

A persistent block takes one piece of work after another: the COLUMNS // I queries of a tile against one
chunk of keys. A producer warpgroup brings the tile's queries, its weights and the keys with TMA, in rings
of shared memory, and writes -inf over keys that no query of the tile may see. Two consumer warpgroups each
multiply 64 keys by all heads of all queries of the tile in two wgmma chains (64 x 128) and reduce one in
registers while the next one, or the other warpgroup's, is multiplied. Per dot product the reduction costs
two instructions: relu(x) = (x + |x|) / 2, where |x| is a free operand modifier and the half lies in the
weights.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.hopper import device, mosaic
from pallas_kernels.hopper import thread_code as tc
from pallas_kernels.hopper.mosaic import arith, ir, pl, plgpu
from pallas_kernels.hopper.thread_code import Word
from pallas_kernels.index_scores import xla

WIDTH = 128  # index_head_dim
COLUMNS = 256  # query heads of a tile: the widest wgmma
BLOCK = 128  # keys of a pipeline stage, 64 per consumer warpgroup
CONSUMERS = 2
PARTS = 2  # wgmma chains of a consumer per stage
# Registers of a thread. The launch gives 3 x 128 threads 168 each, which is what the three together may hold.
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 232, 40
NEG_INF_BITS = 0xFF800000


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Sizes of one compiled kernel."""

    B: int
    T: int
    S: int
    n_heads: int  # index heads, after padding to a divisor of COLUMNS
    itemsize: int  # bytes of an element of q and k
    has_scale: bool
    n_blocks: int  # persistent thread blocks
    chunk: int = 32  # key blocks of a piece of work
    interpret: bool = False

    @property
    def queries(self) -> int:  # of a tile
        return COLUMNS // self.n_heads

    @property
    def tiles(self) -> int:  # query tiles of a sequence
        return -(-self.T // self.queries)

    @property
    def chunks(self) -> int:
        return -(-self.S // (self.chunk * BLOCK))

    @property
    def stages(self) -> int:
        return 8 if self.itemsize == 1 else 3


def index_scores(
    q: Float[Array, "B T I J"],
    k: Float[Array, "B S J"],
    weights: Float[Array, "B T I"],
    key_start: Int[Array, "B T"],
    key_stop: Int[Array, "B T"],
    k_scale: Float[Array, "B S"] | None,
) -> Float[Array, "B T S"]:
    """See ``pallas_kernels.index_scores``. Gradients are those of ``xla``.

    Raises:
      NotImplementedError: no Hopper GPU, a dtype other than bfloat16 and float8_e4m3fn, J != 128 or I > 64.
    """
    check(*q.shape[2:], q.dtype)
    return _scores(q, k, weights, key_start, key_stop, k_scale)


def check(I: int, J: int, dtype: jnp.dtype) -> None:
    """Raises NotImplementedError if no queries of these sizes and dtype can be served here."""
    if dtype not in (jnp.bfloat16, jnp.float8_e4m3fn):
        raise NotImplementedError(f"the kernel multiplies bfloat16 or float8_e4m3fn, got {dtype}")
    if J != WIDTH or I > 64:
        raise NotImplementedError(
            f"the kernel needs index_head_dim {WIDTH} and at most 64 heads, got {J=}, {I=}"
        )
    device.require_hopper()


@jax.custom_vjp
def _scores(q, k, weights, key_start, key_stop, k_scale):
    return _run(q, k, weights, key_start, key_stop, k_scale)


def _forward(*inputs):
    return _scores(*inputs), inputs


def _backward(inputs, cotangent):
    q, k, weights, key_start, key_stop, k_scale = inputs

    def reference(q, k, weights, k_scale):
        return xla.index_scores(q, k, weights, key_start, key_stop, k_scale)

    dq, dk, dweights, dk_scale = jax.vjp(reference, q, k, weights, k_scale)[1](cotangent)
    no_gradient = np.zeros(key_start.shape, jax.dtypes.float0)
    return dq, dk, dweights, no_gradient, no_gradient, dk_scale


_scores.defvjp(_forward, _backward)


def _run(q, k, weights, key_start, key_stop, k_scale, **options: Any) -> jax.Array:
    """The kernel on padded inputs: heads to a divisor of COLUMNS, queries to tiles, keys to one block."""
    B, T, I, J = q.shape
    S = k.shape[1]
    if B * T * S == 0:
        return jnp.zeros((B, T, S), jnp.float32)
    n_heads = max(8, 1 << (I - 1).bit_length())
    options.setdefault("n_blocks", device.n_multiprocessors())
    plan = _Plan(B, T, S, n_heads, q.dtype.itemsize, k_scale is not None, **options)
    rows = plan.tiles * plan.queries
    q = _pad(q, (B, rows, n_heads, J)).reshape(B, rows * n_heads, J)
    weights = _pad(weights.astype(jnp.float32) * 0.5, (B, rows, n_heads)).reshape(B, rows * n_heads)
    k = _pad(k, (B, max(-(-S // 8) * 8, BLOCK), J))  # TMA needs whole groups of eight rows
    key_start, key_stop = jnp.clip(key_start, 0, S), jnp.clip(key_stop, 0, S)
    is_empty = key_start >= key_stop
    tiled = lambda x: _pad(x, (B, rows)).reshape(B * plan.tiles, plan.queries)  # noqa: E731
    # What any query of the tile may see. Padding queries are [S, 0).
    first = S - tiled(S - jnp.where(is_empty, S, key_start)).max(axis=1)
    last = tiled(jnp.where(is_empty, 0, key_stop)).max(axis=1)
    scales = () if k_scale is None else (k_scale.astype(jnp.float32),)
    return _kernel(plan)(q, k, weights, key_start, key_stop, first, last, *scales)


def _pad(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    if x.shape == shape:
        return x
    return jnp.pad(x, [(0, new - old) for old, new in zip(x.shape, shape, strict=True)])


@functools.cache
def _kernel(plan: _Plan) -> Callable[..., jax.Array]:
    dtype = jnp.float8_e4m3fn if plan.itemsize == 1 else jnp.bfloat16
    layout = (plgpu.TilingTransform((8, 128 // plan.itemsize)), plgpu.SwizzleTransform(128))
    tiles = plan.B * plan.tiles
    pieces = tiles * plan.chunks
    spread = _spread(tiles)

    def body(q, k, weights, start, stop, first, last, *refs):
        *scales, out, q_ring, k_ring, w_ring, q_full, q_free, k_full, k_free = refs
        warpgroup = lax.axis_index("warpgroup")
        block = lax.axis_index("block")
        n_pieces = (pieces - block + plan.n_blocks - 1) // plan.n_blocks

        def piece(n):
            """(sequence, its tile, chunk, first and last key block) of this block's n-th piece."""
            i = block + n * plan.n_blocks
            tile, chunk = lax.rem(lax.rem(i, tiles) * spread, tiles), lax.div(i, tiles)
            low = jnp.maximum(lax.div(first[tile], BLOCK), chunk * plan.chunk)
            high = jnp.minimum(lax.div(last[tile] + BLOCK - 1, BLOCK), (chunk + 1) * plan.chunk)
            low = jnp.minimum(low, (chunk + 1) * plan.chunk)
            return lax.div(tile, plan.tiles), lax.rem(tile, plan.tiles), chunk, low, jnp.maximum(low, high)

        @pl.when(warpgroup < CONSUMERS)
        def _consume():
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")

            def one_piece(n, carry):
                sequence, tile, _, low, high = piece(n)

                def compute(carry):
                    q_count, k_count = carry
                    q_slot = lax.rem(q_count, 2)
                    plgpu.barrier_wait(q_full.at[q_slot])
                    w = plgpu.load(w_ring.at[q_slot], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)

                    def one_block(b, k_count):
                        slot = lax.rem(k_count, plan.stages)
                        plgpu.barrier_wait(k_full.at[slot])
                        places = (sequence, tile, b)
                        _score_block(
                            plan,
                            layout,
                            warpgroup,
                            k_ring.at[slot],
                            q_ring.at[q_slot],
                            w,
                            start,
                            stop,
                            scales,
                            out,
                            places,
                        )
                        plgpu.barrier_arrive(k_free.at[slot])
                        return k_count + 1

                    k_count = lax.fori_loop(low, high, one_block, k_count)
                    plgpu.barrier_arrive(q_free.at[q_slot])
                    return q_count + 1, k_count

                return lax.cond(low < high, compute, lambda carry: carry, carry)

            _pass_turn(plan, warpgroup, 1)  # the first turn is warpgroup 0's
            lax.fori_loop(0, n_pieces, one_piece, (jnp.int32(0), jnp.int32(0)))
            _take_turn(plan, warpgroup, 0)

        @pl.when(warpgroup == CONSUMERS)
        def _produce():
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

            def one_piece(n, carry):
                sequence, tile, chunk, low, high = piece(n)

                def load(carry):
                    q_count, k_count = carry
                    q_slot = lax.rem(q_count, 2)

                    @pl.when(q_count >= 2)
                    def _wait():
                        plgpu.barrier_wait(q_free.at[q_slot])

                    rows = pl.ds(tile * COLUMNS, COLUMNS)
                    plgpu.copy_gmem_to_smem(q.at[sequence, rows], q_ring.at[q_slot], q_full.at[q_slot])
                    plgpu.copy_gmem_to_smem(weights.at[sequence, rows], w_ring.at[q_slot], q_full.at[q_slot])

                    def one_block(b, k_count):
                        slot = lax.rem(k_count, plan.stages)

                        @pl.when(k_count >= plan.stages)
                        def _wait():
                            plgpu.barrier_wait(k_free.at[slot])

                        keys = pl.ds(b * BLOCK, BLOCK)
                        plgpu.copy_gmem_to_smem(k.at[sequence, keys], k_ring.at[slot], k_full.at[slot])
                        return k_count + 1

                    return q_count + 1, lax.fori_loop(low, high, one_block, k_count)

                carry = lax.cond(low < high, load, lambda carry: carry, carry)
                chunk_stop = jnp.minimum((chunk + 1) * (plan.chunk * BLOCK), plan.S)
                _fill(
                    plan,
                    out,
                    sequence,
                    tile,
                    chunk * (plan.chunk * BLOCK),
                    jnp.minimum(low * BLOCK, chunk_stop),
                )
                _fill(plan, out, sequence, tile, jnp.minimum(high * BLOCK, chunk_stop), chunk_stop)
                return carry

            q_count, k_count = lax.fori_loop(0, n_pieces, one_piece, (jnp.int32(0), jnp.int32(0)))
            for count, size, free in (
                (q_count, 2, q_free),
                (k_count, plan.stages, k_free),
            ):  # leave none pending

                def drain(i, _, size=size, free=free):
                    plgpu.barrier_wait(free.at[lax.rem(i, size)])

                lax.fori_loop(jnp.maximum(count - size, 0), count, drain, None)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((plan.B, plan.T, plan.S), jnp.float32),
        scratch_types=[
            plgpu.SMEM((2, COLUMNS, WIDTH), dtype, transforms=layout),
            plgpu.SMEM((plan.stages, BLOCK, WIDTH), dtype, transforms=layout),
            plgpu.SMEM((2, COLUMNS), jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=2),  # queries and weights
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=2),
            plgpu.Barrier(num_barriers=plan.stages),
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=plan.stages),
        ],
        grid=(plan.n_blocks,),
        grid_names=("block",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )


def _spread(tiles: int) -> int:
    """A factor that permutes the tiles so that neighbours in time are far apart in the sequence.

    Under a causal mask a tile has either keys to multiply or -inf to write; mixed in time, the two overlap.
    """
    factor = max(int(tiles * 0.618), 1)
    while math.gcd(factor, tiles) > 1:
        factor += 1
    return factor if factor * tiles < 2**31 else 1


def _turn(instruction: str, warpgroup: Word) -> None:
    """bar.sync or bar.arrive on the barrier that gives ``warpgroup`` its turn (Mosaic uses 0 to 8)."""
    tc.ptx(f"{instruction} $0, {CONSUMERS * 128};", (warpgroup + 9).ir)


def _pass_turn(plan: _Plan, warpgroup, which: int) -> None:
    """Once, in warpgroup ``which``: gives the other consumer the first turn."""
    _once(plan, warpgroup, which, "bar.arrive", 1 - which)


def _take_turn(plan: _Plan, warpgroup, which: int) -> None:
    """Once, in warpgroup ``which``: takes the turn that nobody needs any more."""
    _once(plan, warpgroup, which, "bar.sync", which)


def _once(plan: _Plan, warpgroup, which: int, instruction: str, turn: int) -> None:
    if not plan.interpret:

        @pl.when(warpgroup == which)
        def _():
            @plgpu.inline_mgpu()
            def act(ctx):
                del ctx
                _turn(instruction, Word(turn))

            act()


def _score_block(plan: _Plan, layout, warpgroup, keys, queries, w, start, stop, scales, out, places) -> None:
    """Multiplies this warpgroup's 64 keys of a stage by all heads, sums over heads and stores the scores."""
    if plan.interpret:
        _score_block_in_pallas(plan, warpgroup, keys, queries, w, start, stop, scales, out, places)
        return
    tiled, splat, ref = plgpu.RefType(layout), plgpu.Layout.WG_SPLAT, plgpu.RefType()
    arg_types = (
        tiled,
        tiled,
        plgpu.Layout.WGMMA.reduce(0),
        *[splat] * 3,
        ref,
        ref,
        ref,
        *[ref] * len(scales),
    )

    @plgpu.inline_mgpu(arg_types=arg_types)
    def score_block(ctx, keys_ref, queries_ref, w, sequence, tile, block, start, stop, out, *scales):
        del ctx
        n_queries = plan.queries
        sequence, tile, block = (Word(*mosaic.registers(x)) for x in (sequence, tile, block))
        lane, warp = tc.thread_index() & 31, tc.thread_index() >> 5  # warps 0 .. 7 of the consumers
        # A lane holds rows lane // 4 and lane // 4 + 8 of its warp's 16 and every fourth pair of columns.
        # After the sum over the four lanes of a row it holds one of the two rows and every second query.
        key = block * BLOCK + (warp << 4) + (lane >> 2) + ((lane & 2) << 2)
        safe_key = key.minimum(plan.S - 1)
        factor = tc.load_global_float(_at(scales[0], sequence, plan.S, safe_key)) if scales else None
        w_pairs = mosaic.registers(w)
        per_part = n_queries // PARTS
        for part, dots in enumerate(_multiply(plan, keys_ref, queries_ref)):
            own_queries = [
                tile * n_queries + part * per_part + 2 * i + (lane & 1) for i in range(per_part // 2)
            ]
            safe_queries = [query.minimum(plan.T - 1) for query in own_queries]
            intervals = [
                [tc.load_global(_at(x, sequence, plan.T, t)) for x in (start, stop)] for t in safe_queries
            ]
            sums: list[list] = [[None, None] for _ in range(per_part)]
            for i, (eight, half, c) in enumerate(np.ndindex(len(dots) // 4, 2, 2)):
                query = eight * 8 // plan.n_heads
                weight = tc.lane_of(w_pairs[part * len(dots) // 4 + eight], c)
                sums[query][half] = tc.add_relu(dots[i], weight, sums[query][half])
            for i, (query, (begin, end)) in enumerate(zip(own_queries, intervals, strict=True)):
                halves = [_halve(x, y, lane, 1) for x, y in zip(*sums[2 * i : 2 * i + 2], strict=True)]
                score = _halve(*halves, lane, 2)
                if factor is not None:
                    score = tc.multiply(score, factor)
                visible = (key >= begin) & (key < end)
                bits = visible.select(tc.float_bits(score), NEG_INF_BITS)
                with tc.when((key < plan.S) & (query < plan.T)):
                    row = sequence * plan.T + query
                    tc.store_global(tc.global_address(out).plus(row, 4 * plan.S).plus(key, 4), bits)

    score_block(keys, queries, w, *places, start, stop, out, *scales)


def _multiply(plan: _Plan, keys, queries) -> Iterator[list[ir.Value]]:
    """The dot products of 64 keys with COLUMNS / PARTS heads at a time, as registers in wgmma's order.

    Two warpgroups that multiply at the same time share the tensor cores and then leave them idle together.
    So they take turns. A part is reduced while the next one, already issued, is multiplied; the turn passes
    on when the first part is done, so that the other warpgroup's products are queued behind the second.
    """
    row_bytes = WIDTH * plan.itemsize
    warpgroup = tc.thread_index() >> 7
    keys_at = tc.shared_address(keys) + warpgroup * (64 * row_bytes)
    queries_at = tc.shared_address(queries)
    width = COLUMNS // PARTS
    n = width // 2  # registers of a part
    kind, depth, flags = ("e4m3", 32, "") if plan.itemsize == 1 else ("bf16", 16, ", 0, 0")
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
            # 32 bytes on inside a swizzled row of 128; the next 128 bytes lie a tile of eight rows further on
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


def _wait(values: list[ir.Value], pending: int) -> list[ir.Value]:
    """The registers of a wgmma once at most ``pending`` later groups are still running."""
    tied = ",".join([*["=f"] * len(values), *map(str, range(len(values)))])
    return tc.ptx_in_place(f"wgmma.wait_group.sync.aligned {pending};", values, tied)


def _descriptor(address: Word, stride: int) -> ir.Value:
    """wgmma's descriptor of rows of 128 swizzled bytes, groups of eight rows ``stride`` bytes apart."""
    fixed = 1 << 62 | (stride >> 4) << 32 | 1 << 16
    start = arith.extui(tc.i64(), ((address & 0x3FFFF) >> 4).ir)
    return arith.ori(start, arith.constant(tc.i64(), ir.IntegerAttr.get(tc.i64(), fixed)))


def _score_block_in_pallas(plan, warpgroup, keys, queries, w, start, stop, scales, out, places) -> None:
    """The same in Pallas alone, for the interpreter, which has no inline code."""

    def accumulate(acc):
        plgpu.wgmma(acc, keys.at[pl.ds(warpgroup * 64, 64)], queries.transpose((1, 0)))
        return acc[...]

    dots = pl.run_scoped(accumulate, plgpu.ACC((64, COLUMNS), jnp.float32))
    sequence, tile, block = places
    weighted = ((dots + jnp.abs(dots)) * w).reshape(64, plan.queries, plan.n_heads).sum(axis=2)
    for key in range(64):
        for query in range(plan.queries):
            s, t = block * BLOCK + warpgroup * 64 + key, tile * plan.queries + query

            @pl.when((s < plan.S) & (t < plan.T))
            def _store(key=key, query=query, s=s, t=t):
                score = weighted[key, query] * (scales[0][sequence, s] if scales else 1.0)
                visible = (start[sequence, t] <= s) & (s < stop[sequence, t])
                out[sequence, t, s] = jnp.where(visible, score, -jnp.inf)


def _at(ref: ir.Value, row: Word, width: int, column: Word) -> tc.Address:
    return tc.global_address(ref).plus(row, 4 * width).plus(column, 4)


def _halve(x: ir.Value, y: ir.Value, lane: Word, distance: int) -> ir.Value:
    """The sum over two lanes that differ in bit ``distance``: of x where the bit is 0, of y where it is 1."""
    upper = (lane & distance) > 0
    return tc.add(tc.select_float(upper, y, x), tc.exchange(tc.select_float(upper, x, y), distance))


def _fill(plan: _Plan, out, sequence, tile, begin, end) -> None:
    """Writes -inf for all queries of the tile over keys [begin, end); begin is a multiple of 4."""
    if plan.interpret:
        for query in range(plan.queries):
            t = tile * plan.queries + query

            def write(s, _, t=t):
                @pl.when(t < plan.T)
                def _store():
                    out[sequence, t, s] = -jnp.inf

            lax.fori_loop(begin, end, write, None)
        return

    splat = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(arg_types=(splat,) * 4 + (plgpu.RefType(),))
    def fill(ctx, sequence, tile, begin, end, out):
        del ctx
        sequence, tile, begin, end = (Word(*mosaic.registers(x)) for x in (sequence, tile, begin, end))
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

        t = tile * plan.queries
        tc.loop(t, (t + plan.queries).minimum(plan.T), 1, [], row)

    fill(sequence, tile, begin, end, out)
