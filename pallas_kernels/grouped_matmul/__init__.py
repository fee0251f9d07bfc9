"""grouped_matmul: rows sorted by group, each times its group's matrix, as a mixture of experts needs it."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.arithmetic import WEIGHT_BLOCK
from pallas_kernels.dispatch import Implementations, Kernel, dispatch_at_lowering
from pallas_kernels.grouped_matmul import xla
from pallas_kernels.hopper.versions import HOPPER_TESTED_JAX
from pallas_kernels.private_jax import MEGABLOX_TESTED_JAX

_IMPLEMENTATIONS: Implementations = {
    "xla": xla.grouped_matmul,
    "mosaic_gpu": Kernel(
        "pallas_kernels.grouped_matmul.mosaic_gpu", "grouped_matmul", tested=HOPPER_TESTED_JAX
    ),
    "mosaic_tpu": Kernel(
        "pallas_kernels.grouped_matmul.mosaic_tpu", "grouped_matmul", tested=MEGABLOX_TESTED_JAX
    ),
}


def grouped_matmul(
    rows: jax.Array,
    weights: jax.Array,
    group_sizes: jax.Array,
    *,
    weight_scales: jax.Array | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """``rows[i] @ weights[e]`` for every row i of group e; the groups follow each other without gaps.

    Equivalent to:

        last = cumsum(group_sizes)
        group = searchsorted(last, arange(M), side="right")                 # of each row
        out = einsum("MX,MXY->MY", rows, weights.astype(rows.dtype)[group], preferred_element_type=out_dtype)

    Rows behind the last group give 0 and have a gradient of 0, whatever they hold. With ``weight_scales`` the weights
    are, before all else, multiplied by the scale of their 128 x 128 block:

        scales = repeat(repeat(weight_scales, 128, axis=1), 128, axis=2)[:, :X, :Y]
        weights = (weights.astype(float32) * scales).astype(rows.dtype)

    Differentiable (reverse mode) in rows, and in weights unless they are FP8. The gradient of the weights is
    accumulated in float32; Hopper's kernel rounds the sum to the dtype of rows.

    Args:
      rows: [M X].
      weights: [E X Y], multiplied in the dtype of rows; float8_e4m3fn if ``weight_scales`` is given.
      group_sizes: [E] integers >= 0 whose sum is at most M (neither is checked).
      weight_scales: [E ceil(X/128) ceil(Y/128)] float32.
      out_dtype: of the result; None for that of rows. float32 gives bfloat16 products their sums unrounded.
      implementation: see ``pallas_kernels.dispatch``. None chooses by the platform that the program is lowered for,
        so that compiling for TPU ahead of time takes the TPU's kernel on any machine. Hopper's kernel is for
        bfloat16 and widths that are multiples of 128.

    Returns:
      [M Y] in out_dtype.

    Raises:
      ValueError: shapes or dtypes contradict each other.

    Source: DeepSeek-V3 report, section 2.1.2 (the experts' products); block scales: section 3.3.
    """
    if rows.ndim != 2 or weights.ndim != 3:
        raise ValueError(
            f"rows and weights must have shapes [M X] and [E X Y], got {rows.shape} and {weights.shape}"
        )
    E, X, Y = weights.shape
    blocks = (E, -(-X // WEIGHT_BLOCK), -(-Y // WEIGHT_BLOCK))
    for name, array, expected in (
        ("rows", rows, (rows.shape[0], X)),
        ("group_sizes", group_sizes, (E,)),
        ("weight_scales", weight_scales, blocks),
    ):
        if array is not None and array.shape != expected:
            raise ValueError(
                f"{name} must have shape {expected} to match weights {weights.shape}, got {array.shape}"
            )
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(f"group_sizes must be integers, got {group_sizes.dtype}")
    if (weights.dtype == jnp.float8_e4m3fn) != (weight_scales is not None):
        given = "no weight_scales" if weight_scales is None else "weight_scales"
        raise ValueError(
            f"float8_e4m3fn weights and weight_scales go together, got {weights.dtype} and {given}"
        )
    return dispatch_at_lowering(
        "grouped_matmul",
        _IMPLEMENTATIONS,
        implementation,
        rows,
        weights,
        group_sizes,
        weight_scales,
        out_dtype=jnp.dtype(rows.dtype if out_dtype is None else out_dtype),
    )
