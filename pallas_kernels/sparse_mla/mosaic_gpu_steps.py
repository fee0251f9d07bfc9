"""The steps of the sparse_mla kernel that Pallas has no words for, and the kernel's layout in shared memory.

Pallas can neither gather rows with asynchronous copies, nor keep matrix products in flight beside other work,
nor multiply half a block. ``Hardware`` writes these steps in MLIR and PTX through ``plgpu.inline_mgpu``;
``Interpreted`` does the same in plain Pallas for the Mosaic GPU interpreter, which knows no ``inline_mgpu``.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.hopper import mosaic
from pallas_kernels.hopper import thread_code as tc
from pallas_kernels.hopper.mosaic import arith, ir, llvm, nvvm, pl, plgpu, scf, words
from pallas_kernels.hopper.thread_code import Flag, Word

LATENT, ROPE = 512, 64  # kv_lora_rank and qk_rope_head_dim of V3.2 and GLM-5
HEADS = 64  # heads of one thread block: the M of wgmma
KEYS = 64  # keys of one block
PAIR = 2 * KEYS
HALF = LATENT // 2  # output columns that one consumer accumulates
COLUMNS = LATENT + ROPE
TILE_BYTES = 1024  # 8 rows x 64 columns, the 16-byte chunks of a row swizzled over its 128 bytes
ROW_GROUP_BYTES = COLUMNS // 64 * TILE_BYTES  # from 8 rows of keys to the next 8
# The tiles of a key's row in the order of their copies: the first product starts when the first group has come.
# Part 0 (left half of the latent) and part 1 (right half and k_rope) are overwritten separately.
GROUPS = ((range(0, 2), range(2, 4)), (range(4, 6), range(6, 9)))
NO_KEY = -3e38  # initial logit of a missing key; finite, so that no inf - inf can arise

TRANSFORMS = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
PER_HEAD = plgpu.Layout.WGMMA.reduce(1)
PER_KEY = plgpu.Layout.WGMMA.reduce(0)
_SCALAR = plgpu.Layout.WG_SPLAT(())


class Hardware:
    threads_per_row = 8  # of the producer, side by side
    arrivals = (
        128 + 16,
        128,
        128,
        128,
    )  # at the barriers of a slot's groups: the threads' copies, no_key's stores

    def __init__(self, top_k: int):
        self.top_k = top_k
        self.rows = 128 // self.threads_per_row  # taken at once

    @staticmethod
    def start_matmul(acc, a, b, half=None):
        """Issues acc += a @ b^T or, over one half of the keys, acc += a @ b, and returns at once.

        acc may be read after finish_matmul. ``a`` lies in shared memory (all keys) or in registers (that half).
        """
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
            acc = mosaic.WGMMAAccumulator.from_registers(acc)
            b = _recomputed(b)
            if not in_registers:
                a = _recomputed(a)
            if half is None:
                acc = mosaic.wgmma(acc, a, mosaic.memref_transpose(b, (1, 0, 3, 2)))._value
            else:
                acc = _wgmma_half(acc._value, a, b, half)
            nvvm.wgmma_commit_group_sync_aligned()
            return acc

        return start(plgpu.layout_cast(acc, mosaic.ACCUMULATOR), a, b)

    @staticmethod
    def finish_matmul(acc):
        """Waits for every product in flight."""

        @plgpu.inline_mgpu(
            arg_types=(mosaic.ACCUMULATOR,),
            return_type=plgpu.ShapeDtypeStruct(acc.shape, jnp.float32, layout=mosaic.ACCUMULATOR),
        )
        def finish(ctx, acc):
            nvvm.wgmma_wait_group_sync_aligned(0)
            return mosaic.optimization_barrier(acc)

        return plgpu.layout_cast(finish(acc), plgpu.Layout.WGMMA)

    @staticmethod
    def rescale(acc, factor):
        """acc * factor[:, None], skipped where all rows of a warp have factor 1: by far the most frequent case."""

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

    @staticmethod
    def store_half(p_ref, p16, half):
        """p_ref[:, 32 half : 32 half + 32] = p16, visible to wgmma beyond the next barrier.

        A reference stores whole tiles only, hence stmatrix: lane l gives the address of row l % 16, columns
        8 (l // 16) to 8 (l // 16) + 7, of a 16 x 16 block.
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

    @staticmethod
    def store_out(out_ref, values):
        """out_ref[...] = values, in device memory.

        jax 0.12 refuses the assignment: in bfloat16 four lanes write 16 bytes of a row, half a 32-byte sector. It
        offers ``plgpu.store(optimized=False)``, which jax 0.11 does not have; both have this.
        """

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA))
        def store(ctx, out_ref, values):
            values.store_untiled(out_ref, optimized=False)

        store(out_ref, values)

    def init_barriers(self, ready):
        """ready[4 slot + group] says that a group of the slot's keys has come."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
        def init(ctx, ready):
            first = mosaic.single_thread_predicate(scope=mosaic.ThreadSubset.WARPGROUP)
            for i in range(8):
                nvvm.mbarrier_init(barrier_at(ready, i), Word(self.arrivals[i % 4]).ir, predicate=first)
            tc.ptx("fence.mbarrier_init.release.cluster;")
            mosaic.warpgroup_barrier()

        init(ready)

    @staticmethod
    def wait_rows(index, ready, arrived, round_):
        """Waits until group ``index`` (4 slot + group) of the round's keys has come."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _SCALAR))
        def wait(ctx, ready, parity):
            nvvm.mbarrier_try_wait_parity(
                barrier_at(ready, index), mosaic.registers(parity)[0], Word(10_000_000).ir
            )

        wait(ready, round_ & 1)

    def load_indices(self, indices, start):
        """This thread's part of indices[start : start + PAIR], -1 beyond the end.

        Thread ``threads_per_row r + c`` has the indices r, r + ``rows``, r + 2 ``rows``, and so on.
        """
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

    @staticmethod
    def prefetch(found, sources):
        """What ``gather`` wants to have been read ahead: nothing."""
        return ()

    @staticmethod
    def gather(found, following, ahead, sources, wait_free, keys, no_key, ready, arrived):
        """Starts copying a pair's rows to keys[0] and keys[1], each part once ``wait_free(slot, part)`` returns.

        ``following`` are the indices of the next pair; returns what ``prefetch`` would return for them.
        """
        for slot in range(2):
            for part in range(2):
                wait_free(slot, part)
                Hardware._copy(slot, part, found, sources, keys, no_key, ready)
        return ahead

    @staticmethod
    def _copy(slot, part, found, sources, keys, no_key, ready):
        """Starts copying part 0 or 1 of the slot's 64 rows to keys[slot].

        Thread 8 r + c copies the 16-byte chunk c of every 128-byte tile row of the keys r + 16 i. Chunk c of row r
        lies at chunk c ^ (r % 8) of its tile. Rows of missing keys become 0; no_key gives them no weight.
        The rows are asked to stay in the L2 cache: other queries select them, while q and out pass through once.
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
        def copy(ctx, found, latent, k_rope, keys, no_key, ready):
            thread = tc.thread_index() % 128
            row, chunk = thread // 8, thread % 8
            target = tc.shared_address(keys) + (row // 8 * ROW_GROUP_BYTES + row % 8 * 128)
            # ^ for +: given a uniform base, ptxas 13.5 writes [R + UR] beside a cache policy, which Hopper refuses
            target = target ^ ((chunk ^ (row % 8)) * 16)
            latent, k_rope = (tc.global_address(ref).plus(chunk, 16) for ref in (latent, k_rope))
            indices = [Word(tc.lane_of(r, 0)) for r in mosaic.registers(found)[4 * slot : 4 * slot + 4]]
            missing = [index.signed_less(0) for index in indices]
            policy = tc.ptx("createpolicy.fractional.L2::evict_last.b64 $0, 1.0;", returns=tc.i64())
            barriers = [barrier_at(ready, 4 * slot + 2 * part + i) for i in range(2)]
            for barrier, tiles in zip(barriers, GROUPS[part], strict=True):
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
            if part == 0:
                with tc.when(chunk.equals(0)):
                    address = tc.shared_address(no_key) + row * 4
                    for i, none in enumerate(missing):
                        value = arith.select(
                            none.ir, *(arith.constant(ir.F32Type.get(), x) for x in (NO_KEY, 0.0))
                        )
                        tc.store_shared(address, tc.float_bits(value), 64 * i)
                    tc.ptx("mbarrier.arrive.shared::cta.b64 _, [$0];", barriers[0])

        copy(found, *sources, keys.at[slot], no_key.at[slot], ready)


class Interpreted:
    def __init__(self, top_k: int):
        self.top_k = top_k

    @staticmethod
    def start_matmul(acc, a, b, half=None):
        b = b[...].T if half is None else b[...][_half(half)]
        if not isinstance(a, jax.Array):
            a = a[...] if half is None else a[...][:, _half(half)]
        return acc + jnp.dot(a, b, preferred_element_type=jnp.float32)

    @staticmethod
    def finish_matmul(acc):
        return acc

    @staticmethod
    def rescale(acc, factor):
        return acc * factor[:, None]

    @staticmethod
    def store_half(p_ref, p16, half):
        p_ref[:, _half(half)] = p16
        plgpu.commit_smem()

    @staticmethod
    def store_out(out_ref, values):
        out_ref[...] = values

    @staticmethod
    def init_barriers(ready):
        pass

    @staticmethod
    def wait_rows(index, ready, arrived, round_):
        plgpu.barrier_wait(arrived[index])

    def load_indices(self, indices, start):
        """indices[start : start + PAIR], -1 beyond the end."""
        values = jnp.stack([indices[jnp.minimum(start + i, self.top_k - 1)] for i in range(PAIR)])
        return jnp.where(start + jnp.arange(PAIR) < self.top_k, values, -1)

    @staticmethod
    def prefetch(found, sources):
        return ()

    def gather(self, found, following, ahead, sources, wait_free, keys, no_key, ready, arrived):
        for slot in range(2):
            for part in range(2):
                wait_free(slot, part)
                for i in range(KEYS):
                    index = found[slot * KEYS + i]
                    row, valid, key = pl.ds(jnp.maximum(index, 0), 1), index >= 0, pl.ds(i, 1)
                    copies = [(self.latent(sources, row, part), part * HALF)]
                    if part == 1:
                        copies.append((sources[-1][row, :], LATENT))
                    for values, to in copies:
                        target = pl.ds(to, values.shape[1])
                        keys[slot, key, target] = jnp.where(valid, values, jnp.zeros_like(values))
                    if part == 0:
                        no_key[slot, key] = jnp.where(valid, 0.0, NO_KEY).reshape(1)
                for i in range(2):
                    plgpu.barrier_arrive(arrived[4 * slot + 2 * part + i])
        return ahead

    @staticmethod
    def latent(sources, row, part):
        """Half of one latent."""
        return sources[0][row, pl.ds(part * HALF, HALF)]


def _half(half: int) -> slice:
    return slice(half * KEYS // 2, (half + 1) * KEYS // 2)


def _wgmma_half(acc, a, b, half):
    """acc += a @ b over 32 of b's 64 rows; ``mosaic.wgmma`` takes no less than 64."""

    def descriptor(operand, group_size, logical_k_major):
        (base, strides), _, fastest = mosaic.create_descriptor(
            operand, swizzle=128, large_tile=(64, 64), group_size=group_size, logical_k_major=logical_k_major
        )
        stride = strides[1][0]  # bytes from one instruction's 16 keys to the next
        start = arith.constant(tc.i64(), mosaic.encode_addr(2 * half * stride))
        return llvm.add(base, start, overflow_flags=llvm.IntegerOverflowFlags.none), stride, fastest

    b, b_stride, b_fastest = descriptor(b, (64, HALF), True)
    if isinstance(a, mosaic.FragmentedArray):
        a, a_stride, a_transpose = mosaic.wgmma_fence(a), None, None
    else:
        a, a_stride, a_fastest = descriptor(a, (64, 64), False)
        a_transpose = a_fastest != mosaic.Dim.K
    registers = mosaic.wgmma_m64(
        acc.registers.copy(),
        a,
        b,
        a_transpose=a_transpose,
        b_transpose=b_fastest != mosaic.Dim.K,
        a_k_stride=a_stride,
        b_k_stride=b_stride,
        n=HALF,
        swizzle=64,  # only says how many instructions of 16 keys are issued: 2
        a_element_type=ir.BF16Type.get(),
        b_element_type=ir.BF16Type.get(),
    )
    return mosaic.with_registers(acc, registers.flat)


def _recomputed(memref):
    """The same reference through a pointer that LLVM cannot see through.

    Otherwise LLVM moves the descriptors of all matrix products in front of the loop, where they are spilled.
    """
    pointer = mosaic.memref_ptr(memref)
    address = tc.ptx("mov.b32 $0, $1;", llvm.ptrtoint(tc.i32(), pointer), returns=tc.i32())
    strides, _ = memref.type.get_strides_and_offset()
    layout = ir.StridedLayoutAttr.get(0, strides)
    memref_type = ir.MemRefType.get(
        memref.type.shape, memref.type.element_type, layout, memref.type.memory_space
    )
    return mosaic.ptr_as_memref(llvm.inttoptr(pointer.type, address), memref_type)


def barrier_at(barriers, i):
    """The address of one of the barriers that lie in a reference to float32s."""
    return mosaic.getelementptr(mosaic.memref_ptr(barriers), [i], tc.i64())
