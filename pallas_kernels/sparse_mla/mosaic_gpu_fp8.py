"""The steps of the sparse_mla kernel for an FP8 cache: rows become bfloat16 on their way to shared memory.

Hopper cannot convert e4m3 to bfloat16. A value becomes float16 (exactly), then float32, is multiplied by its scale
and rounded once. A thread converts 32 values at a time in registers, while the next 64 are on their way from memory.
The rotated columns are bfloat16 in the cache and are copied as they are.
"""

import jax.numpy as jnp

from pallas_kernels.hopper import mosaic
from pallas_kernels.hopper import thread_code as tc
from pallas_kernels.hopper.mosaic import arith, ir, nvvm, plgpu, words
from pallas_kernels.hopper.thread_code import Word
from pallas_kernels.sparse_mla.mosaic_gpu_hardware import Hardware, barrier_at
from pallas_kernels.sparse_mla.mosaic_gpu_plan import (
    LATENT,
    N_GROUPS,
    NO_KEY,
    ROPE,
    ROW_GROUP_BYTES,
    SCALE_BLOCK,
    TILE_BYTES,
    TRANSFORMS,
)

# A pair is converted in steps: (slot, group of tiles, half of the slot's rows). A group's columns share a scale.
ORDER = [(slot, group, half) for slot in range(2) for group in range(N_GROUPS) for half in range(2)]
STEP_WORDS = 8 + 1  # per thread: two chunks of one row, and their scale
AHEAD = 2  # steps between reading and converting


