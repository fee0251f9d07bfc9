"""The one matrix product of the model: every weight is stored [in, out]."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsa_jax.fp8.weight import Fp8Weight, as_matrix


def linear(
    x: Float[Array, "*tokens In"], weight: Float[Array, "In Out"] | Fp8Weight
) -> Float[Array, "*tokens Out"]:
    """``x @ weight`` in the dtype of x, a weight kept in FP8 dequantised. No layer of DeepSeek-V3.2 has a bias."""
    return x @ as_matrix(weight, x.dtype)


def linear_float32(
    x: Float[Array, "*tokens In"], weight: Float[Array, "In Out"]
) -> Float[Array, "*tokens Out"]:
    """``float(x) @ float(weight)``, never rounded to bf16 or TF32: the router and the indexer's weights_proj.

    Their outputs decide which experts and keys are chosen, so rounding changes the model, not its noise.
    """
    x32, weight32 = x.astype(jnp.float32), weight.astype(jnp.float32)
    return jnp.matmul(x32, weight32, precision=jax.lax.Precision.HIGHEST)
