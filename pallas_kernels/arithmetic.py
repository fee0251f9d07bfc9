"""How the ``xla`` implementations multiply: one rule for all of them."""

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike


def accumulator(dtype: DTypeLike) -> jnp.dtype:
    """The type that sums: float32, or float64 for float64 operands (tests)."""
    return jnp.promote_types(dtype, jnp.float32)


def einsum(equation: str, x: Array, y: Array) -> Array:
    """einsum accumulated in float32; float32 operands are multiplied as such (no TF32 or bf16 passes)."""
    dtype = jnp.promote_types(x.dtype, y.dtype)
    precision = lax.Precision.DEFAULT if jnp.finfo(dtype).bits < 32 else lax.Precision.HIGHEST
    return jnp.einsum(equation, x, y, precision=precision, preferred_element_type=accumulator(dtype))
