"""The model's matrix products. Every weight is stored [in, out]."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsa_jax.adapted import AdaptedWeight
from dsa_jax.fp8.weight import Fp8Weight, as_matrix


def linear(
    x: Float[Array, "*tokens In"], weight: Float[Array, "In Out"] | Fp8Weight | AdaptedWeight
) -> Float[Array, "*tokens Out"]:
    """``x @ weight`` in the dtype of x; an FP8 weight is dequantised first. No linear of DeepSeek-V3.2 has a bias.

    With an adapter x W + (x A) B, summed in float32 and rounded once to the dtype of x.
    """
    if not isinstance(weight, AdaptedWeight):
        return x @ as_matrix(weight, x.dtype)
    product = jnp.matmul(x, as_matrix(weight.weight, x.dtype), preferred_element_type=jnp.float32)
    return (product + linear_float32(linear_float32(x, weight.a), weight.b)).astype(x.dtype)


def linear_float32(
    x: Float[Array, "*tokens In"], weight: Float[Array, "In Out"]
) -> Float[Array, "*tokens Out"]:
    """``float(x) @ float(weight)``, never rounded to bfloat16 or TF32.

    For the router and the indexer's weights_proj, whose outputs decide which experts and keys are selected, so that
    rounding could change the selection; and for adapters.
    """
    x32, weight32 = x.astype(jnp.float32), weight.astype(jnp.float32)
    return jnp.matmul(x32, weight32, precision=jax.lax.Precision.HIGHEST)
