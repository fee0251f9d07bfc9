"""sparse_mla on Hopper GPUs: one Pallas Mosaic GPU kernel for prefill and, split over the keys, for decode.

A thread block serves one query and 64 of its heads at a time, and walks over the keys in pairs of blocks of 64.

    mosaic_gpu_plan       sizes, division of work, shared memory
    mosaic_gpu_kernel     the three warpgroups and their barriers
    mosaic_gpu_steps      what they ask of the hardware, and its twin for the interpreter
    mosaic_gpu_hardware   the same on Hopper
    mosaic_gpu_fp8        the same for an FP8 cache
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.hopper import device
from pallas_kernels.sparse_mla.mosaic_gpu_kernel import build
from pallas_kernels.sparse_mla.mosaic_gpu_plan import (
    HEADS,
    LATENT,
    PAIR,
    ROPE,
    SCALE_BLOCK,
    SMALLEST_SCALE,
    Inputs,
    Plan,
    split_keys,
)


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
      NotImplementedError: not a Hopper GPU; a dtype other than bfloat16 (latents also float8_e4m3fn with one scale
        per 128 values); widths other than 512 + 64; or a scale below 1e-6.
    """
    B, T, N, C = q_latent.shape
    S, R, K = latent.shape[1], q_rope.shape[-1], topk_indices.shape[-1]
    _check_contract(C, R, q_latent.dtype)
    if latent_scale is not None and latent_scale.shape[2] != LATENT // SCALE_BLOCK:
        raise NotImplementedError(
            f"the kernel takes one scale per {SCALE_BLOCK} values, got {latent_scale.shape[2]} for {LATENT}"
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
    n_splits, pairs = split_keys(B * T * heads // HEADS, -(-K // PAIR), n_multiprocessors)
    fp8 = latent_scale is not None
    plan = Plan(B, T, heads, K, n_splits, pairs, scale, fp8, n_multiprocessors, interpret)
    inputs = Inputs(
        q_latent.reshape(B * T, heads, C),
        q_rope.reshape(B * T, heads, R),
        topk_indices.astype(jnp.int32).reshape(B * T, K),
        latent,
        latent_scale,
        k_rope,
    )
    out, lse = build(plan)(inputs)
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


def _merge(out: Float[Array, "X BT N C"], lse: Float[Array, "X BT N"]) -> tuple[jax.Array, jax.Array]:
    """Merges the results of the splits; a split without keys has lse -inf and weight 0."""
    highest = lse.max(axis=0)
    weights = jnp.exp(lse - jnp.where(highest == -jnp.inf, 0.0, highest))
    total = weights.sum(axis=0)
    merged = (out * weights[..., None]).sum(axis=0) / jnp.where(total == 0.0, 1.0, total)[..., None]
    return merged.astype(jnp.bfloat16), jnp.log(total) + highest
