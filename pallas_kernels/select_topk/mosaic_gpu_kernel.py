"""The select_topk kernel: what each thread of a block does, and its shared memory.

A team of threads serves one row after another. Scores become order-preserving 32-bit keys. The team reads the row
chunk by chunk and appends, in index order, every key above the current threshold to a buffer in shared memory. When
the next chunk would not fit, a radix select over the buffer finds its k-th largest key exactly, drops the rest (of
equal keys the later ones) and raises the threshold: what does not beat k known keys is never stored. The buffer holds
k keys plus one chunk, or more. So for scores in random order a row of 128K keys needs two such cuts, and a row of any
length is read from device memory once. The result does not depend on timing: appends and cuts keep index order.

The only barrier is the team's, the named barrier 9 + team; 0 is the block's and 1 to 8 are Mosaic's. All threads of
the team arrive and wait. It separates every write to the team's shared memory from the reads of other threads:

| array | words per team | written | read after a barrier |
|---|---|---|---|
| buffer | 2 x capacity | keys and indices, by ``_append`` and ``_compact`` | ``_cut``, and the final write to ``out`` |
| histogram | BINS, zero between passes | ``_bin_of_rank``, all threads adding | ``_bin_of_rank``, which zeroes it |
| scratch, rows 0 and 1 | 32 each | a sum per warp in ``_count``, by the parity of the chunk | ``_over_warps`` |
| scratch, row 3 | 32 | a sum per warp in ``_bin_of_rank`` and ``_compact`` | ``_over_warps`` |
| scratch, row 4 | 32 | (bin, rank inside, size) of one pass of ``_bin_of_rank`` | all threads |
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.hopper import thread_code as tc
from pallas_kernels.hopper.launch import persistent_kernel
from pallas_kernels.hopper.mosaic import plgpu
from pallas_kernels.hopper.thread_code import Word

BINS = 2048
SCRATCH_ROWS = 5  # of one word per warp
NEG_INF_KEY = 0x007FFFFF  # _key_of(-inf): no real candidate is at or below it


@dataclasses.dataclass(frozen=True)
class Teams:
    """How the threads of a block are used: ``count`` rows at a time, each by ``threads`` threads."""

    count: int
    threads: int
    vectors: int = 2  # 16-byte loads per thread and chunk
    spare: int = 0  # buffer entries per thread beyond what k keys and one chunk need

    @property
    def chunk(self) -> int:
        """Keys that a team reads at once."""
        return self.threads * self.vectors * 4

    def per_thread(self, k: int) -> int:
        """Consecutive buffer entries that a thread owns; odd, so that the 32 lanes hit 32 banks."""
        return (-(-(k + self.chunk) // self.threads) + self.spare) | 1


ONE_ROW = Teams(count=1, threads=1024)
TWO_ROWS = Teams(count=2, threads=512, spare=4)  # the buffer then holds a row of 8K keys: one cut


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of one compiled kernel."""

    rows: int
    S: int
    k: int
    teams: Teams
    n_multiprocessors: int

    @property
    def n_blocks(self) -> int:
        """Persistent thread blocks."""
        return min(self.n_multiprocessors, -(-self.rows // self.teams.count))

    @property
    def capacity(self) -> int:
        """Buffer entries of a team."""
        return self.teams.per_thread(self.k) * self.teams.threads


class Inputs(NamedTuple):
    """The kernel's operands."""

    scores: Any  # [rows x S], padded to a multiple of 4
    key_start: Any  # [rows] int32, or None as key_stop
    key_stop: Any


class Scratch(NamedTuple):
    """Shared memory of a thread block, in the order of allocation: one part per team."""

    buffer: Any  # keys, then their indices
    histogram: Any
    scratch: Any


def scratch_words(plan: Plan) -> Scratch:
    """The words of each array of a block."""
    per_team = Scratch(2 * plan.capacity, BINS, SCRATCH_ROWS * 32)
    return Scratch(*(plan.teams.count * words for words in per_team))


@functools.cache
def build(plan: Plan) -> Callable[[Inputs], jax.Array]:
    """The kernel: Inputs -> indices [rows k], int32."""

    def body(inputs, out, scratch):
        refs = inputs, out, scratch

        @plgpu.inline_mgpu(arg_types=jax.tree.map(lambda _: plgpu.RefType(), refs))
        def select(ctx, inputs, out, scratch):
            del ctx
            Team(plan, inputs, out, scratch).select()

        select(*refs)

    return persistent_kernel(
        body,
        out_type=jax.ShapeDtypeStruct((plan.rows, plan.k), jnp.int32),
        scratch=Scratch(*(plgpu.SMEM((words,), jnp.int32) for words in scratch_words(plan))),
        n_blocks=plan.n_blocks,
        warpgroups=plan.teams.count * plan.teams.threads // 128,
    )


class Team:
    """What one thread of a team does. A Word is in a register; names ending in ``_at`` are addresses."""

    def __init__(self, plan: Plan, inputs: Inputs, out: Any, scratch: Scratch):
        teams = plan.teams
        self.plan, self.inputs, self.out = plan, inputs, out
        self.threads, self.vectors, self.chunk = teams.threads, teams.vectors, teams.chunk
        self.per_thread, self.capacity = teams.per_thread(plan.k), plan.capacity
        self.team = tc.thread_index() >> (self.threads.bit_length() - 1)
        self.thread = tc.thread_index() & (self.threads - 1)
        self.lane, self.warp = self.thread & 31, self.thread >> 5
        self.first_row = tc.block_index() * teams.count + self.team
        self.buffer_at = tc.shared_address(scratch.buffer) + self.team * (8 * self.capacity)
        self.histogram_at = tc.shared_address(scratch.histogram) + self.team * (4 * BINS)
        self.scratch_at = tc.shared_address(scratch.scratch) + self.team * (4 * SCRATCH_ROWS * 32)

    def _barrier(self) -> None:
        """Waits for the team."""
        tc.named_barrier(self.team + 9, self.threads)

    def select(self) -> None:
        """Writes this team's rows of the result."""
        with tc.when(self.thread < BINS // 4):
            tc.store_shared_x4(self.histogram_at + (self.thread << 4), [0, 0, 0, 0])

        def one_row(i: Word, _: list[Word]) -> list[Word]:
            # The later rows of a causal mask are longer: start with them.
            self._select_row(Word(self.plan.rows - 1) - i)
            return []

        n_teams = self.plan.teams.count * self.plan.n_blocks
        tc.loop(self.first_row, self.plan.rows, n_teams, [], one_row)

    def _select_row(self, row: Word) -> None:
        S = self.plan.S
        if self.inputs.key_start is None:
            start, visible = Word(0), Word(S)
        else:
            bounds = (self.inputs.key_start, self.inputs.key_stop)
            start, stop = (tc.load_global(tc.global_address(ref).plus(row, 4)) for ref in bounds)
            start = start.signed_maximum(0).signed_minimum(S)
            visible = (stop.signed_minimum(S) - start).signed_maximum(0)
        # A row starts anywhere; reading starts at the 16-byte boundary at or before its first visible key.
        # Each vector read holds a visible key, so no read leaves the array.
        first_at = tc.global_address(self.inputs.scores).plus(row, 4 * S).plus(start, 4)
        self.lead = first_at.low() >> 2 & 3
        self.first_vector_at = first_at.plus(Word(0) - self.lead, 4)
        self.first_index = start - self.lead
        # Positions count from first_vector_at; the visible ones are lead .. end - 1.
        self.end = self.lead + visible
        (count,) = tc.branch(visible.equals(0), lambda: [Word(0)], lambda: [self._scan()], 1)
        out_at = tc.global_address(self.out).plus(row, 4 * self.plan.k)

        def write(i: Word, _: list[Word]) -> list[Word]:
            index = tc.load_shared(self.buffer_at + (i << 2), 4 * self.capacity)
            tc.store_global(out_at.plus(i, 4), (i < count).select(index, -1))
            return []

        tc.loop(self.thread, self.plan.k, self.threads, [], write)

    def _scan(self) -> Word:
        """Leaves the chosen indices in the buffer, in order; returns how many there are."""
        n_chunks = (self.end + (self.chunk - 1)) >> (self.chunk.bit_length() - 1)

        def chunk(carry: list[Word]) -> list[Word]:
            i, threshold, count, *raw = carry
            ahead = self._load(i + 1)
            keys = self._to_keys(raw, i)
            is_last = i.equals(n_chunks)  # one round beyond the last chunk, for the last cut

            def nothing() -> list[Word]:
                self._barrier()
                return [Word(0)] * 4

            counted = tc.branch(is_last, nothing, lambda: self._count(keys, threshold, i & 1), 4)
            total, before, own, totals = counted

            def cut() -> list[Word]:  # then this chunk again: its scores need not stay in registers
                return [i + is_last.word(), self._cut(count), Word(self.plan.k), *self._load(i)]

            def append() -> list[Word]:
                self._append(keys, threshold, count + before, own, totals, i)
                return [i + 1, threshold, count + total, *ahead]

            must_cut = ((count + total > self.capacity) | is_last) & (count > self.plan.k)
            return tc.branch(must_cut, cut, append, len(carry))

        carry = [Word(0), Word(NEG_INF_KEY), Word(0), *self._load(Word(0))]
        _, _, count, *_ = tc.while_loop(lambda carry: carry[0] <= n_chunks, carry, chunk)
        self._barrier()
        return count

    # A chunk: a warp reads ``vectors`` x 32 consecutive vectors, so order is warp, vector, lane, component.

    def _vector(self, i: Word, j: int) -> Word:
        return i * (self.threads * self.vectors) + (self.warp * (32 * self.vectors) + self.lane + 32 * j)

    def _load(self, i: Word) -> list[Word]:
        """The bits of this thread's scores in chunk i. Beyond the row it reads the last vector again."""
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

        at_an_end = i.equals(0) | ((i + 1) * self.chunk > self.end)
        return tc.branch(at_an_end, mask, lambda: keys, len(keys))

    def _count(self, keys: list[Word], threshold: Word, slot: Word) -> list[Word]:
        """Keys above the threshold: [in the chunk, in warps before, in lanes before, in the warp].

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
        """The sum of a warp's value over the warps before, and over all. Holds one barrier."""
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
        top, need, size = self._bin_of_rank([key >> 21 for key in keys], keys, None, Word(self.plan.k))

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
        # Its barrier also says that every thread has read its keys.
        before, _ = self._over_warps(tc.shuffle_from(inclusive, 31), Word(3))
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
            registers = (place_at.ir, index.ir, chosen.ir)
            place_at = Word(tc.ptx(text.replace("BIT", str(1 << e)), *registers, returns=tc.i32()))


def _key_of(bits: Word) -> Word:
    """Unsigned integers in the order of the floats: -0.0 equals 0.0, every NaN is the largest key."""
    text = """{ .reg .b32 x, m;
        add.rn.f32 x, $1, 0f00000000;
        shr.s32 m, x, 31;
        or.b32 m, m, 0x80000000;
        xor.b32 $0, x, m; }"""  # the sum turns -0.0 into 0.0 and every NaN into 0x7fffffff
    return Word(tc.ptx(text, bits.ir, returns=tc.i32(), has_side_effects=False))
