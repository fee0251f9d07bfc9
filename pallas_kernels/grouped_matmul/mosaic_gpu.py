"""grouped_matmul on Hopper, for bfloat16: both products with matrices by one kernel, their gradient by another.

mosaic_gpu_plan      sizes, division of work, shared memory
mosaic_gpu_product   rows times each group's matrix, or its transpose
mosaic_gpu_gradient  the gradient of the matrices

Why not JAX's own kernels, ``pallas.ops.gpu.ragged_dot_mgpu`` and its transposed twin, or tokamax's: see
docs/benchmarks-log.md.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul import mosaic_gpu_gradient, mosaic_gpu_product
from pallas_kernels.grouped_matmul.mosaic_gpu_plan import ALIGN, Plan, make_tasks, running_sum
from pallas_kernels.hopper.device import n_multiprocessors, require_hopper


def grouped_matmul(
    rows: Float[Array, "M X"],
    weights: Float[Array, "E X Y"],
    group_sizes: Int[Array, " E"],
    weight_scales: Float[Array, "E X_blocks Y_blocks"] | None = None,
    *,
    out_dtype: DTypeLike | None = None,
) -> Float[Array, "M Y"]:
    """See ``pallas_kernels.grouped_matmul``.

    Raises:
      NotImplementedError: no Hopper GPU; rows or a result that are not bfloat16; FP8 weights; or X or Y not a
        multiple of 128.
    """
    if rows.dtype != jnp.bfloat16 or weight_scales is not None:
        raise NotImplementedError(
            f"the kernel multiplies bfloat16, got rows of {rows.dtype} and weights of {weights.dtype}"
        )
    if out_dtype not in (None, jnp.bfloat16):
        raise NotImplementedError(f"the kernel's result is bfloat16, got out_dtype {jnp.dtype(out_dtype)}")
    if any(size % 128 for size in weights.shape[1:]) or not rows.shape[0]:
        raise NotImplementedError(
            f"the kernel needs widths that are multiples of 128 and at least one row, got weights "
            f"{weights.shape} and rows {rows.shape}"
        )
    require_hopper()
    padding = -rows.shape[0] % ALIGN
    padded = jnp.pad(rows, ((0, padding), (0, 0))) if padding else rows
    return run(padded, weights.astype(rows.dtype), group_sizes)[: rows.shape[0]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def run(rows, weights, group_sizes, n_blocks=None):
    """The product of bfloat16 operands. ``n_blocks`` is the number of thread blocks, for tests."""
    return _product(rows, weights, group_sizes, n_blocks, transposed=False)


def _forward(rows, weights, group_sizes, n_blocks):
    return run(rows, weights, group_sizes, n_blocks), (rows, weights, group_sizes)


def _backward(n_blocks, residuals, d_out):
    rows, weights, group_sizes = residuals
    d_rows = _product(d_out, weights, group_sizes, n_blocks, transposed=True)
    plan = _plan(rows, weights, n_blocks, transposed=False)
    ends = running_sum(group_sizes.astype(jnp.int32))
    return d_rows, mosaic_gpu_gradient.build(plan)(rows, d_out, ends), None


run.defvjp(_forward, _backward)


def _product(rows, weights, group_sizes, n_blocks, *, transposed):
    plan = _plan(rows, weights, n_blocks, transposed)
    return mosaic_gpu_product.build(plan)(rows, weights, make_tasks(group_sizes, plan))


def _plan(rows, weights, n_blocks, transposed):
    groups, *widths = weights.shape
    common, columns = reversed(widths) if transposed else widths
    return Plan(rows.shape[0], groups, common, columns, transposed, n_blocks or n_multiprocessors())
