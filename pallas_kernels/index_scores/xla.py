"""index_scores with XLA operations, one block of queries at a time."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.arithmetic import accumulator, einsum, finite_rows
from pallas_kernels.blocking import block_size, map_query_blocks
from pallas_kernels.keys import visible


def index_scores(
    q: Float[Array, "B T I J"],
    k: Float[Array, "B S J"],
    weights: Float[Array, "B T I"],
    key_start: Int[Array, "B T"],
    key_stop: Int[Array, "B T"],
    k_scale: Float[Array, "B S"] | None,
) -> Float[Array, "B T S"]:
    """See ``pallas_kernels.index_scores``. Holds dots [block S I] for a block of queries, never [T S I]."""
    if jnp.finfo(q.dtype).bits == 8:  # e4m3 values are exact in bf16, which every backend can multiply
        q, k = q.astype(jnp.bfloat16), k.astype(jnp.bfloat16)
    B, T, I, _ = q.shape
    S = k.shape[1]
    (q, of_q), (k, of_keys), (weights, of_weights) = (finite_rows(x) for x in (q, k, weights))
    of_queries = of_q.sum(axis=-1) + of_weights
    if k_scale is not None:
        scale, of_scale = finite_rows(k_scale[..., None])
        k_scale, of_keys = scale[..., 0], of_keys + of_scale

    @jax.checkpoint
    def block_scores(q, weights, of_queries, key_start, key_stop):
        seen = visible(key_start, key_stop, S)
        # The inner mask is for the gradient of the weights: the dot of a hidden key may overflow.
        dots = jnp.where(seen[:, :, None], einsum("BTIJ,BSJ->BTIS", q, k), 0.0)
        scores = (jax.nn.relu(dots) * weights[..., None]).sum(axis=2)
        if k_scale is not None:
            scores = scores * k_scale[:, None, :]
        return jnp.where(seen, scores + of_queries[..., None] + of_keys[:, None], -jnp.inf)

    block = block_size(T, B * S * I * accumulator(q.dtype).itemsize)
    return map_query_blocks(block_scores, block, q, weights, of_queries, key_start, key_stop)
