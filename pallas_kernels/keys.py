"""The keys of a query: an interval of them, or a list of indices in which -1 means no key."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def visible(key_start: Int[Array, "B T"], key_stop: Int[Array, "B T"], n_keys: int) -> Bool[Array, "B T S"]:
    """Whether key s lies in the interval ``key_start <= s < key_stop`` of query t."""
    keys = jnp.arange(n_keys)
    return (key_start[..., None] <= keys) & (keys < key_stop[..., None])


def gather(keys: Float[Array, "B S X"], indices: Int[Array, "B T K"]) -> Float[Array, "B T K X"]:
    """The listed keys, and 0 for a -1."""
    found = jax.vmap(lambda rows, i: rows[i])(keys, jnp.maximum(indices, 0))
    return jnp.where((indices >= 0)[..., None], found, jnp.zeros((), keys.dtype))


def scatter_add(
    total: Float[Array, "B S X"], indices: Int[Array, "B T K"], update: Float[Array, "B T K X"]
) -> Float[Array, "B S X"]:
    """Adds to the listed keys. The update of a -1 is dropped, whatever it is."""
    nowhere = total.shape[1]
    add = jax.vmap(lambda rows, i, x: rows.at[i].add(x, mode="drop"))
    return add(total, jnp.where(indices < 0, nowhere, indices), update)
