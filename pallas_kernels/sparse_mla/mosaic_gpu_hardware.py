"""The steps of the sparse_mla kernel on Hopper, in MLIR and PTX. ``Steps`` says what each of them does."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.hopper import mosaic
from pallas_kernels.hopper import thread_code as tc
from pallas_kernels.hopper.mosaic import arith, ir, llvm, nvvm, plgpu, scf, words
from pallas_kernels.hopper.thread_code import Flag, Word
from pallas_kernels.sparse_mla.mosaic_gpu_plan import (
    GROUPS,
    KEYS,
    LATENT,
    N_GROUPS,
    NO_KEY,
    PAIR,
    PER_HEAD,
    ROPE,
    ROW_GROUP_BYTES,
    TILE_BYTES,
    TRANSFORMS,
)

_SCALAR = plgpu.Layout.WG_SPLAT(())


class Hardware:
    threads_per_row = 8  # neighbouring threads of the producer
    # At the barrier of each group of tiles: one for each thread's copies; at the first, also one for each thread that
    # stores no_key.
    arrivals = (128 + 16, 128, 128, 128)

    def __init__(self, top_k: int):
        self.top_k = top_k
        self.rows = 128 // self.threads_per_row  # that the producer copies at once

    def start_matmul(self, acc, a, b, half=None):
        in_registers = isinstance(a, jax.Array)

        @plgpu.inline_mgpu(
            arg_types=(
                mosaic.ACCUMULATOR,
                plgpu.Layout.WGMMA if in_registers else plgpu.RefType(TRANSFORMS),
                plgpu.RefType(TRANSFORMS),
            ),
            return_type=plgpu.ShapeDtypeStruct(acc.shape, jnp.float32, layout=mosaic.ACCUMULATOR),
        )
        def start(ctx, acc, a, b):
            acc = mosaic.accumulator(acc)
            b = _recomputed(b)
            if not in_registers:
                a = _recomputed(a)
            if half is None:
                acc = mosaic.accumulate(acc, a, mosaic.memref_transpose(b, (1, 0, 3, 2)))
            else:
                acc = mosaic.accumulate_rows(acc, a, b, half * KEYS // 2)
            nvvm.wgmma_commit_group_sync_aligned()
            return acc

        return start(plgpu.layout_cast(acc, mosaic.ACCUMULATOR), a, b)

    def finish_matmul(self, acc):
        @plgpu.inline_mgpu(
            arg_types=(mosaic.ACCUMULATOR,),
            return_type=plgpu.ShapeDtypeStruct(acc.shape, jnp.float32, layout=mosaic.ACCUMULATOR),
        )
        def finish(ctx, acc):
            nvvm.wgmma_wait_group_sync_aligned(0)
            return mosaic.optimization_barrier(acc)

        return plgpu.layout_cast(finish(acc), plgpu.Layout.WGMMA)

    def rescale(self, acc, factor):
        """Skipped where all rows of a warp have factor 1, by far the most frequent case."""

        @plgpu.inline_mgpu(
            arg_types=(plgpu.Layout.WGMMA, PER_HEAD),
            return_type=plgpu.ShapeDtypeStruct(acc.shape, jnp.float32, layout=plgpu.Layout.WGMMA),
        )
        def multiply(ctx, acc, factor):
            one = arith.constant(ir.F32Type.get(), 1.0)
            changed = [
                Flag(arith.cmpf(arith.CmpFPredicate.UNE, tc.lane_of(register, 0), one))
                for register in mosaic.registers(factor)
            ]
            own = functools.reduce(lambda x, y: x | y, changed).word()
            vote = "{ .reg .pred p; setp.ne.b32 p, $1, 0; vote.sync.any.pred p, p, 0xffffffff; selp.b32 $0, 1, 0, p; }"
            any_changed = Word(0) < Word(tc.ptx(vote, own.ir, returns=tc.i32()))
            branch = scf.IfOp(any_changed.ir, [r.type for r in mosaic.registers(acc)], has_else=True)
            with ir.InsertionPoint(branch.then_block):
                scaled = acc * factor.broadcast_in_dim(acc.shape, (0,), acc.layout)
                scf.yield_(mosaic.registers(scaled))
            with ir.InsertionPoint(branch.else_block):
                scf.yield_(mosaic.registers(acc))
            return mosaic.with_registers(acc, branch.results)

        return multiply(acc, factor)

    def store_half(self, p_ref, p16, half):
        """By stmatrix, because assigning to a reference writes whole tiles.

        Lane l gives the address of row l % 16, columns 8 (l // 16) to 8 (l // 16) + 7, of a 16 x 16 submatrix.
        """

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(TRANSFORMS), plgpu.Layout.WGMMA))
        def store(ctx, p_ref, p16):
            strides, _ = p_ref.type.get_strides_and_offset()
            thread = tc.thread_index() % 128
            lane = thread % 32
            row = lane % 8
            group = thread // 32 * 2 + lane // 8 % 2
            base = tc.shared_address(p_ref) + (group * (2 * strides[0]) + row * 128)
            registers = [mosaic.bitcast(register, tc.i32()) for register in mosaic.registers(p16)]
            for block in range(2):
                chunk = lane // 16 + (4 * half + 2 * block)
                address = base + (chunk ^ row) * 16
                text = "stmatrix.sync.aligned.m8n8.x4.shared.b16 [$0], {$1, $2, $3, $4};"
                tc.ptx(text, address.ir, *registers[4 * block : 4 * block + 4])
            nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)

        store(p_ref, p16)

    def store_out(self, out_ref, values):
        """By ``store_untiled``, because jax 0.12 refuses the assignment of a bfloat16 array.

        Four lanes write 16 bytes of a row, half a 32-byte sector. jax 0.12 offers ``plgpu.store(optimized=False)``
        instead, which jax 0.11 does not have.
        """

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA))
        def store(ctx, out_ref, values):
            values.store_untiled(out_ref, optimized=False)

        store(out_ref, values)

    def init_barriers(self, scratch):
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
        def init(ctx, rows_ready):
            first = mosaic.single_thread_predicate(scope=mosaic.ThreadSubset.WARPGROUP)
            for i in range(2 * N_GROUPS):
                arrivals = Word(self.arrivals[i % N_GROUPS])
                nvvm.mbarrier_init(barrier_at(rows_ready, i), arrivals.ir, predicate=first)
            tc.ptx("fence.mbarrier_init.release.cluster;")
            mosaic.warpgroup_barrier()

        init(scratch.rows_ready)

    def wait_rows(self, scratch, slot, group, round_):
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _SCALAR))
        def wait(ctx, rows_ready, parity):
            barrier = barrier_at(rows_ready, N_GROUPS * slot + group)
            nvvm.mbarrier_try_wait_parity(barrier, *mosaic.registers(parity), Word(10_000_000).ir)

        wait(scratch.rows_ready, round_ & 1)

    def load_indices(self, indices, start):
        """Thread ``threads_per_row r + c`` holds the indices r, r + ``rows``, r + 2 ``rows``, and so on."""
        count = PAIR // self.rows

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), _SCALAR),
            return_type=plgpu.ShapeDtypeStruct((count * 128,), jnp.int32, layout=words(count)),
        )
        def load(ctx, indices, start):
            first = Word(*mosaic.registers(start)) + tc.thread_index() % 128 // self.threads_per_row
            base = tc.global_address(indices)
            found = []
            for i in range(count):
                position = first + self.rows * i
                inside = position.signed_less(self.top_k)
                address = base.plus(inside.select(position, 0), 4)
                index = tc.ptx("ld.global.nc.b32 $0, [$1];", address.ir, returns=tc.i32())
                found.append(inside.select(Word(index), -1))
            return mosaic.word_array([index.ir for index in found])

        return load(indices, start)

    def prefetch(self, found, sources):
        """Nothing: the copies are asynchronous."""
        return ()

    def gather(self, scratch, sources, found, following, ahead, wait_free):
        for slot in range(2):
            for half in range(2):
                wait_free(slot, half)
                self._copy(scratch, sources, found, slot, half)
        return ahead

    def _copy(self, scratch, sources, found, slot, half):
        """Starts copying one half of the slot's 64 rows.

        Thread 8 r + c copies the 16-byte chunk c of every 128-byte tile row of the keys r + 16 i. The rows are asked
        to stay in the L2 cache: other queries select them too, while q and out pass through once.
        """

        @plgpu.inline_mgpu(
            arg_types=(
                words(PAIR // 16),
                plgpu.RefType(),
                plgpu.RefType(),
                plgpu.RefType(TRANSFORMS),
                plgpu.RefType(),
                plgpu.RefType(),
            )
        )
        def copy(ctx, found, latent, k_rope, keys, no_key, rows_ready):
            thread = tc.thread_index() % 128
            row, chunk = thread // 8, thread % 8
            target = tc.shared_address(keys) + (row // 8 * ROW_GROUP_BYTES + row % 8 * 128)
            # ^ for +: given a uniform base, ptxas 13.5 writes [R + UR] beside a cache policy, which Hopper refuses
            target = target ^ ((chunk ^ (row % 8)) * 16)
            latent, k_rope = (tc.global_address(ref).plus(chunk, 16) for ref in (latent, k_rope))
            indices = [Word(tc.lane_of(r, 0)) for r in mosaic.registers(found)[4 * slot : 4 * slot + 4]]
            missing = [index.signed_less(0) for index in indices]
            policy = tc.ptx("createpolicy.fractional.L2::evict_last.b64 $0, 1.0;", returns=tc.i64())
            barriers = [barrier_at(rows_ready, N_GROUPS * slot + 2 * half + i) for i in range(2)]
            for barrier, tiles in zip(barriers, GROUPS[half], strict=True):
                for i, (index, none) in enumerate(zip(indices, missing, strict=True)):
                    index, size = none.select(0, index), none.select(0, 16)
                    for tile in tiles:
                        source, offset = (latent.plus(index, 2 * LATENT), 128 * tile)
                        if tile == LATENT // 64:
                            source, offset = k_rope.plus(index, 2 * ROPE), 0
                        to = i * 2 * ROW_GROUP_BYTES + tile * TILE_BYTES
                        tc.ptx(
                            "cp.async.cg.shared.global.L2::cache_hint.L2::256B "
                            f"[$0 + {to}], [$1 + {offset}], 16, $2, $3;",
                            target.ir,
                            source.ir,
                            size.ir,
                            policy,
                        )
                tc.ptx("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0];", barrier)
            if half == 0:
                with tc.when(chunk.equals(0)):
                    address = tc.shared_address(no_key) + row * 4
                    for i, none in enumerate(missing):
                        value = arith.select(
                            none.ir, *(arith.constant(ir.F32Type.get(), x) for x in (NO_KEY, 0.0))
                        )
                        tc.store_shared(address, tc.float_bits(value), 64 * i)
                    tc.ptx("mbarrier.arrive.shared::cta.b64 _, [$0];", barriers[0])

        keys, no_key = scratch.keys.at[slot], scratch.no_key.at[slot]
        copy(found, sources.latent, sources.k_rope, keys, no_key, scratch.rows_ready)


def _recomputed(memref):
    """The same reference through a pointer that LLVM cannot see through.

    Otherwise LLVM hoists the descriptors of all matrix products out of the loop, and they are spilled.
    """
    pointer = mosaic.memref_ptr(memref)
    address = tc.ptx("mov.b32 $0, $1;", llvm.ptrtoint(tc.i32(), pointer), returns=tc.i32())
    strides, _ = memref.type.get_strides_and_offset()
    layout = ir.StridedLayoutAttr.get(0, strides)
    memref_type = ir.MemRefType.get(
        memref.type.shape, memref.type.element_type, layout, memref.type.memory_space
    )
    return mosaic.ptr_as_memref(llvm.inttoptr(pointer.type, address), memref_type)


def barrier_at(rows_ready, i):
    """The address of one of the barriers in a reference to float32 values."""
    return mosaic.getelementptr(mosaic.memref_ptr(rows_ready), [i], tc.i64())
