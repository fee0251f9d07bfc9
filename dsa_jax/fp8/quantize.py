"""FP8 (e4m3) quantisation of activations with one scale per token and 128 values, and the Hadamard rotation.

With power-of-two scales the dequantised value is exact in bf16, so "fake" quantisation (quantise, then
dequantise) reproduces the deployed FP8 numbers without FP8 arithmetic.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

BLOCK = 128
E4M3_MAX = 448.0
SMALLEST_AMAX = 1e-4  # keeps the scale of an all-zero block finite


def quantize(
    x: Float[Array, "*rows X"], *, ue8m0: bool = True
) -> tuple[Float[Array, "*rows X"], Float[Array, "*rows blocks"]]:
    """(float8_e4m3fn values, float32 scales); ``values * scales`` per block of 128 restores x.

    ue8m0 rounds each scale up to a power of two, as DeepSeek-V3.2 does (``act_quant`` of its kernel.py).

    Raises:
      ValueError: the last axis is not a multiple of 128.
    """
    if x.shape[-1] % BLOCK:
        raise ValueError(f"the quantised axis must be a multiple of {BLOCK}, got {x.shape[-1]}")
    blocks = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, BLOCK)
    scales = jnp.maximum(jnp.abs(blocks).max(axis=-1), SMALLEST_AMAX) / E4M3_MAX
    if ue8m0:
        scales = _power_of_two_at_least(scales)
    values = _round_to_e4m3(jnp.clip(blocks / scales[..., None], -E4M3_MAX, E4M3_MAX))
    return values.astype(jnp.float8_e4m3fn).reshape(x.shape), scales


def fake_quantize(x: Float[Array, "*rows X"], *, ue8m0: bool = True) -> Float[Array, "*rows X"]:
    """x as FP8 storage would return it, in the dtype of x; the gradient passes straight through."""
    values, scales = quantize(lax.stop_gradient(x), ue8m0=ue8m0)
    blocks = values.astype(jnp.float32).reshape(*scales.shape, BLOCK) * scales[..., None]
    return x + lax.stop_gradient(blocks.reshape(x.shape).astype(x.dtype) - x)


def _round_to_e4m3(x: jax.Array) -> jax.Array:
    """float32 x within +-448, rounded to the nearest (even) e4m3 value.

    XLA's GPU backend drops a conversion to a narrower type that is at once undone; it never drops these steps.
    """
    normal = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=3)
    subnormal = jnp.round(x * 2.0**9) * 2.0**-9
    return jnp.where(jnp.abs(x) < 2.0**-6, subnormal, normal)


def _power_of_two_at_least(x: jax.Array) -> jax.Array:
    """2 ** ceil(log2 x) for positive normal float32 x, exactly: from the bits, not from a logarithm."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    exponent = (bits >> 23) + (bits & 0x7FFFFF != 0)
    return lax.bitcast_convert_type(exponent << 23, jnp.float32)


def rotate_hadamard(x: Float[Array, "*rows X"]) -> Float[Array, "*rows X"]:
    """x H / sqrt(X), H the Hadamard matrix in Sylvester's order; X a power of two.

    Orthogonal: it changes no dot product, only spreads outliers before quantisation. Needed on queries and
    keys together or on neither.
    """
    if x.dtype == jnp.bfloat16:  # signs are exact in it, and so are the products
        sums = jnp.matmul(x, _hadamard(x.shape[-1]).astype(x.dtype), preferred_element_type=jnp.float32)
        return (sums * x.shape[-1] ** -0.5).astype(x.dtype)
    matrix = _hadamard(x.shape[-1]) * np.float32(x.shape[-1] ** -0.5)
    return jnp.matmul(x.astype(jnp.float32), matrix, precision=lax.Precision.HIGHEST).astype(x.dtype)


def _hadamard(size: int) -> np.ndarray:
    matrix = np.ones((1, 1), np.float32)
    while matrix.shape[0] < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix
