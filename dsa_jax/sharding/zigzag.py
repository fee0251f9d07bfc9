"""Load-balanced (zigzag) context parallelism: causal queries sharded over devices, with the same work on each.

The last queries of a row see the most keys. Device i of n holds chunk i of the queries; it keeps the first half of
the chunk and swaps the second half with device n - 1 - i. Counted in half chunks, device i then has 2 i and
2 (n - 1 - i) + 1, and the number of keys that the two see adds up to the same on every device. Only queries and
results are exchanged.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped


def load_balanced(function: Callable[..., Any], axes: tuple[str, ...]) -> Callable[..., Any]:
    """``function`` on load-balanced queries, inside ``shard_map``; its arguments and results are [B T ...].

    axes: the mesh axes that shard the queries (``query_axes``). T per device must be even. The order of the results is
    that of the arguments.
    """

    def call(*arrays: jax.Array) -> Any:
        swapped = function(*(swap_halves(array, axes) for array in arrays))
        return jax.tree.map(lambda result: swap_halves(result, axes), swapped)

    return call


def swap_halves(array: Shaped[Array, "B T *rest"], axes: tuple[str, ...]) -> Shaped[Array, "B T *rest"]:
    """Swaps the second half of the queries between devices i and n - 1 - i. It is its own inverse."""
    n = lax.axis_size(axes)
    first, second = jnp.split(array, 2, axis=1)
    second = lax.ppermute(second, axes, [(i, n - 1 - i) for i in range(n)])
    return jnp.concatenate([first, second], axis=1)
