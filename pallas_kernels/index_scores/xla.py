"""index_scores with XLA operations, one block of queries at a time."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.arithmetic import accumulator, einsum
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

    @jax.checkpoint
    def block_scores(q, weights, key_start, key_stop):
        dots = einsum("BTIJ,BSJ->BTIS", q, k)
        scores = (jax.nn.relu(dots) * weights[..., None]).sum(axis=2)
        if k_scale is not None:
            scores = scores * k_scale[:, None, :]
        return jnp.where(visible(key_start, key_stop, S), scores, -jnp.inf)

    block = block_size(T, B * S * I * accumulator(q.dtype).itemsize)
    return map_query_blocks(block_scores, block, q, weights, key_start, key_stop)
