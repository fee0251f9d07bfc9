"""select_topk with jax.lax.top_k, which is exact and breaks ties by the lowest index."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.keys import visible


def select_topk(
    scores: Float[Array, "B T S"],
    k: int,
    key_start: Int[Array, "B T"] | None,
    key_stop: Int[Array, "B T"] | None,
) -> Int[Array, "B T K"]:
    """See ``pallas_kernels.select_topk``. Works on all rows at once: callers pass a block of queries."""
    S = scores.shape[-1]
    scores = lax.stop_gradient(scores) + 0.0  # -0.0 + 0.0 == +0.0; lax.top_k orders them apart
    if key_start is not None and key_stop is not None:
        scores = jnp.where(visible(key_start, key_stop, S), scores, -jnp.inf)
    values, indices = lax.top_k(scores, min(k, S))
    indices = jnp.sort(jnp.where(values == -jnp.inf, S, indices), axis=-1)  # S sorts behind every key
    indices = jnp.where(indices == S, -1, indices).astype(jnp.int32)
    return jnp.pad(indices, ((0, 0), (0, 0), (0, max(k - S, 0))), constant_values=-1)
