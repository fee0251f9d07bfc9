"""select_topk on Hopper: one pass over the row, candidates kept in shared memory, radix select among them.

A team of threads serves one row after another. Scores become order-preserving 32-bit keys. The team reads
the row tile by tile and appends, in index order, every key above the current threshold to a buffer in
shared memory. When the next tile would not fit, a radix select over the buffer finds its k-th largest key
exactly, drops the rest (of equal keys the later ones) and raises the threshold: what does not beat k known
keys is never stored. The buffer holds k + one tile of keys or more, so for scores in random order a row of
128K keys needs two such cuts, and a row of any length is read from device memory once. The result does not
depend on timing: appends and cuts keep index order.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.hopper import device
from pallas_kernels.hopper import thread_code as tc
from pallas_kernels.hopper.mosaic import plgpu
from pallas_kernels.hopper.thread_code import Word

MAX_K = 4096  # two teams of a block hold k + one tile of keys and indices each in shared memory
MAX_THREADS = 1024  # of a block; caps a thread at 64 registers
BINS = 2048
NEG_INF_KEY = 0x007FFFFF  # key_of(-inf): no real candidate is at or below it


def select_topk(
    scores: Float[Array, "B T S"],
    k: int,
    key_start: Int[Array, "B T"] | None,
    key_stop: Int[Array, "B T"] | None,
) -> Int[Array, "B T K"]:
    """See ``pallas_kernels.select_topk``.

    Raises:
      NotImplementedError: no Hopper GPU, scores not float32, k > MAX_K, or rows of 2**29 keys or more.
    """
    B, T, S = scores.shape
    if scores.dtype != jnp.float32:
        raise NotImplementedError(f"the kernel reads float32 scores, got {scores.dtype}")
    if k > MAX_K:
        raise NotImplementedError(f"the kernel keeps at most {MAX_K} keys per query, got {k=}")
    if S >= 2**29:
        raise NotImplementedError(f"the kernel addresses rows below 2**29 keys, got {S=}")
    device.require_hopper()
    if B * T * S == 0:
        return jnp.full((B, T, k), -1, jnp.int32)
    scores = lax.stop_gradient(scores)
    bounds = () if key_start is None or key_stop is None else (key_start.reshape(-1), key_stop.reshape(-1))
    n_blocks = device.n_multiprocessors()
    # A row to itself has the lower latency, two at a time the higher throughput.
    shape = ONE_ROW if B * T <= n_blocks else TWO_ROWS
    kernel = _kernel(B * T, S, k, bool(bounds), shape, n_blocks)
    scores = jnp.pad(scores.reshape(-1), (0, -scores.size % 4))  # the kernel reads vectors of four
    return kernel(scores, *bounds).reshape(B, T, k)


@dataclasses.dataclass(frozen=True)
class _Shape:
    """How the threads of a block are used: ``teams`` rows at a time, each by ``threads`` threads."""

    teams: int
    threads: int
    vectors: int = 2  # 16-byte loads per thread and tile
    spare: int = 0  # buffer entries per thread beyond what k and one tile need

    @property
    def tile(self) -> int:
        return self.threads * self.vectors * 4

    def per_thread(self, k: int) -> int:
        """Consecutive buffer entries that a thread owns; odd, so that the 32 lanes hit 32 banks."""
        return (-(-(k + self.tile) // self.threads) + self.spare) | 1


ONE_ROW = _Shape(teams=1, threads=1024)
TWO_ROWS = _Shape(teams=2, threads=512, spare=4)  # the buffer then holds a row of 8K keys: one cut


@functools.cache
def _kernel(
    rows: int, S: int, k: int, has_bounds: bool, shape: _Shape, n_blocks: int
) -> Callable[..., jax.Array]:
    teams, capacity = shape.teams, shape.per_thread(k) * shape.threads
    n_blocks = min(n_blocks, -(-rows // teams))

    def body(scores, *refs):
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * (1 + len(refs)))
        def select(ctx, scores, *refs):
            del ctx
            *bounds, out, buffer, histogram, scratch = refs
            _Team(scores, bounds, out, buffer, histogram, scratch, rows, S, k, shape, n_blocks).select()

        select(scores, *refs)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows, k), jnp.int32),
        scratch_types=[
            plgpu.SMEM((teams * 2 * capacity,), jnp.int32),  # keys, then their indices
            plgpu.SMEM((teams * BINS,), jnp.int32),
            plgpu.SMEM((teams * 5 * 32,), jnp.int32),  # five rows of one word per warp, see _Team
        ],
        grid=(n_blocks,),
        grid_names=("block",),
        num_threads=teams * shape.threads // 128,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )


class _Team:
    """What one thread of a team does. A Word is in a register; names ending in ``_at`` are addresses."""

    def __init__(self, scores, bounds, out, buffer, histogram, scratch, rows, S, k, shape, n_blocks):
        self.scores, self.bounds, self.out = scores, bounds, out
        self.rows, self.S, self.k, self.n_teams = rows, S, k, shape.teams * n_blocks
        self.threads, self.vectors, self.tile = shape.threads, shape.vectors, shape.tile
        self.per_thread = shape.per_thread(k)
        self.capacity = self.per_thread * self.threads
        self.team = tc.thread_index() >> (self.threads.bit_length() - 1)
        self.thread = tc.thread_index() & (self.threads - 1)
        self.lane, self.warp = self.thread & 31, self.thread >> 5
        self.first_row = tc.block_index() * shape.teams + self.team
        self.buffer_at = tc.shared_address(buffer) + self.team * (8 * self.capacity)
        self.histogram_at = tc.shared_address(histogram) + self.team * (4 * BINS)
        self.scratch_at = tc.shared_address(scratch) + self.team * (4 * 5 * 32)

    def _barrier(self) -> None:
        """Waits for the team. Barrier 0 is the block's and the next eight are Mosaic's, one per warpgroup."""
        tc.named_barrier(self.team + 9, self.threads)

    def select(self) -> None:
        """Writes this team's rows of the result."""
        with tc.when(self.thread < BINS // 4):
            tc.store_shared_x4(self.histogram_at + (self.thread << 4), [0, 0, 0, 0])

        def one_row(i: Word, _: list[Word]) -> list[Word]:
            self._select_row(
                Word(self.rows - 1) - i
            )  # the later rows of a causal mask are longer: start with them
            return []

        tc.loop(self.first_row, self.rows, self.n_teams, [], one_row)

    def _select_row(self, row: Word) -> None:
        if self.bounds:
            start, stop = (tc.load_global(tc.global_address(ref).plus(row, 4)) for ref in self.bounds)
            start = start.signed_maximum(0).signed_minimum(self.S)
            visible = (stop.signed_minimum(self.S) - start).signed_maximum(0)
        else:
            start, visible = Word(0), Word(self.S)
        # A row starts anywhere; reading starts at the 16-byte boundary at or before its first visible key.
        # Each vector read holds a visible key, so no read leaves the array.
        first_at = tc.global_address(self.scores).plus(row, 4 * self.S).plus(start, 4)
        self.lead = first_at.low() >> 2 & 3
        self.first_vector_at = first_at.plus(Word(0) - self.lead, 4)
        self.first_index = start - self.lead
        self.end = (
            self.lead + visible
        )  # positions count from first_vector_at; visible ones are lead .. end - 1
        (count,) = tc.branch(visible.equals(0), lambda: [Word(0)], lambda: [self._scan()], 1)
        out_at = tc.global_address(self.out).plus(row, 4 * self.k)

        def write(i: Word, _: list[Word]) -> list[Word]:
            index = tc.load_shared(self.buffer_at + (i << 2), 4 * self.capacity)
            tc.store_global(out_at.plus(i, 4), (i < count).select(index, -1))
            return []

        tc.loop(self.thread, self.k, self.threads, [], write)

    def _scan(self) -> Word:
        """Leaves the chosen indices in the buffer, in order; returns how many there are."""
        n_tiles = (self.end + (self.tile - 1)) >> (self.tile.bit_length() - 1)

        def tile(carry: list[Word]) -> list[Word]:
            i, threshold, count, *raw = carry
            ahead = self._load(i + 1)
            keys = self._to_keys(raw, i)
            is_last = i.equals(n_tiles)  # one round beyond the last tile, for the last cut

            def nothing() -> list[Word]:
                self._barrier()
                return [Word(0)] * 4

            counted = tc.branch(is_last, nothing, lambda: self._count(keys, threshold, i & 1), 4)
            total, before, own, totals = counted

            def cut() -> list[Word]:  # then try this tile again: its scores need not stay in registers
                return [i + is_last.word(), self._cut(count), Word(self.k), *self._load(i)]

            def append() -> list[Word]:
                self._append(keys, threshold, count + before, own, totals, i)
                return [i + 1, threshold, count + total, *ahead]

            must_cut = ((count + total > self.capacity) | is_last) & (count > self.k)
            return tc.branch(must_cut, cut, append, len(carry))

        carry = [Word(0), Word(NEG_INF_KEY), Word(0), *self._load(Word(0))]
        _, _, count, *_ = tc.while_loop(lambda carry: carry[0] <= n_tiles, carry, tile)
        self._barrier()
        return count

    # A tile: a warp reads ``vectors`` x 32 consecutive vectors, so order is warp, vector, lane, component.

    def _vector(self, i: Word, j: int) -> Word:
        return i * (self.threads * self.vectors) + (self.warp * (32 * self.vectors) + self.lane + 32 * j)

    def _load(self, i: Word) -> list[Word]:
        """The bits of this thread's scores in tile i. Beyond the row it reads the last vector again."""
        last = self.end - 1 >> 2
        values = []
        for j in range(self.vectors):
            values += tc.load_global_x4(self.first_vector_at.plus(self._vector(i, j).minimum(last), 16))
        return values

    def _to_keys(self, raw: list[Word], i: Word) -> list[Word]:
        """Order-preserving unsigned keys; 0 for what is not visible."""
        keys = [_key_of(bits) for bits in raw]

        def mask() -> list[Word]:
            positions = [(self._vector(i, j) << 2) + c for j in range(self.vectors) for c in range(4)]
            return [
                (position - self.lead < self.end - self.lead).select(key, 0)
                for position, key in zip(positions, keys, strict=True)
            ]

        at_an_end = i.equals(0) | ((i + 1) * self.tile > self.end)
        return tc.branch(at_an_end, mask, lambda: keys, len(keys))

    def _count(self, keys: list[Word], threshold: Word, slot: Word) -> list[Word]:
        """Keys above the threshold: [in the tile, in warps before, in lanes before, in the warp].

        The last two by vector, one byte each.
        """
        packed = Word(0)
        for j in range(self.vectors):
            for key in keys[4 * j : 4 * j + 4]:
                packed = packed + ((key > threshold).word() << (8 * j))
        inclusive = tc.warp_prefix_sum(packed, self.lane)
        totals = tc.shuffle_from(inclusive, 31)
        pairs = (totals & 0x00FF00FF) + (totals >> 8 & 0x00FF00FF)
        before, total = self._over_warps((pairs + (pairs >> 16)) & 0xFFFF, slot)
        return [total, before, inclusive - packed, totals]

    def _over_warps(self, value: Word, slot: Word) -> tuple[Word, Word]:
        """The sum of a warp's value over the warps before, and over all. Holds one block barrier."""
        row_at = self.scratch_at + (slot << 7)
        with tc.when(self.lane.equals(0)):
            tc.store_shared(row_at + (self.warp << 2), value)
        self._barrier()
        values = (self.lane < self.threads // 32).select(tc.load_shared(row_at + (self.lane << 2)), 0)
        return tc.warp_sum((self.lane < self.warp).select(values, 0)), tc.warp_sum(values)

    def _append(
        self, keys: list[Word], threshold: Word, place: Word, own: Word, totals: Word, i: Word
    ) -> None:
        """Stores keys above the threshold and their indices from entry ``place`` on."""
        with tc.when(totals > 0):
            for j in range(self.vectors):
                entry_at = self.buffer_at + ((place + (own >> 8 * j & 0xFF)) << 2)
                place = place + (totals >> 8 * j & 0xFF)
                index = self.first_index + (self._vector(i, j) << 2)
                for c in range(4):
                    entry_at = self._store_above(keys[4 * j + c], threshold, index + c, entry_at)

    def _store_above(self, key: Word, threshold: Word, index: Word, entry_at: Word) -> Word:
        text = f"""{{ .reg .pred p; .reg .b32 next;
            setp.gt.u32 p, $2, $3;
            @p st.shared.b32 [$1], $2;
            @p st.shared.b32 [$1+{4 * self.capacity}], $4;
            add.u32 next, $1, 4;
            selp.b32 $0, next, $1, p; }}"""
        return Word(tc.ptx(text, entry_at.ir, key.ir, threshold.ir, index.ir, returns=tc.i32()))

    # A cut: exact radix select of the k largest buffer entries, ties by the lowest index.

    def _cut(self, count: Word) -> Word:
        """Compacts the buffer from ``count`` entries to its k best, in order; returns the new threshold."""
        first = self.thread * self.per_thread
        own_at = self.buffer_at + (first << 2)
        keys = [(first + e < count).select(tc.load_shared(own_at, 4 * e), 0) for e in range(self.per_thread)]

        def done(lower_bound: Word) -> list[Word]:  # the whole bin is chosen: no ties to break
            return [lower_bound - 1, Word(0)]

        # 11 + 11 + 10 bits. Keys are never 0, so the first pass skips the entries that are not there.
        top, need, size = self._bin_of_rank([key >> 21 for key in keys], keys, None, Word(self.k))

        def second() -> list[Word]:
            middle, need2, size2 = self._bin_of_rank(
                [key >> 10 & 0x7FF for key in keys], [key >> 21 for key in keys], top, need
            )
            prefix = top << 11 | middle

            def third() -> list[Word]:
                low, need3, _ = self._bin_of_rank(
                    [key & 0x3FF for key in keys], [key >> 10 for key in keys], prefix, need2
                )
                return [prefix << 10 | low, need3]

            return tc.branch(need2.equals(size2), lambda: done(prefix << 10), third, 2)

        threshold, ties = tc.branch(need.equals(size), lambda: done(top << 21), second, 2)
        self._compact(keys, own_at, threshold, ties)
        return threshold

    def _bin_of_rank(
        self, bins: list[Word], prefixes: list[Word], prefix: Word | None, rank: Word
    ) -> tuple[Word, Word, Word]:
        """Among entries with this prefix: the bin of the rank-th largest, its rank inside, the bin's size."""
        test = "setp.ne.u32 p, $1, 0;" if prefix is None else "setp.eq.u32 p, $1, $2;"
        for which, own_prefix in zip(bins, prefixes, strict=True):
            operands = [self.histogram_at + (which << 2), own_prefix] + ([] if prefix is None else [prefix])
            tc.ptx(f"{{ .reg .pred p; {test} @p red.shared.add.u32 [$0], 1; }}", *(x.ir for x in operands))
        self._barrier()
        # Thread 0 owns the four highest bins. It leaves them zero for the next pass.
        owns = self.thread < BINS // 4
        highest = Word(BINS - 4) - (self.thread << 2)
        bins_at = self.histogram_at + (highest << 2)

        def take() -> list[Word]:
            sizes = tc.load_shared_x4(bins_at)
            tc.store_shared_x4(bins_at, [0, 0, 0, 0])
            return sizes

        sizes = tc.branch(owns, take, lambda: [Word(0)] * 4, 4)
        own = sizes[0] + sizes[1] + sizes[2] + sizes[3]
        inclusive = tc.warp_prefix_sum(own, self.lane)
        before, _ = self._over_warps(tc.shuffle_from(inclusive, 31), Word(3))
        above = before + inclusive - own
        result_at = self.scratch_at + 4 * 128
        with tc.when((above < rank) & (rank <= above + own)):
            bin_, rank_inside, size = highest, rank - above - sizes[3] - sizes[2] - sizes[1], sizes[0]
            left = rank - above
            for c in (1, 2, 3):
                higher = Word(0)
                for d in range(c + 1, 4):
                    higher = higher + sizes[d]
                here = left <= higher + sizes[c]
                bin_, size = here.select(highest + c, bin_), here.select(sizes[c], size)
                rank_inside = here.select(left - higher, rank_inside)
            for offset, value in enumerate((bin_, rank_inside, size)):
                tc.store_shared(result_at, value, 4 * offset)
        self._barrier()
        found, rank_inside, size, _ = tc.load_shared_x4(result_at)
        return found, rank_inside, size

    def _compact(self, keys: list[Word], own_at: Word, threshold: Word, ties: Word) -> None:
        """Moves the entries above the threshold, and the first ``ties`` equal to it, to the front."""
        packed = Word(0)  # equal entries in the upper half
        for key in keys:
            packed = packed + (key > threshold).word() + (key.equals(threshold).word() << 16)
        inclusive = tc.warp_prefix_sum(packed, self.lane)
        before, _ = self._over_warps(
            tc.shuffle_from(inclusive, 31), Word(3)
        )  # every thread has read its keys
        before = before + inclusive - packed
        tied = (before >> 16).minimum(ties)
        place_at = self.buffer_at + ((before & 0xFFFF) + tied << 2)
        entry_at, chosen = place_at, Word(0)
        text = """{ .reg .pred p, q; .reg .b32 next, bits;
            setp.eq.u32 q, $4, $5;
            setp.lt.and.u32 q, $6, $7, q;
            setp.gt.or.u32 p, $4, $5, q;
            @p st.shared.b32 [$3], $4;
            or.b32 bits, $8, BIT;
            selp.b32 bits, bits, $8, p;
            add.u32 next, $6, 1;
            selp.b32 $1, next, $6, q;
            add.u32 next, $3, 4;
            selp.b32 $0, next, $3, p;
            mov.b32 $2, bits; }"""
        for e, key in enumerate(keys):
            operands = (entry_at, key, threshold, tied, ties, chosen)
            new = tc.ptx(text.replace("BIT", str(1 << e)), *(x.ir for x in operands), returns=[tc.i32()] * 3)
            entry_at, tied, chosen = (Word(value) for value in new)
        # The indices follow when the keys have left the registers.
        indices = [tc.load_shared(own_at, 4 * (self.capacity + e)) for e in range(self.per_thread)]
        self._barrier()
        text = f"""{{ .reg .pred p; .reg .b32 next, bit;
            and.b32 bit, $3, BIT;
            setp.ne.u32 p, bit, 0;
            @p st.shared.b32 [$1+{4 * self.capacity}], $2;
            add.u32 next, $1, 4;
            selp.b32 $0, next, $1, p; }}"""
        for e, index in enumerate(indices):
            operands = (place_at, index, chosen)
            place_at = Word(
                tc.ptx(text.replace("BIT", str(1 << e)), *(x.ir for x in operands), returns=tc.i32())
            )


def _key_of(bits: Word) -> Word:
    """Unsigned integers in the order of the floats: -0.0 equals 0.0, every NaN is the largest key."""
    text = """{ .reg .b32 x, m;
        add.rn.f32 x, $1, 0f00000000;
        shr.s32 m, x, 31;
        or.b32 m, m, 0x80000000;
        xor.b32 $0, x, m; }"""  # the sum turns -0.0 into 0.0 and every NaN into 0x7fffffff
    return Word(tc.ptx(text, bits.ir, returns=tc.i32(), has_side_effects=False))
