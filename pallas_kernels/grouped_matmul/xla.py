"""grouped_matmul with XLA operations: tiles of rows, each of one group, one tile after the other.

XLA's GPU backend expands ``lax.ragged_dot`` to E copies of the rows (112 GiB for 4096 tokens of V3.2, compiled for
H200 with jax 0.11.2). Here FP8 weights are dequantised one group at a time.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.arithmetic import dequantize_blocks

SMALLEST_TILE = 128  # rows


def grouped_matmul(
    rows: Float[Array, "M X"],
    weights: Float[Array, "E X Y"],
    group_sizes: Int[Array, " E"],
    weight_scales: Float[Array, "E X_blocks Y_blocks"] | None = None,
    *,
    out_dtype: DTypeLike | None = None,
) -> Float[Array, "M Y"]:
    """See ``pallas_kernels.grouped_matmul``. There are at most M / tile + min(E, M) tiles."""
    out_dtype = jnp.dtype(rows.dtype if out_dtype is None else out_dtype)
    return _in_tiles(out_dtype, rows, weights, group_sizes, weight_scales)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_tiles(out_dtype, rows, weights, group_sizes, weight_scales):
    source, groups, place = _tiles(rows.shape[0], group_sizes)

    def one_tile(xs):
        tile, group = xs
        matrix = _matrix(weights, weight_scales, group, rows.dtype)
        return jnp.matmul(tile, matrix, preferred_element_type=out_dtype)

    products = lax.map(one_tile, (_take(rows, source), groups))
    return _take(products.reshape(-1, products.shape[-1]), place)


def as_matrix(
    weights: Float[Array, "*stack X Y"],
    scales: Float[Array, "*stack X_blocks Y_blocks"] | None,
    dtype: DTypeLike,
) -> Float[Array, "*stack X Y"]:
    """The weights in this dtype, dequantised if they have scales."""
    return weights.astype(dtype) if scales is None else dequantize_blocks(weights, scales, dtype)


def _forward(out_dtype, *inputs):
    return _in_tiles(out_dtype, *inputs), inputs


def _backward(out_dtype, residuals, d_out):
    """d_weights is accumulated in place, in float32; without this rule JAX would add E matrices per tile."""
    rows, weights, group_sizes, weight_scales = residuals
    d_out = d_out.astype(rows.dtype)
    source, groups, place = _tiles(rows.shape[0], group_sizes)
    constant = weight_scales is not None  # FP8 weights have no gradient

    def one_tile(d_weights, xs):
        tile, d_tile, group = xs
        d_rows = d_tile @ _matrix(weights, weight_scales, group, rows.dtype).T
        if constant:
            return d_weights, d_rows
        d_weight = jnp.matmul(tile.T, d_tile, preferred_element_type=jnp.float32)
        return d_weights.at[group].add(d_weight), d_rows

    start = None if constant else jnp.zeros(weights.shape, jnp.float32)
    d_weights, d_tiles = lax.scan(one_tile, start, (_take(rows, source), _take(d_out, source), groups))
    d_rows = _take(d_tiles.reshape(-1, d_tiles.shape[-1]), place)
    return d_rows, None if constant else d_weights.astype(weights.dtype), None, None


_in_tiles.defvjp(_forward, _backward)


def _tiles(n_rows: int, group_sizes: Array) -> tuple[Array, Array, Array]:
    """How the rows lie in tiles of ``size`` rows, at least SMALLEST_TILE and a quarter of an average group.

    The last tile of a group may be partly empty, which wastes work; smaller tiles cost more launches.

    Returns:
      source [tiles size]: the row in each place, or n_rows where there is none; groups [tiles]: the group of each
      tile; place [M]: where each row went, or tiles * size for a row behind the last group.
    """
    quarter = max(n_rows // (4 * group_sizes.shape[0]), 1)
    size = min(max(SMALLEST_TILE, 1 << quarter.bit_length() - 1), n_rows)
    n_tiles = n_rows // size + min(group_sizes.shape[0], n_rows)
    tiles_of_group = -(-group_sizes // size)
    last_tile, last_row = jnp.cumsum(tiles_of_group), jnp.cumsum(group_sizes)
    tile = jnp.arange(n_tiles)
    groups = jnp.minimum(jnp.searchsorted(last_tile, tile, side="right"), group_sizes.shape[0] - 1)
    nth = tile - (last_tile - tiles_of_group)[groups]  # of its group
    begin = (last_row - group_sizes)[groups] + nth * size
    source = begin[:, None] + jnp.arange(size)
    # Tiles behind the last used one are empty too.
    source = jnp.where(source < last_row[groups][:, None], source, n_rows)

    row = jnp.arange(n_rows)
    group = jnp.searchsorted(last_row, row, side="right")
    inside = row - (last_row - group_sizes)[group]
    place = (last_tile - tiles_of_group)[group] * size + inside
    place = jnp.where(row < last_row[-1], place, n_tiles * size)
    return source, groups.astype(jnp.int32), place


def _take(rows: Array, source: Array) -> Array:
    """The rows of these numbers; 0 for a number beyond the last row."""
    return rows.at[source].get(mode="fill", fill_value=0)


def _matrix(weights: Array, scales: Array | None, group: Array, dtype: DTypeLike) -> Array:
    """[X Y], the weights of one group."""

    def pick(x):
        return lax.dynamic_index_in_dim(x, group, keepdims=False)

    return as_matrix(pick(weights), None if scales is None else pick(scales), dtype)
