"""grouped_matmul by JAX's Pallas kernel for TPU, megablox.

Of XLA's ``lax.ragged_dot`` libtpu 0.0.52 multiplies every row with every group's matrix on v6e and tpu7x; megablox
multiplies each row once.
"""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul.xla import as_matrix
from pallas_kernels.private_jax import megablox

# Rows, common dimension and columns that the kernel multiplies at once: 8 MB of its memory in bfloat16.
TILE = (512, 512, 1024)
FEW_ROWS = 128  # rows of a tile where there are at most TILE[0] of them


def grouped_matmul(
    rows: Float[Array, "M X"],
    weights: Float[Array, "E X Y"],
    group_sizes: Int[Array, " E"],
    weight_scales: Float[Array, "E X_blocks Y_blocks"] | None = None,
    *,
    out_dtype: DTypeLike | None = None,
    interpret: bool = False,
) -> Float[Array, "M Y"]:
    """See ``pallas_kernels.grouped_matmul``. The kernel needs whole tiles of rows: zeros are appended."""
    n_rows = rows.shape[0]
    rows = jnp.pad(rows, ((0, -n_rows % (TILE[0] if n_rows > TILE[0] else FEW_ROWS)), (0, 0)))
    weights, group_sizes = as_matrix(weights, weight_scales, rows.dtype), group_sizes.astype(jnp.int32)
    out_dtype = jnp.dtype(rows.dtype if out_dtype is None else out_dtype)
    return _in_kernel(interpret, out_dtype, rows, weights, group_sizes)[:n_rows]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_kernel(interpret, out_dtype, rows, weights, group_sizes):
    gmm, _ = megablox()
    with _precision(rows):
        out = gmm(rows, weights, group_sizes, out_dtype, _tile, interpret=interpret)
    return _in_groups(out, group_sizes)


def _in_kernel_forward(interpret, out_dtype, *inputs):
    return _in_kernel(interpret, out_dtype, *inputs), inputs


def _in_kernel_backward(interpret, out_dtype, inputs, d_out):
    rows, weights, group_sizes = inputs
    d_out = d_out.astype(rows.dtype)
    gmm, tgmm = megablox()
    options = {"tiling": _tile, "interpret": interpret}
    with _precision(rows):
        d_rows = gmm(d_out, weights, group_sizes, rows.dtype, transpose_rhs=True, **options)
        d_weights = tgmm(rows.T, d_out, group_sizes, weights.dtype, num_actual_groups=len(weights), **options)
    return _in_groups(d_rows, group_sizes), d_weights, None


_in_kernel.defvjp(_in_kernel_forward, _in_kernel_backward)


def _in_groups(rows: Array, group_sizes: Array) -> Array:
    """The kernel writes no row behind the last group; these are 0."""
    return jnp.where((jnp.arange(rows.shape[0]) < group_sizes.sum())[:, None], rows, 0)


def _precision(rows: Array) -> contextlib.AbstractContextManager[Any]:
    """The TPU's compiler refuses bfloat16 with jax_default_matmul_precision="highest", which changes nothing for it."""
    return contextlib.nullcontext() if rows.dtype == jnp.float32 else jax.default_matmul_precision("default")


def _tile(m: int, k: int, n: int) -> tuple[int, int, int]:
    """Of the product [m k] x [k n], and of those for its gradients."""
    rows, shared, columns = TILE
    return rows if m % rows == 0 else FEW_ROWS, min(shared, k), min(columns, n)
