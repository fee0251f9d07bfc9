"""FP8 (e4m3) quantisation of activations, one scale per 128 values of a token, and the Hadamard rotation.

With power-of-two scales the dequantised value is exact in bf16. "Fake" quantisation (quantise, then dequantise)
therefore reproduces the numbers of an FP8 deployment without FP8 arithmetic.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from dsa_jax.fp8.e4m3 import BLOCK, E4M3_MAX, scale_of


def quantize(
    x: Float[Array, "*rows X"], *, ue8m0: bool = True
) -> tuple[Float[Array, "*rows X"], Float[Array, "*rows blocks"]]:
    """(float8_e4m3fn values, float32 scales), one scale per 128 values of the last axis; x is about their product.

    ue8m0 rounds each scale up to a power of two, as DeepSeek-V3.2 does (``act_quant`` of inference/kernel.py).

    Raises:
      ValueError: the last axis is not a multiple of 128.
    """
    if x.shape[-1] % BLOCK:
        raise ValueError(f"the quantised axis must be a multiple of {BLOCK}, got {x.shape[-1]}")
    blocks = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, BLOCK)
    scales = scale_of(jnp.abs(blocks).max(axis=-1), ue8m0=ue8m0)
    values = _round_to_e4m3(jnp.clip(blocks / scales[..., None], -E4M3_MAX, E4M3_MAX))
    return values.astype(jnp.float8_e4m3fn).reshape(x.shape), scales


def fake_quantize(x: Float[Array, "*rows X"], *, ue8m0: bool = True) -> Float[Array, "*rows X"]:
    """x after quantisation and dequantisation, in the dtype of x. Its gradient is the identity (straight-through).

    Raises:
      ValueError: the last axis is not a multiple of 128.
    """
    values, scales = quantize(lax.stop_gradient(x), ue8m0=ue8m0)
    blocks = values.astype(jnp.float32).reshape(*scales.shape, BLOCK) * scales[..., None]
    return x + lax.stop_gradient(blocks.reshape(x.shape).astype(x.dtype) - x)


def _round_to_e4m3(x: jax.Array) -> jax.Array:
    """float32 x within +-448, rounded to the nearest e4m3 value, ties to even.

    XLA's GPU backend drops a conversion to a narrower type that is undone at once. It never drops these steps.
    """
    normal = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=3)
    subnormal = jnp.round(x * 2.0**9) * 2.0**-9
    return jnp.where(jnp.abs(x) < 2.0**-6, subnormal, normal)


def rotate_hadamard(x: Float[Array, "*rows X"]) -> Float[Array, "*rows X"]:
    """x H / sqrt(X), where H is the Hadamard matrix in Sylvester's order and X is a power of two.

    The rotation is orthogonal: dot products stay, and outliers are spread over the row before quantisation. It must
    be applied to both queries and keys, or to neither.
    """
    if x.dtype == jnp.bfloat16:  # +-1 is exact in bfloat16, and so are the products
        sums = jnp.matmul(x, _hadamard(x.shape[-1]).astype(x.dtype), preferred_element_type=jnp.float32)
        return (sums * x.shape[-1] ** -0.5).astype(x.dtype)
    matrix = _hadamard(x.shape[-1]) * np.float32(x.shape[-1] ** -0.5)
    return jnp.matmul(x.astype(jnp.float32), matrix, precision=lax.Precision.HIGHEST).astype(x.dtype)


def _hadamard(size: int) -> np.ndarray:
    matrix = np.ones((1, 1), np.float32)
    while matrix.shape[0] < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix
