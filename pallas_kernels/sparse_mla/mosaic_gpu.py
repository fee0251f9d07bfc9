"""sparse_mla on Hopper GPUs: one Pallas Mosaic GPU kernel for prefill and, split over the keys, for decode.

A thread block serves one query and 64 of its heads at a time and walks over the keys in pairs of blocks of 64.
Three warpgroups share the work:

    producer     gathers the rows of latent and k_rope into K[0] and K[1], converting those of an FP8 cache
    consumer 0   S0 = Q K[0]^T, softmax, publishes P0; out[:, :256] += P0 V0, then += P1 V1
    consumer 1   S1 = Q K[1]^T; out[:, 256:] += P0 V0 beside the softmax of S1, publishes P1, then += P1 V1

The running maximum passes from block to block (consumer 0, consumer 1, consumer 0 of the next pair), so both
halves of the output see the same sequence of rescalings and no P is ever rescaled. K[0] is free for the next
rows while K[1] is multiplied, and the other way round. The maximum is raised only when a logit exceeds it by
SLACK: almost always no row changes, and the 256 multiplications of a rescaling leave the critical path.
Thread blocks are persistent: the producer gathers for the next query while the consumers write out.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.hopper import device
from pallas_kernels.hopper.mosaic import pl, plgpu
from pallas_kernels.sparse_mla.mosaic_gpu_fp8 import SCALE_BLOCK, HardwareFp8, InterpretedFp8
from pallas_kernels.sparse_mla.mosaic_gpu_steps import (
    COLUMNS,
    GROUPS,
    HALF,
    HEADS,
    KEYS,
    LATENT,
    PAIR,
    PER_HEAD,
    PER_KEY,
    ROPE,
    TRANSFORMS,
    Hardware,
    Interpreted,
)

STEPS = {  # by whether the latents are FP8 and whether the kernel is interpreted
    (False, False): Hardware,
    (False, True): Interpreted,
    (True, False): HardwareFp8,
    (True, True): InterpretedFp8,
}
SLACK = 8.0  # binary orders of magnitude by which logits may exceed the running maximum; P is below 2^8
NO_MAXIMUM = -1e30  # running maximum of a row without keys: far above a missing key's scaled logit, if
SMALLEST_SCALE = 1e-6  # the scale is no smaller
# Registers of a thread in a consumer and in the producer, by whether the latents are FP8. The launch gives
# 3 x 128 threads 168 each, which is what the three together may hold. Converting needs more than copying.
REGISTERS = {False: (224, 56), True: (216, 72)}


def forward(
    q_latent: Float[Array, "B T N C"],
    q_rope: Float[Array, "B T N R"],
    latent: Float[Array, "B S C"],
    k_rope: Float[Array, "B S R"],
    topk_indices: Int[Array, "B T K"],
    latent_scale: Float[Array, "B S G"] | None = None,
    *,
    scale: float,
    interpret: bool = False,
) -> tuple[Float[Array, "B T N C"], Float[Array, "B T N"]]:
    """See ``pallas_kernels.sparse_mla``. ``interpret`` runs the kernel on the CPU, for tests.

    Raises:
      NotImplementedError: not a Hopper GPU, not bfloat16 (latents: or float8_e4m3fn with a scale for 128 values),
        other widths than 512 + 64, or a scale below 1e-6.
    """
    B, T, N, C = q_latent.shape
    S, R, K = latent.shape[1], q_rope.shape[-1], topk_indices.shape[-1]
    _check_contract(C, R, q_latent.dtype)
    if latent_scale is not None and latent_scale.shape[2] != LATENT // SCALE_BLOCK:
        raise NotImplementedError(
            f"the kernel takes one scale for {SCALE_BLOCK} values, got {latent_scale.shape[2]} for {LATENT}"
        )
    if 0 in (B, T, N, S, K):
        raise NotImplementedError(f"the kernel takes no empty arrays, got {(B, T, N, S, K)=}")
    if scale < SMALLEST_SCALE:
        raise NotImplementedError(f"the kernel needs scale >= {SMALLEST_SCALE}, got {scale}")
    if not interpret:
        device.require_hopper()
    n_multiprocessors = 4 if interpret else device.n_multiprocessors()

    heads = -(-N // HEADS) * HEADS
    if heads != N:
        q_latent, q_rope = (jnp.pad(q, ((0, 0), (0, 0), (0, heads - N), (0, 0))) for q in (q_latent, q_rope))
    n_splits, pairs = _split(B * T * heads // HEADS, -(-K // PAIR), n_multiprocessors)
    fp8 = latent_scale is not None
    kernel = _kernel(B, T, heads, K, n_splits, pairs, scale, fp8, n_multiprocessors, interpret)
    out, lse = kernel(
        q_latent.reshape(B * T, heads, C),
        q_rope.reshape(B * T, heads, R),
        topk_indices.astype(jnp.int32).reshape(B * T, K),
        *((latent, latent_scale, k_rope) if fp8 else (latent, k_rope)),
    )
    out, lse = _merge(out, lse) if n_splits > 1 else (out[0], lse[0])
    return out.reshape(B, T, heads, C)[:, :, :N], lse.reshape(B, T, heads)[:, :, :N]


def check(C: int, R: int, dtype: jnp.dtype) -> None:
    """Raises NotImplementedError if no queries of these widths and dtype can be served here."""
    _check_contract(C, R, dtype)
    device.require_hopper()


def _check_contract(C: int, R: int, dtype: jnp.dtype) -> None:
    if (C, R) != (LATENT, ROPE):
        raise NotImplementedError(f"kv_lora_rank and qk_rope_head_dim must be {(LATENT, ROPE)}, got {(C, R)}")
    if dtype != jnp.bfloat16:
        raise NotImplementedError(f"the kernel multiplies bfloat16, got {dtype}")


def _split(tiles: int, pairs: int, n_multiprocessors: int) -> tuple[int, int]:
    """(how many splits of the keys, pairs of blocks in each), so that few queries still fill the chip.

    A round of the chip costs the pairs of one split plus what every block of threads spends on loading queries,
    filling the pipeline and writing: about one and a half pairs.
    """

    def cost(n):
        return -(-tiles * n // n_multiprocessors) * (-(-pairs // n) + 1.5)

    # beyond two rounds, splits only add partial results to write and merge
    candidates = [n for n in range(1, pairs + 1) if n == 1 or tiles * n <= 2 * n_multiprocessors]
    n_splits = min(candidates, key=cost)
    per_split = -(-pairs // n_splits)
    return -(-pairs // per_split), per_split


def _merge(out: Float[Array, "X BT N C"], lse: Float[Array, "X BT N"]) -> tuple[jax.Array, jax.Array]:
    """Merges the splits' results; a split without keys has lse -inf and weighs nothing."""
    highest = lse.max(axis=0)
    weights = jnp.exp(lse - jnp.where(highest == -jnp.inf, 0.0, highest))
    total = weights.sum(axis=0)
    merged = (out * weights[..., None]).sum(axis=0) / jnp.where(total == 0.0, 1.0, total)[..., None]
    return merged.astype(jnp.bfloat16), jnp.log(total) + highest


