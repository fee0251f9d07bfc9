"""Running a function over blocks of queries, so that its intermediates never exist for all of them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

WORKSPACE_BYTES = 256 * 2**20  # what one block of an ``xla`` implementation may hold


def block_size(n_queries: int, bytes_per_query: int, workspace_bytes: int | None = None) -> int:
    """Queries per block: the largest power of two whose workspace fits ``workspace_bytes``, at least 1.

    workspace_bytes: WORKSPACE_BYTES if None.
    """
    workspace_bytes = WORKSPACE_BYTES if workspace_bytes is None else workspace_bytes
    block = 1
    while block < n_queries and 2 * block * bytes_per_query <= workspace_bytes:
        block *= 2
    return min(block, n_queries)


def block_of_heads(
    n_queries: int, n_heads: int, wide: int, bytes_per_query: Callable[[int], int]
) -> tuple[int, int]:
    """(queries per block, heads at a time), where more heads at a time leave room for fewer queries.

    Takes the largest divisor of ``n_heads`` that still lets a block have ``wide`` queries. If not even one head at a
    time leaves room for so many, it takes the largest with as many queries as one head allows.

    bytes_per_query: workspace of one query, as a function of the number of heads at a time.
    """

    def block(heads: int) -> int:
        return block_size(n_queries, bytes_per_query(heads))

    enough = min(wide, block(1))
    heads = next(n for n in range(n_heads, 0, -1) if n_heads % n == 0 and block(n) >= enough)
    return block(heads), heads


def split_queries(array: jax.Array, block: int) -> jax.Array:
    """[B T ...] -> [T/block B block ...]; T is padded with 0, or for integers with -1, which means "no key"."""
    padding = -array.shape[1] % block
    if padding:
        widths = [(0, 0), (0, padding)] + [(0, 0)] * (array.ndim - 2)
        fill = -1 if jnp.issubdtype(array.dtype, jnp.integer) else 0
        array = jnp.pad(array, widths, constant_values=fill)
    return jnp.moveaxis(array.reshape(array.shape[0], -1, block, *array.shape[2:]), 1, 0)


def join_queries(blocks: jax.Array, n_queries: int) -> jax.Array:
    """[T/block B block ...] -> [B T ...], the inverse of split_queries."""
    joined = jnp.moveaxis(blocks, 0, 1)
    return joined.reshape(joined.shape[0], -1, *joined.shape[3:])[:, :n_queries]


def map_query_blocks(function: Callable[..., Any], block: int, *arrays: jax.Array) -> Any:
    """``function(*arrays)``, computed for ``block`` queries at a time; axis 1 of every argument and result is T.

    One block's intermediates exist at a time, in the backward pass too if ``function`` is wrapped in jax.checkpoint.
    """
    n_queries = arrays[0].shape[1]
    if n_queries <= block:
        return function(*arrays)
    blocks = lax.map(lambda xs: function(*xs), tuple(split_queries(array, block) for array in arrays))
    return jax.tree.map(lambda y: join_queries(y, n_queries), blocks)
