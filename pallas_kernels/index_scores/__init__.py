"""index_scores: the lightning indexer's score of every visible key for every query."""

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Implementations, Kernel, dispatch, has_kernel
from pallas_kernels.hopper.versions import HOPPER_TESTED_JAX
from pallas_kernels.index_scores import xla

_IMPLEMENTATIONS: Implementations = {
    "xla": xla.index_scores,
    "mosaic_gpu": Kernel("pallas_kernels.index_scores.mosaic_gpu", "index_scores", tested=HOPPER_TESTED_JAX),
}
_CHECKS: Implementations = {
    "mosaic_gpu": Kernel("pallas_kernels.index_scores.mosaic_gpu", "check", tested=HOPPER_TESTED_JAX)
}


def index_scores_has_kernel(I: int, J: int, dtype: jnp.dtype, implementation: str | None = None) -> bool:
    """Whether ``index_scores`` runs a kernel here, and not XLA, for queries of these sizes and dtype."""
    return has_kernel("index_scores", _CHECKS, implementation, I, J, dtype)


def index_scores(
    q: jax.Array,
    k: jax.Array,
    weights: jax.Array,
    key_start: jax.Array,
    key_stop: jax.Array,
    *,
    k_scale: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """I[t, s] = k_scale[s] * sum_i weights[t, i] * relu(q[t, i] . k[s]), -inf where s is not visible.

    Equivalent to:

        dots = jnp.einsum("BTIJ,BSJ->BTIS", q, k)
        scores = jnp.einsum("BTIS,BTI->BTS", jax.nn.relu(dots), weights) * k_scale[:, None, :]
        visible = (key_start[..., None] <= arange(S)) & (arange(S) < key_stop[..., None])
        return jnp.where(visible, scores, -inf)

    The ReLU acts on the unscaled dot product; the weights are neither normalised nor made positive.
    Constant factors (index_head_dim ** -0.5, index_n_heads ** -0.5) and the scales of quantised queries
    are positive, commute with the ReLU and belong in ``weights``. Differentiable in q, k, weights, k_scale.

    Args:
      q: [B T I J], float32, bfloat16 or float8_e4m3fn.
      k: [B S J], the same dtype; one key per token, shared by the index heads.
      weights: [B T I] float32.
      key_start, key_stop: [B T] int32, the interval of keys that each query may see.
      k_scale: [B S] float32, the scales of quantised keys; None means 1.
      implementation: see ``pallas_kernels.dispatch``.

    Returns:
      [B T S] float32 (float64 for float64 inputs).

    Raises:
      ValueError: shapes or dtypes contradict each other.

    Source: DeepSeek-V3.2-Exp report, eq. (1); scale order as in DeepSeek's fp8 index kernel.
    """
    B, T, I, J = _shape(q, 4, "q [B T I J]")
    S = _shape(k, 3, "k [B S J]")[1]
    for name, array, expected in (
        ("k", k, (B, S, J)),
        ("weights", weights, (B, T, I)),
        ("key_start", key_start, (B, T)),
        ("key_stop", key_stop, (B, T)),
        ("k_scale", k_scale, (B, S)),
    ):
        if array is not None and array.shape != expected:
            raise ValueError(f"{name} must have shape {expected} to match q {q.shape}, got {array.shape}")
    if q.dtype != k.dtype:
        raise ValueError(f"q and k must have one dtype, got {q.dtype} and {k.dtype}")
    return dispatch(
        "index_scores", _IMPLEMENTATIONS, implementation, q, k, weights, key_start, key_stop, k_scale
    )


def _shape(array: jax.Array, ndim: int, name: str) -> tuple[int, ...]:
    if array.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got shape {array.shape}")
    return array.shape