class HardwareFp8(Hardware):
    """Thread 4 r + c takes the 16-byte chunk c of every 64 columns of the keys r and r + 32 of a slot.

    Converted, it becomes the chunks 2c and 2c + 1 of a tile row. Eight neighbouring threads store to an even and an
    odd row, after the swizzle to eight different chunks, hence to all banks.
    """

    threads_per_row = 4
    # At the barrier of each group of tiles: one per thread; at the last, also one for the thread's copies of k_rope.
    arrivals = (128, 128, 128, 128 + 128)

    def prefetch(self, found, sources):
        return tuple(_fetch(found, step, sources) for step in range(AHEAD))

    def gather(self, scratch, sources, found, following, ahead, wait_free):
        for step, (slot, group, half) in enumerate(ORDER):
            later = step + AHEAD
            fetched = _fetch(found if later < len(ORDER) else following, later % len(ORDER), sources)
            if half == 0 and group % 2 == 0:
                wait_free(slot, group // 2)
            if half == 0 and group == 0:
                _store_no_key(scratch, found, slot)
            if half == 0 and group == 2:
                _copy_k_rope(scratch, sources, found, slot)
            _convert(scratch, ahead[0], step)
            ahead = (*ahead[1:], fetched)
        return ahead


def _fetch(found, step, sources):
    """Starts reading the step's columns of half of its slot's keys; zeros for missing keys."""
    slot, group, half = ORDER[step]

    @plgpu.inline_mgpu(
        arg_types=(words(4), plgpu.RefType(), plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct((STEP_WORDS * 128,), jnp.int32, layout=words(STEP_WORDS)),
    )
    def fetch(ctx, found, latent, scale):
        index = _indices(found, slot)[half]
        source = tc.global_address(latent).plus(tc.thread_index() % 4, 16).plus(index, LATENT)
        of_scale = tc.global_address(scale).plus(index, 4 * N_GROUPS)
        policy = tc.ptx("createpolicy.fractional.L2::evict_last.b64 $0, 1.0;", returns=tc.i64())
        fetched = []
        for tile in range(2):
            text = (
                "{ .reg .pred p; setp.ge.s32 p, $5, 0; "
                "mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; "
                "@p ld.global.nc.L1::no_allocate.L2::cache_hint.L2::256B.v4.b32 "
                f"{{$0, $1, $2, $3}}, [$4 + {SCALE_BLOCK * group + 64 * tile}], $6; }}"
            )
            fetched += tc.ptx(text, source.ir, index.ir, policy, returns=[tc.i32()] * 4)
        text = (
            "{ .reg .pred p; setp.ge.s32 p, $2, 0; mov.b32 $0, 0; "
            f"@p ld.global.nc.b32 $0, [$1 + {4 * group}]; }}"
        )
        fetched.append(tc.ptx(text, of_scale.ir, index.ir, returns=tc.i32()))
        return mosaic.word_array(fetched)

    return fetch(found, sources.latent, sources.scale)


def _convert(scratch, fetched, step):
    """Writes what the step fetched, times its scale, to keys; after a group's second half, signals its arrival."""
    slot, group, half = ORDER[step]

    @plgpu.inline_mgpu(arg_types=(words(STEP_WORDS), plgpu.RefType(TRANSFORMS), plgpu.RefType()))
    def convert(ctx, fetched, keys, rows_ready):
        row, chunk = _row_and_chunk()
        values = [tc.lane_of(register, 0) for register in mosaic.registers(fetched)]
        target = _in_tile(keys, row) ^ ((chunk * 2 ^ row % 8) * 16)
        for i in range(4):
            to = half * 4 * ROW_GROUP_BYTES + (2 * group + i // 2) * TILE_BYTES
            converted = [y for x in values[2 * i : 2 * i + 2] for y in _bfloat16_of_e4m3(x, values[8])]
            text = f"st.shared.v4.b32 [$0 + {to}], {{$1, $2, $3, $4}};"
            tc.ptx(text, (target ^ (16 * (i % 2))).ir, *converted)
        if half == 1:
            nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)
            tc.ptx(
                "mbarrier.arrive.shared::cta.b64 _, [$0];", barrier_at(rows_ready, N_GROUPS * slot + group)
            )

    convert(fetched, scratch.keys.at[slot], scratch.rows_ready)


def _store_no_key(scratch, found, slot):
    """Marks the slot's missing keys. Visible to the consumers when this thread arrives at group 0's barrier."""

    @plgpu.inline_mgpu(arg_types=(words(4), plgpu.RefType()))
    def store(ctx, found, no_key):
        row, chunk = _row_and_chunk()
        with tc.when(chunk.equals(0)):
            for i, index in enumerate(_indices(found, slot)):
                zero, no_key_value = (arith.constant(ir.F32Type.get(), x) for x in (0.0, NO_KEY))
                value = arith.select(index.signed_less(0).ir, no_key_value, zero)
                tc.store_shared(tc.shared_address(no_key) + row * 4, tc.float_bits(value), 4 * 32 * i)

    store(found, scratch.no_key.at[slot])


def _bfloat16_of_e4m3(word, scale):
    """Two words of two bfloat16 each: the four e4m3 values of ``word`` times the bits of a float32 ``scale``."""
    text = """{
        .reg .b16 e<2>, h<4>; .reg .b32 p<2>; .reg .f32 s, f<4>;
        mov.b32 s, $3;
        mov.b32 {e0, e1}, $2;
        cvt.rn.f16x2.e4m3x2 p0, e0;
        cvt.rn.f16x2.e4m3x2 p1, e1;
        mov.b32 {h0, h1}, p0;
        mov.b32 {h2, h3}, p1;
        cvt.f32.f16 f0, h0;
        cvt.f32.f16 f1, h1;
        cvt.f32.f16 f2, h2;
        cvt.f32.f16 f3, h3;
        mul.rn.f32 f0, f0, s;
        mul.rn.f32 f1, f1, s;
        mul.rn.f32 f2, f2, s;
        mul.rn.f32 f3, f3, s;
        cvt.rn.bf16x2.f32 $0, f1, f0;
        cvt.rn.bf16x2.f32 $1, f3, f2;
    }"""
    return tc.ptx(text, word, scale, returns=[tc.i32()] * 2)


def _copy_k_rope(scratch, sources, found, slot):
    """Starts copying the rotated columns, as ``Hardware`` copies everything."""

    @plgpu.inline_mgpu(arg_types=(words(4), plgpu.RefType(), plgpu.RefType(TRANSFORMS), plgpu.RefType()))
    def copy(ctx, found, k_rope, keys, rows_ready):
        row, chunk = _row_and_chunk()
        target = _in_tile(keys, row) ^ ((chunk ^ row % 8) * 16)
        k_rope = tc.global_address(k_rope).plus(chunk, 16)
        for i, index in enumerate(_indices(found, slot)):
            missing = index.signed_less(0)
            source, size = k_rope.plus(missing.select(0, index), 2 * ROPE), missing.select(0, 16)
            to = i * 4 * ROW_GROUP_BYTES + LATENT // 64 * TILE_BYTES
            for half in range(2):
                tc.ptx(
                    f"cp.async.cg.shared.global.L2::128B [$0 + {to}], [$1 + {64 * half}], 16, $2;",
                    (target ^ (64 * half)).ir,
                    source.ir,
                    size.ir,
                )
        tc.ptx(
            "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0];",
            barrier_at(rows_ready, N_GROUPS * slot + 3),
        )

    copy(found, sources.k_rope, scratch.keys.at[slot], scratch.rows_ready)


def _indices(found, slot):
    return [Word(tc.lane_of(register, 0)) for register in mosaic.registers(found)[2 * slot : 2 * slot + 2]]


def _row_and_chunk():
    thread = tc.thread_index() % 128
    return thread // 4, thread % 4


def _in_tile(keys, row):
    """Address of the row's first chunk in the first of its tiles."""
    return tc.shared_address(keys) + (row // 8 * ROW_GROUP_BYTES + row % 8 * 128)
