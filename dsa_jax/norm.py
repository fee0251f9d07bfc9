"""RMSNorm and LayerNorm, computed in float32 and rounded once, after the multiplication by the weight."""

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def rms_norm(
    x: Float[Array, "*tokens D"], weight: Float[Array, " D"], eps: float, dtype: DTypeLike | None = None
) -> Float[Array, "*tokens D"]:
    """weight * x / sqrt(mean(x^2) + eps), returned in ``dtype`` (default: that of x)."""
    x32 = x.astype(jnp.float32)
    inverse_rms = lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * inverse_rms * weight).astype(dtype or x.dtype)


def layer_norm(
    x: Float[Array, "*tokens D"], scale: Float[Array, " D"], bias: Float[Array, " D"], eps: float
) -> Float[Array, "*tokens D"]:
    """LayerNorm with scale and bias. The indexer applies it to its keys, where other norms are RMSNorms."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    inverse_std = lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)
    return (centred * inverse_std * scale + bias).astype(x.dtype)
