"""sparse_mla: multi-query attention over the selected latents, with its gradient."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Implementations, Kernel, dispatch, has_kernel
from pallas_kernels.hopper.versions import HOPPER_TESTED_JAX
from pallas_kernels.sparse_mla import xla
from pallas_kernels.sparse_mla.xla import Operands

_FORWARD: Implementations = {
    "xla": xla.forward,
    "mosaic_gpu": Kernel("pallas_kernels.sparse_mla.mosaic_gpu", "forward", tested=HOPPER_TESTED_JAX),
}
_BACKWARD: Implementations = {"xla": xla.backward}
_CHECKS: Implementations = {
    "mosaic_gpu": Kernel("pallas_kernels.sparse_mla.mosaic_gpu", "check", tested=HOPPER_TESTED_JAX)
}


def sparse_mla_has_kernel(C: int, R: int, dtype: jnp.dtype, implementation: str | None = None) -> bool:
    """Whether ``sparse_mla`` runs a kernel here, and not XLA, for queries of these widths and dtype."""
    return has_kernel("sparse_mla", _CHECKS, implementation, C, R, dtype)


def sparse_mla(
    q_latent: jax.Array,
    q_rope: jax.Array,
    latent: jax.Array,
    k_rope: jax.Array,
    topk_indices: jax.Array,
    *,
    scale: float,
    latent_scale: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention of every query over its own list of keys; the latent is both key and value.

    Equivalent to, for one query with its valid indices ``i``:

        logits = (q_latent @ latent[i].T + q_rope @ k_rope[i].T) * scale     # [N K]
        out, lse = softmax(logits) @ latent[i], logsumexp(logits)            # [N C], [N]

    An FP8 cache is read in FP8. With ``latent_scale`` the latents are, before all else,

        latent = (latent.astype(float32) * repeat(latent_scale, C // G, axis=-1)).astype(q_latent.dtype)

    A query without a valid index gives out = 0 and lse = -inf, and gradients of 0. Logits, softmax and
    accumulation are float32. Differentiable (reverse mode) in q_latent, q_rope, latent and k_rope, through
    ``out`` and ``lse``; gradients of the keys are accumulated in float32. An FP8 cache has no gradient. The indices of
    a query must be unique, apart from -1 (this is not checked).

    Args:
      q_latent: [B T N C] queries absorbed into the latent space (q_nope W_uk).
      q_rope: [B T N R] rotated part of the queries.
      latent: [B S C] normalised compressed keys and values, shared by all heads; float8_e4m3fn if
        ``latent_scale`` is given.
      k_rope: [B S R] rotated keys, shared by all heads.
      topk_indices: [B T K] int32, each -1 (no key) or in [0, S); -1 may stand anywhere.
      scale: softmax scale, ``ModelConfig.softmax_scale``.
      latent_scale: [B S G] float32, one scale per C / G values of a latent; DeepSeek's cache has one per 128.
      implementation: see ``pallas_kernels.dispatch``; the gradient is dispatched in the same way.

    Returns:
      out [B T N C] in the dtype of q_latent; lse [B T N] float32, natural logarithm.

    Raises:
      ValueError: shapes or dtypes contradict each other.

    Source: DeepSeek-V3.2-Exp report, eq. (2), section 2.1 (MQA mode of MLA).
    """
    if q_latent.ndim != 4:
        raise ValueError(f"q_latent must have shape [B T N C], got {q_latent.shape}")
    B, T, N, C = q_latent.shape
    S, R = latent.shape[1], q_rope.shape[-1]
    for name, array, expected in (
        ("q_rope", q_rope, (B, T, N, R)),
        ("latent", latent, (B, S, C)),
        ("k_rope", k_rope, (B, S, R)),
        ("topk_indices", topk_indices, (B, T, topk_indices.shape[-1])),
    ):
        if array.shape != expected:
            raise ValueError(f"{name} must have shape {expected} to match q_latent {q_latent.shape}, "
                             f"got {array.shape}")  # fmt: skip
    same = {"q_latent": q_latent, "q_rope": q_rope, "latent": latent, "k_rope": k_rope}
    if latent_scale is not None:
        if latent_scale.shape[:2] != (B, S) or latent_scale.ndim != 3 or C % latent_scale.shape[2]:
            raise ValueError(f"latent_scale must have shape {(B, S)} and a divisor of C={C}, to match latent "
                             f"{latent.shape}, got {latent_scale.shape}")  # fmt: skip
        if (latent.dtype, latent_scale.dtype) != (jnp.float8_e4m3fn, jnp.float32):
            dtypes = [str(x.dtype) for x in (latent, latent_scale)]
            raise ValueError(f"latent and latent_scale must be float8_e4m3fn and float32, got {dtypes}")
        del same["latent"]
    if len({x.dtype for x in same.values()}) > 1:
        dtypes = [str(x.dtype) for x in same.values()]
        raise ValueError(f"{', '.join(same)} must have one dtype, got {dtypes}")
    operands = Operands(q_latent, q_rope, latent, k_rope)
    if latent_scale is None:
        return _attend(scale, implementation, operands, topk_indices)
    return _attend_fp8(scale, implementation, *operands, topk_indices, latent_scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
    scale: float, implementation: str | None, operands: Operands, topk_indices: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return dispatch("sparse_mla", _FORWARD, implementation, *operands, topk_indices, scale=scale)


def _attend_forward(
    scale: float, implementation: str | None, operands: Operands, topk_indices: jax.Array
) -> tuple[Any, Any]:
    results = _attend(scale, implementation, operands, topk_indices)
    return results, (operands, topk_indices, results)


def _attend_backward(scale: float, implementation: str | None, residuals: Any, cotangents: Any) -> Any:
    name = "sparse_mla gradient"
    gradients = dispatch(name, _BACKWARD, implementation, *residuals, cotangents, scale=scale)
    return gradients, None  # topk_indices are integers


_attend.defvjp(_attend_forward, _attend_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend_fp8(scale: float, implementation: str | None, *arrays: jax.Array) -> Any:
    return dispatch("sparse_mla over an FP8 cache", _FORWARD, implementation, *arrays, scale=scale)


def _refuse(scale: float, implementation: str | None, *_: Any) -> Any:
    raise NotImplementedError("sparse_mla has no gradient over an FP8 cache: dequantise the latents to train")


_attend_fp8.defvjp(_refuse, _refuse)
