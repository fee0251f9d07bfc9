"""The model's matrix products. Every weight is stored [in, out]."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsa_jax.fp8.weight import Fp8Weight, as_matrix


def linear(
    x: Float[Array, "*tokens In"], weight: Float[Array, "In Out"] | Fp8Weight
) -> Float[Array, "*tokens Out"]:
    """``x @ weight`` in the dtype of x; an FP8 weight is dequantised first. No linear of DeepSeek-V3.2 has a bias."""
    return x @ as_matrix(weight, x.dtype)


def linear_float32(
    x: Float[Array, "*tokens In"], weight: Float[Array, "In Out"]
) -> Float[Array, "*tokens Out"]:
    """``float(x) @ float(weight)``, never rounded to bfloat16 or TF32: for the router and the indexer's weights_proj.

    Their outputs decide which experts and keys are selected, so rounding could change the selection.
    """
    x32, weight32 = x.astype(jnp.float32), weight.astype(jnp.float32)
    return jnp.matmul(x32, weight32, precision=jax.lax.Precision.HIGHEST)
