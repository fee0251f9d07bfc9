"""Reading and adding to the keys that a list of indices names; -1 means no key."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def gather(keys: Float[Array, "B S X"], indices: Int[Array, "B T K"]) -> Float[Array, "B T K X"]:
    """The listed rows. A -1 reads row 0: the caller must give it no weight."""
    return jax.vmap(lambda rows, i: rows[i])(keys, jnp.maximum(indices, 0))


def scatter_add(
    total: Float[Array, "B S X"], indices: Int[Array, "B T K"], update: Float[Array, "B T K X"]
) -> Float[Array, "B S X"]:
    """Adds to the listed rows. A -1 adds to row 0: the caller must make its update 0."""
    return jax.vmap(lambda rows, i, x: rows.at[i].add(x))(total, jnp.maximum(indices, 0), update)
