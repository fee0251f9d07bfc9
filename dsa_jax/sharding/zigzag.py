"""Even work where causal queries of a row are split over devices: the last ones see the most keys.

Device i of n holds chunk i of the queries. It keeps the first half and trades the second for that of device
n - 1 - i. Of the 2 n halves of the row it then has number 2 i and number 2 (n - 1 - i) + 1, and what the queries
of the two may see adds up to the same on every device. Nothing but queries and results is exchanged.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped


def load_balanced(function: Callable[..., Any], axes: tuple[str, ...]) -> Callable[..., Any]:
    """``function``, whose arguments and results are [B T ...], of evenly mixed queries, inside ``shard_map``.

    axes: the mesh axes that the queries are split over (``sharding.query_axes``); T on each device is even. Results
    stand where their queries came from.
    """

    def call(*arrays: jax.Array) -> Any:
        traded = function(*(swap_halves(array, axes) for array in arrays))
        return jax.tree.map(lambda result: swap_halves(result, axes), traded)

    return call


def swap_halves(array: Shaped[Array, "B T *rest"], axes: tuple[str, ...]) -> Shaped[Array, "B T *rest"]:
    """The second half of the queries is that of device n - 1 - i instead of i; twice, it is the first array again."""
    n = lax.axis_size(axes)
    kept, given = jnp.split(array, 2, axis=1)
    taken = lax.ppermute(given, axes, [(i, n - 1 - i) for i in range(n)])
    return jnp.concatenate([kept, taken], axis=1)
