"""masked_mha: MLA in its expanded multi-head form, over all visible keys or a selected set of them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values

from pallas_kernels.dispatch import Implementations, Kernel, dispatch
from pallas_kernels.masked_mha import xla
from pallas_kernels.masked_mha.xla import Operands, VisibleKeys
from pallas_kernels.private_jax import CUDNN_TESTED_JAX

_FORWARD: Implementations = {
    "xla": xla.forward,
    "cudnn": Kernel("pallas_kernels.masked_mha.cudnn", "forward", tested=CUDNN_TESTED_JAX),
}
_BACKWARD: Implementations = {
    "xla": xla.backward,
    "cudnn": Kernel("pallas_kernels.masked_mha.cudnn", "backward", tested=CUDNN_TESTED_JAX),
}


def masked_mha(
    q_nope: jax.Array,
    q_rope: jax.Array,
    k_nope: jax.Array,
    k_rope: jax.Array,
    v: jax.Array,
    key_start: jax.Array,
    key_stop: jax.Array,
    topk_indices: jax.Array | None = None,
    *,
    scale: float,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention over the visible keys, or over those of them that ``topk_indices`` lists.

    Dense attention when ``topk_indices`` is None. With indices it computes what ``sparse_mla`` computes
    on absorbed queries, by masking instead of gathering. That takes 3.4 times fewer operations per key, but multiplies
    all keys, so it pays for short sequences; the model chooses between the two. Equivalent to:

        logits = (einsum("BTNP,BSNP->BTNS", q_nope, k_nope) + einsum("BTNR,BSR->BTNS", q_rope, k_rope)) * scale
        logits = where(seen[:, :, None, :], logits, -inf)
        out, lse = einsum("BTNS,BSNH->BTNH", softmax(logits), v), logsumexp(logits)

    A query without a key gives out = 0, lse = -inf and gradients of 0. Logits, softmax and accumulation
    are float32. Differentiable (reverse mode) in q_nope, q_rope, k_nope, k_rope and v.

    Args:
      q_nope: [B T N P];  q_rope: [B T N R], rotated.
      k_nope: [B S N P];  k_rope: [B S R], rotated, shared by all heads;  v: [B S N H].
      key_start, key_stop: [B T] int32, the interval of keys that each query may see.
      topk_indices: [B T K] int32 with -1 for "no key", or None for every visible key.
      scale: softmax scale, ``ModelConfig.softmax_scale``.
      implementation: see ``pallas_kernels.dispatch``.

    Returns:
      out [B T N H] in the dtype of q_nope; lse [B T N] float32, natural logarithm.

    Raises:
      ValueError: shapes contradict each other.

    Source: DeepSeek-V3.2-Exp report, section 2.3 (masked MHA mode for short prefill).
    """
    if q_nope.ndim != 4:
        raise ValueError(f"q_nope must have shape [B T N P], got {q_nope.shape}")
    B, T, N, P = q_nope.shape
    S, R, H = k_nope.shape[1], q_rope.shape[-1], v.shape[-1]
    for name, array, expected in (
        ("q_rope", q_rope, (B, T, N, R)),
        ("k_nope", k_nope, (B, S, N, P)),
        ("k_rope", k_rope, (B, S, R)),
        ("v", v, (B, S, N, H)),
        ("key_start", key_start, (B, T)),
        ("key_stop", key_stop, (B, T)),
        ("topk_indices", topk_indices, None if topk_indices is None else (B, T, topk_indices.shape[-1])),
    ):
        if array is not None and array.shape != expected:
            raise ValueError(
                f"{name} must have shape {expected} to match q_nope {q_nope.shape}, got {array.shape}"
            )
    operands = Operands(q_nope, q_rope, k_nope, k_rope, v)
    return _attend(scale, implementation, operands, VisibleKeys(key_start, key_stop, topk_indices))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(scale: float, implementation: str | None, operands: Operands, keys: VisibleKeys) -> Any:
    return dispatch("masked_mha", _FORWARD, implementation, operands, keys, scale=scale)


def _attend_forward(scale: float, implementation: str | None, operands: Any, keys: Any) -> Any:
    operands, keys = custom_vjp_primal_tree_values((operands, keys))
    results = _attend(scale, implementation, operands, keys)
    return results, (operands, keys, results)


def _attend_backward(scale: float, implementation: str | None, residuals: Any, cotangents: Any) -> Any:
    d_out, d_lse = cotangents
    if isinstance(d_out, SymbolicZero):
        d_out = jnp.zeros(d_out.shape, d_out.dtype)
    if isinstance(d_lse, SymbolicZero):  # nobody uses lse, or what uses it has no gradient
        d_lse = None
    name = "masked_mha gradient"
    gradients = dispatch(name, _BACKWARD, implementation, *residuals, (d_out, d_lse), scale=scale)
    return gradients, None  # intervals and indices are integers


_attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)
