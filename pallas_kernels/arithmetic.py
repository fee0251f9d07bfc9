"""How the ``xla`` implementations multiply: one rule for all of them."""

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float

WEIGHT_BLOCK = 128  # rows and columns of an FP8 weight that share one scale, as in DeepSeek's checkpoints


def accumulator(dtype: DTypeLike) -> jnp.dtype:
    """The dtype of sums: float32, or float64 for float64 operands (used in tests)."""
    return jnp.promote_types(dtype, jnp.float32)


def einsum(equation: str, x: Array, y: Array) -> Array:
    """einsum accumulated in float32; float32 operands are multiplied in full precision (no TF32 or bfloat16 passes)."""
    dtype = jnp.promote_types(x.dtype, y.dtype)
    precision = lax.Precision.DEFAULT if jnp.finfo(dtype).bits < 32 else lax.Precision.HIGHEST
    return jnp.einsum(equation, x, y, precision=precision, preferred_element_type=accumulator(dtype))


def exponentials(logits: Array) -> tuple[Array, Array, Array]:
    """exp(logits - highest), its sum over the last axis (1 where nothing is visible), and the log-sum-exp.

    logits are -inf where not visible. A row without visible keys gives exponentials of 0 and a log-sum-exp of -inf.
    """
    highest = logits.max(axis=-1, keepdims=True)
    highest = jnp.where(highest == -jnp.inf, 0.0, highest)
    e = jnp.exp(logits - highest)
    total = e.sum(axis=-1, keepdims=True)
    return e, jnp.where(total == 0.0, 1.0, total), (jnp.log(total) + highest)[..., 0]


def probabilities(logits: Array, lse: Array, seen: Array) -> Array:
    """exp(logits - lse), 0 where not seen, whatever the logits and lse are there."""
    return jnp.where(seen, jnp.exp(logits - lse[..., None]), 0.0)


def finite_rows(x: Array) -> tuple[Array, Array]:
    """x with 0 for each row of its last axis that holds a NaN or an infinity, and NaN for these rows (0 for others).

    A product sums over masked keys with a weight of 0, and 0 times NaN is NaN. With the first result it stays 0. The
    second, added to the logits of the pairs that are seen, keeps a broken value from being hidden.
    """
    finite = jnp.isfinite(x).all(axis=-1)
    return jnp.where(finite[..., None], x, 0), jnp.where(finite, 0.0, jnp.nan).astype(accumulator(x.dtype))


def dequantize_blocks(
    values: Float[Array, "*stack X Y"], scales: Float[Array, "*stack X_blocks Y_blocks"], dtype: DTypeLike
) -> Float[Array, "*stack X Y"]:
    """values times the scale of their WEIGHT_BLOCK x WEIGHT_BLOCK block, multiplied in float32, then cast.

    The last block of an axis may be smaller, so the block size cannot be derived from the shapes.
    """
    for axis, size in ((-2, values.shape[-2]), (-1, values.shape[-1])):
        scales = jnp.repeat(scales, WEIGHT_BLOCK, axis=axis)
        scales = lax.slice_in_dim(scales, 0, size, axis=scales.ndim + axis)
    return (values.astype(jnp.float32) * scales).astype(dtype)
