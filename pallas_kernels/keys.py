"""The keys of a query: an interval of them, or a list of indices in which -1 means no key."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def visible(key_start: Int[Array, "B T"], key_stop: Int[Array, "B T"], n_keys: int) -> Bool[Array, "B T S"]:
    """Whether key s lies in the interval ``key_start <= s < key_stop`` of query t."""
    keys = jnp.arange(n_keys)
    return (key_start[..., None] <= keys) & (keys < key_stop[..., None])


def gather(keys: Float[Array, "B S X"], indices: Int[Array, "B T K"]) -> Float[Array, "B T K X"]:
    """The listed keys. A -1 reads key 0, to which the caller must give no weight."""
    return jax.vmap(lambda rows, i: rows[i])(keys, jnp.maximum(indices, 0))


def scatter_add(
    total: Float[Array, "B S X"], indices: Int[Array, "B T K"], update: Float[Array, "B T K X"]
) -> Float[Array, "B S X"]:
    """Adds to the listed keys. A -1 adds to key 0, so the caller must make its update 0."""
    return jax.vmap(lambda rows, i, x: rows.at[i].add(x))(total, jnp.maximum(indices, 0), update)