@functools.cache
def _kernel(B, T, N, K, n_splits, pairs, scale, fp8, n_multiprocessors, interpret):
    """The kernel for these shapes: (q_latent [BT N C], q_rope, indices [BT K], keys) -> out, lse.

    keys are latent [B S C] and k_rope or, if fp8, latent, its scales [B S C/128] and k_rope.

    out [n_splits BT N C], bfloat16 if there is one split, else float32; lse [n_splits BT N].
    """
    groups = N // HEADS
    tiles = B * T * groups * n_splits
    blocks = min(tiles, n_multiprocessors)
    scale_log2 = scale * math.log2(math.e)  # softmax in base 2
    out_dtype = jnp.bfloat16 if n_splits == 1 else jnp.float32
    steps = STEPS[fp8, interpret](K)
    consumer_registers, producer_registers = REGISTERS[fp8]
    n_key_arrays = 3 if fp8 else 2

    def body(q_latent, q_rope, indices, key_arrays, out, lse, q0, q1, q2, keys, p1, rows, q_ready,
             q_free, free0l, free0r, free1l, free1r, p0_ready, p1_ready, start, *arrived):  # fmt: skip
        statistics, no_key, ready = rows, rows.at[pl.ds(4, 2)], rows.at[6]
        warpgroup = lax.axis_index("warpgroup")
        block = lax.axis_index("block")
        n_tiles = (tiles - block + blocks - 1) // blocks

        def place(i):
            """(row of the flattened queries, first head, split) of this block's i-th tile.

            Neighbouring blocks hold the head groups of one query: the second gather of a row hits the L2 cache.
            """
            tile = block + i * blocks
            return tile // groups % (B * T), tile % groups * HEADS, tile // (groups * B * T)

        def logits(slot, round_):
            """q K[slot]^T; missing keys start at NO_KEY."""
            s = None
            for group, tiles in enumerate(GROUPS[0] + GROUPS[1]):
                steps.wait_rows(4 * slot + group, ready, arrived, round_)
                if s is None:
                    s = plgpu.load(no_key.at[slot], layout=PER_KEY, optimized=False)
                    s = plgpu.layout_cast(lax.broadcast_in_dim(s, (HEADS, KEYS), [1]), plgpu.Layout.WGMMA)
                for q, of_q in ((q0, range(0, 4)), (q1, range(4, 8)), (q2, range(8, 9))):
                    if shared := [t for t in tiles if t in of_q]:
                        width = 64 * len(shared)
                        of_keys = keys.at[slot, :, pl.ds(64 * shared[0], width)]
                        s = steps.start_matmul(s, q.at[:, pl.ds(64 * (shared[0] - of_q[0]), width)], of_keys)
            return steps.finish_matmul(s)

        def raised(highest, s):
            """The running maximum after the logits s; a rise below SLACK is left for later."""
            found = s.max(axis=1) * scale_log2
            return jnp.where(found > highest + SLACK, found, highest)

        def publish(s, highest, half, p_ref, barrier):
            """Half of the probabilities (up to exp2(maximum)), written to p_ref for the other consumer too."""
            s = s[:, half * KEYS // 2 : (half + 1) * KEYS // 2]
            p = jnp.exp2(s * scale_log2 - lax.broadcast_in_dim(highest, s.shape, [0]))
            p16 = p.astype(jnp.bfloat16)
            steps.store_half(p_ref, p16, half)
            plgpu.barrier_arrive(barrier.at[half])
            return p16, p.sum(axis=1)

        def load_statistic(row):
            return plgpu.load(statistics.at[row], layout=PER_HEAD, optimized=False)

        def zero_state():
            return (
                plgpu.layout_cast(jnp.zeros((HEADS, HALF), jnp.float32), plgpu.Layout.WGMMA),
                plgpu.layout_cast(jnp.full((HEADS,), NO_MAXIMUM, jnp.float32), PER_HEAD),
                plgpu.layout_cast(jnp.zeros((HEADS,), jnp.float32), PER_HEAD),
            )

        p0 = keys.at[0, :, pl.ds(LATENT, ROPE)]  # K[0]'s rotated columns are dead once S0 is known

        def store_tile(i, consumer, acc, highest, total):
            # in turn, so that neither barrier completes twice before it is waited for
            if consumer == 1:
                plgpu.barrier_wait(p0_ready.at[0])
            statistics[2 + consumer] = total
            plgpu.barrier_arrive((p0_ready, p1_ready)[consumer].at[0])
            if consumer == 0:
                plgpu.barrier_wait(p1_ready.at[0])
            total = total + load_statistic(3 - consumer)
            row, head, split = place(i)
            acc = acc * lax.broadcast_in_dim(1.0 / jnp.where(total == 0.0, 1.0, total), acc.shape, [0])
            own_part = out.at[split, row, pl.ds(head, HEADS), pl.ds(HALF * consumer, HALF)]
            steps.store_out(own_part, acc.astype(out_dtype))
            if consumer == 1:
                natural = (highest + jnp.log2(total)) * math.log(2.0)
                lse[split, row, pl.ds(head, HEADS)] = jnp.where(total == 0.0, -jnp.inf, natural)

        @pl.when(warpgroup == 0)
        def _consumer_0():
            plgpu.set_max_registers(consumer_registers, action="increase")
            plgpu.barrier_wait(start.at[0])

            def tile(i, _):
                plgpu.barrier_wait(q_ready)

                def pair(t, state):
                    acc, highest, total = state
                    s = logits(0, i * pairs + t)
                    pl.when(t == pairs - 1)(lambda: plgpu.barrier_arrive(q_free))
                    highest0 = raised(highest, s)
                    statistics[0] = highest0
                    alpha = jnp.exp2(highest - highest0)
                    acc, total = steps.rescale(acc, alpha), total * alpha
                    for half in range(2):
                        p16, row_sum = publish(s, highest0, half, p0, p0_ready)
                        acc = steps.start_matmul(acc, p16, keys.at[0, :, pl.ds(0, HALF)], half)
                        total = total + row_sum
                    acc = steps.finish_matmul(acc)
                    plgpu.barrier_arrive(free0l)

                    plgpu.barrier_wait(p1_ready.at[0])
                    highest1 = load_statistic(1)
                    alpha = jnp.exp2(highest0 - highest1)
                    acc = steps.rescale(acc, alpha)
                    acc = steps.start_matmul(acc, p1, keys.at[1, :, pl.ds(0, HALF)], 0)
                    plgpu.barrier_wait(p1_ready.at[1])
                    acc = steps.start_matmul(acc, p1, keys.at[1, :, pl.ds(0, HALF)], 1)
                    acc = steps.finish_matmul(acc)
                    plgpu.barrier_arrive(free1l)
                    return acc, highest1, total * alpha

                state = lax.fori_loop(0, pairs, pair, zero_state())
                store_tile(i, 0, *state)
                return ()

            lax.fori_loop(0, n_tiles, tile, ())

        @pl.when(warpgroup == 1)
        def _consumer_1():
            plgpu.set_max_registers(consumer_registers, action="increase")
            plgpu.barrier_wait(start.at[1])

            def tile(i, _):
                plgpu.barrier_wait(q_ready)

                def pair(t, state):
                    acc, highest, total = state
                    s = logits(1, i * pairs + t)
                    pl.when(t == pairs - 1)(lambda: plgpu.barrier_arrive(q_free))
                    plgpu.barrier_wait(p0_ready.at[0])
                    highest0 = load_statistic(0)
                    alpha0 = jnp.exp2(highest - highest0)
                    acc = steps.rescale(acc, alpha0)
                    acc = steps.start_matmul(acc, p0, keys.at[0, :, pl.ds(HALF, HALF)], 0)
                    highest1 = raised(highest0, s)
                    statistics[1] = highest1
                    plgpu.barrier_wait(p0_ready.at[1])
                    acc = steps.start_matmul(acc, p0, keys.at[0, :, pl.ds(HALF, HALF)], 1)
                    (p16_0, sum_0), (p16_1, sum_1) = (
                        publish(s, highest1, half, p1, p1_ready) for half in range(2)
                    )
                    alpha1 = jnp.exp2(highest0 - highest1)
                    total = total * (alpha0 * alpha1) + (sum_0 + sum_1)
                    acc = steps.finish_matmul(acc)
                    plgpu.barrier_arrive(free0r)

                    acc = steps.rescale(acc, alpha1)
                    acc = steps.start_matmul(acc, p16_0, keys.at[1, :, pl.ds(HALF, HALF)], 0)
                    acc = steps.start_matmul(acc, p16_1, keys.at[1, :, pl.ds(HALF, HALF)], 1)
                    acc = steps.finish_matmul(acc)
                    plgpu.barrier_arrive(free1r)
                    return acc, highest1, total

                state = lax.fori_loop(0, pairs, pair, zero_state())
                store_tile(i, 1, *state)
                return ()

            lax.fori_loop(0, n_tiles, tile, ())

        @pl.when(warpgroup == 2)
        def _producer():
            plgpu.set_max_registers(producer_registers, action="decrease")
            steps.init_barriers(ready)
            plgpu.barrier_arrive(start.at[0])
            plgpu.barrier_arrive(start.at[1])

            def tile(i, _):
                row, head, split = place(i)
                pl.when(i > 0)(lambda: plgpu.barrier_wait(q_free))
                heads = pl.ds(head, HEADS)
                plgpu.copy_gmem_to_smem(q_latent.at[row, heads, pl.ds(0, HALF)], q0, q_ready)
                plgpu.copy_gmem_to_smem(q_latent.at[row, heads, pl.ds(HALF, HALF)], q1, q_ready)
                plgpu.copy_gmem_to_smem(q_rope.at[row, heads], q2, q_ready)
                sources = tuple(x.at[row // T] for x in key_arrays)

                def pair(t, state):
                    found, ahead = state
                    following = steps.load_indices(indices.at[row], (split * pairs + t + 1) * PAIR)

                    def wait_free(slot, part):
                        free = ((free0l, free0r), (free1l, free1r))[slot][part]
                        pl.when((i > 0) | (t > 0))(functools.partial(plgpu.barrier_wait, free))

                    ahead = steps.gather(
                        found, following, ahead, sources, wait_free, keys, no_key, ready, arrived
                    )
                    return following, ahead

                first = steps.load_indices(indices.at[row], split * pairs * PAIR)
                lax.fori_loop(0, pairs, pair, (first, steps.prefetch(first, sources)))
                return ()

            lax.fori_loop(0, n_tiles, tile, ())
            for barrier in (free0l, free0r, free1l, free1r, q_free):
                plgpu.barrier_wait(barrier)

    tiled = functools.partial(plgpu.SMEM, dtype=jnp.bfloat16, transforms=TRANSFORMS)

    def entry(q_latent, q_rope, indices, *refs):
        key_arrays, results = refs[:n_key_arrays], refs[n_key_arrays:]
        pl.run_scoped(
            functools.partial(body, q_latent, q_rope, indices, key_arrays, *results),
            tiled((HEADS, HALF)),
            tiled((HEADS, HALF)),
            tiled((HEADS, ROPE)),
            tiled((2, KEYS, COLUMNS)),
            tiled((HEADS, KEYS)),
            plgpu.SMEM((7, 64), jnp.float32),
            plgpu.Barrier(num_arrivals=3),
            plgpu.Barrier(num_arrivals=2),
            *[plgpu.Barrier()] * 4,
            *[plgpu.Barrier(num_barriers=2)] * 3,
            *[plgpu.Barrier()] * (8 if interpret else 0),
            collective_axes="warpgroup",
        )

    return plgpu.kernel(
        entry,
        out_type=[
            jax.ShapeDtypeStruct((n_splits, B * T, N, LATENT), out_dtype),
            jax.ShapeDtypeStruct((n_splits, B * T, N), jnp.float32),
        ],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,  # rows are reduced within four lanes
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
    )
