"""The grouped matrix product of a mixture of experts: rows sorted by expert, each times its expert's matrix."""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
from jaxtyping import Array, Float, Int

from dsa_jax.fp8.weight import Fp8Weight, as_matrix

# Rows of one expert that are multiplied at once where there is no native grouped product: at least TILE, and a
# quarter of what an expert gets on average. The last tile of an expert is part empty; more tiles cost more launches.
TILE = 128
# Rows, common dimension and columns that the TPU's kernel multiplies at once: 8 MB of its memory in bfloat16.
KERNEL_TILE = (512, 512, 1024)


def grouped_matmul(
    rows: Float[Array, "M X"], weights: Array | Fp8Weight, group_sizes: Int[Array, " E"]
) -> Float[Array, "M Y"]:
    """``rows[i] @ weights[e]`` for every row i of group e; the groups follow each other, none is cut short.

    weights is [E X Y]. Rows behind the last group give anything. On TPU this is JAX's own Pallas kernel: of XLA's
    ``lax.ragged_dot`` libtpu 0.0.52 multiplies every row with every expert on v6e and tpu7x. XLA's GPU backend expands
    that to E copies of the rows (112 GiB for 4096 tokens of V3.2, compiled for H200 with jax 0.11.2), so there, and
    on CPU, the rows are multiplied in tiles of one expert each, and weights kept in FP8 are dequantised one
    expert at a time.
    """
    return lax.platform_dependent(rows, weights, group_sizes, tpu=megablox, default=tiled)


def megablox(rows: Array, weights: Array | Fp8Weight, group_sizes: Array, interpret: bool = False) -> Array:
    """The same by ``jax.experimental.pallas.ops.tpu.megablox``, whose rows must be whole tiles."""
    n_rows = rows.shape[0]
    rows = jnp.pad(rows, ((0, -n_rows % (KERNEL_TILE[0] if n_rows > KERNEL_TILE[0] else TILE)), (0, 0)))
    weights, group_sizes = as_matrix(weights, rows.dtype), group_sizes.astype(jnp.int32)
    return _in_kernel(interpret, rows, weights, group_sizes)[:n_rows]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_kernel(interpret, rows, weights, group_sizes):
    with _precision(rows):
        return gmm(rows, weights, group_sizes, rows.dtype, _kernel_tile, interpret=interpret)


def _in_kernel_forward(interpret, *inputs):
    return _in_kernel(interpret, *inputs), inputs


def _in_kernel_backward(interpret, inputs, d_out):
    rows, weights, group_sizes = inputs
    options = {"tiling": _kernel_tile, "interpret": interpret}
    with _precision(rows):
        d_rows = gmm(d_out, weights, group_sizes, rows.dtype, transpose_rhs=True, **options)
        d_weights = tgmm(rows.T, d_out, group_sizes, weights.dtype, num_actual_groups=len(weights), **options)
    return d_rows, d_weights, None


_in_kernel.defvjp(_in_kernel_forward, _in_kernel_backward)


def _precision(rows: Array) -> contextlib.AbstractContextManager[Any]:
    """The TPU's compiler refuses bfloat16 with jax_default_matmul_precision="highest", which changes nothing for it."""
    return contextlib.nullcontext() if rows.dtype == jnp.float32 else jax.default_matmul_precision("default")


def _kernel_tile(m: int, k: int, n: int) -> tuple[int, int, int]:
    """Of the product [m k] x [k n], and of those for its gradients."""
    rows, shared, columns = KERNEL_TILE
    return rows if m % rows == 0 else TILE, min(shared, k), min(columns, n)


@jax.custom_vjp
def tiled(rows: Array, weights: Array | Fp8Weight, group_sizes: Array) -> Array:
    """The same, one tile of rows after the other; at most M / tile + min(E, M) tiles."""
    source, experts, place = _tiles(rows.shape[0], group_sizes)

    def one_tile(xs):
        tile, expert = xs
        return tile @ as_matrix(_expert(weights, expert), rows.dtype)

    products = lax.map(one_tile, (_take(rows, source), experts))
    return products.reshape(-1, products.shape[-1])[place]


def _tiled_forward(rows, weights, group_sizes):
    return tiled(rows, weights, group_sizes), (rows, weights, group_sizes)


def _tiled_backward(residuals, d_out):
    """d_weights is accumulated in place, in float32; without this rule JAX would add E matrices a tile."""
    rows, weights, group_sizes = residuals
    source, experts, place = _tiles(rows.shape[0], group_sizes)
    fp8 = isinstance(weights, Fp8Weight)  # which have no gradient

    def one_tile(d_weights, xs):
        tile, d_tile, expert = xs
        d_rows = d_tile @ as_matrix(_expert(weights, expert), rows.dtype).T
        if fp8:
            return d_weights, d_rows
        d_weight = jnp.matmul(tile.T, d_tile, preferred_element_type=jnp.float32)
        return d_weights.at[expert].add(d_weight), d_rows

    start = None if fp8 else jnp.zeros(weights.shape, jnp.float32)
    d_weights, d_tiles = lax.scan(one_tile, start, (_take(rows, source), _take(d_out, source), experts))
    d_rows = d_tiles.reshape(-1, d_tiles.shape[-1])[place]
    return d_rows, None if fp8 else d_weights.astype(weights.dtype), None


tiled.defvjp(_tiled_forward, _tiled_backward)


def _tiles(n_rows: int, group_sizes: Array) -> tuple[Array, Array, Array]:
    """source [tiles TILE]: the row in each place, or n_rows for none; experts [tiles]; place [M]: where a row went."""
    quarter = max(n_rows // (4 * group_sizes.shape[0]), 1)
    size = min(max(TILE, 1 << quarter.bit_length() - 1), n_rows)
    n_tiles = n_rows // size + min(group_sizes.shape[0], n_rows)
    tiles_of_group = -(-group_sizes // size)
    last_tile, last_row = jnp.cumsum(tiles_of_group), jnp.cumsum(group_sizes)
    tile = jnp.arange(n_tiles)
    experts = jnp.minimum(jnp.searchsorted(last_tile, tile, side="right"), group_sizes.shape[0] - 1)
    nth = tile - (last_tile - tiles_of_group)[experts]  # of its group
    begin = (last_row - group_sizes)[experts] + nth * size
    source = begin[:, None] + jnp.arange(size)
    source = jnp.where(
        source < last_row[experts][:, None], source, n_rows
    )  # tiles past the end are empty too

    row = jnp.arange(n_rows)
    group = jnp.searchsorted(last_row, row, side="right")
    inside = row - (last_row - group_sizes)[group]
    place = (last_tile - tiles_of_group)[group] * size + inside
    return source, experts.astype(jnp.int32), place


def _take(rows: Array, source: Array) -> Array:
    return rows.at[source].get(mode="fill", fill_value=0)


def _expert(weights: Array | Fp8Weight, expert: Array) -> Array | Fp8Weight:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, expert, keepdims=False), weights)
