"""index_kl_selected with XLA operations: the listed keys are gathered for one block of queries at a time."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.arithmetic import accumulator, einsum, probabilities
from pallas_kernels.blocking import block_size, join_queries, map_query_blocks, split_queries
from pallas_kernels.index_kl.divergence import Indexer, divergence, normalized, weighted_sum
from pallas_kernels.keys import gather, scatter_add


class SelectedAttention(NamedTuple):
    """The arrays of ``sparse_mla`` and its log-sum-exp."""

    q_latent: Float[Array, "B T N C"]
    q_rope: Float[Array, "B T N R"]
    latent: Float[Array, "B S C"]
    k_rope: Float[Array, "B S R"]
    lse: Float[Array, "B T N"]
    topk_indices: Int[Array, "B T K"]


def loss(
    indexer: Indexer, attention: SelectedAttention, token_weights: Float[Array, "B T"], *, scale: float
) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
    """See ``pallas_kernels.index_kl_selected``."""
    q, k, weights = indexer
    keys, per_query = _keys(attention), _per_query(attention)

    def block_kl(q, weights, q_latent, q_rope, lse, topk_indices):
        seen = topk_indices >= 0
        p = _target(q_latent, q_rope, lse, gather(keys, topk_indices), seen, scale)
        dots = einsum("BTIJ,BTKJ->BTIK", q, gather(k, topk_indices))
        return divergence(_scores(dots, weights, seen), p)[0]

    kl = map_query_blocks(block_kl, _queries_per_block(indexer, attention), q, weights, *per_query)
    return weighted_sum(kl, token_weights), kl


def loss_and_gradients(
    indexer: Indexer, attention: SelectedAttention, token_weights: Float[Array, "B T"], *, scale: float
) -> tuple[Float[Array, ""], Float[Array, "B T"], Indexer]:
    """The loss, kl and the gradients of the indexer, in one pass; formulas as in ``dense.loss_and_gradients``."""
    q, k, weights = indexer
    keys = _keys(attention)

    def one_block(d_k, xs):
        q, weights, token_weights, q_latent, q_rope, lse, topk_indices = xs
        seen = topk_indices >= 0
        p = _target(q_latent, q_rope, lse, gather(keys, topk_indices), seen, scale)
        listed = gather(k, topk_indices)
        dots = einsum("BTIJ,BTKJ->BTIK", q, listed)
        kl, softmax = divergence(_scores(dots, weights, seen), p)
        counted = seen & (token_weights != 0)[..., None]
        d_scores = jnp.where(counted, token_weights[..., None] * (softmax - p), 0.0)
        dots = jnp.where(counted[:, :, None], dots, 0.0)
        d_weights = (jax.nn.relu(dots) * d_scores[:, :, None]).sum(axis=-1)
        d_dots = jnp.where(dots <= 0, 0.0, weights[..., None] * d_scores[:, :, None]).astype(q.dtype)
        d_q = einsum("BTIK,BTKJ->BTIJ", d_dots, jnp.where(counted[..., None], listed, 0))
        d_listed = einsum("BTIK,BTIJ->BTKJ", d_dots, q)
        d_k = scatter_add(d_k, jnp.where(counted, topk_indices, -1), d_listed)
        return d_k, (kl, d_q.astype(q.dtype), d_weights.astype(weights.dtype))

    block = _queries_per_block(indexer, attention)
    xs = tuple(split_queries(x, block) for x in (q, weights, token_weights, *_per_query(attention)))
    d_k, results = lax.scan(one_block, jnp.zeros(k.shape, accumulator(k.dtype)), xs)
    kl, d_q, d_weights = (join_queries(x, q.shape[1]) for x in results)
    return weighted_sum(kl, token_weights), kl, Indexer(d_q, d_k.astype(k.dtype), d_weights)


def _keys(attention: SelectedAttention) -> Float[Array, "B S X"]:
    """Latents and rotated keys in one array, so that a block gathers whole rows."""
    return jnp.concatenate([attention.latent, attention.k_rope], axis=-1)


def _per_query(attention: SelectedAttention) -> tuple[Array, ...]:
    return attention.q_latent, attention.q_rope, attention.lse, attention.topk_indices


def _queries_per_block(indexer: Indexer, attention: SelectedAttention) -> int:
    (B, T, I, J), (*_, N, C) = indexer.q.shape, attention.q_latent.shape
    K, R = attention.topk_indices.shape[-1], attention.q_rope.shape[-1]
    numbers = 2 * I + 2 * N + J + C + R  # dots and their gradient; logits and exp; the gathered rows
    return block_size(T, B * K * 4 * numbers)


def _target(q_latent, q_rope, lse, gathered, seen, scale) -> Float[Array, "B T K"]:
    """The attention, summed over heads and normalised."""
    q = jnp.concatenate([q_latent, q_rope], axis=-1)
    logits = einsum("BTNX,BTKX->BTNK", q, gathered) * scale
    return normalized(probabilities(logits, lse, seen[:, :, None]).sum(axis=2))


def _scores(dots, weights, seen) -> Float[Array, "B T K"]:
    scores = (jax.nn.relu(dots) * weights[..., None]).sum(axis=2)
    return jnp.where(seen, scores, -jnp.inf)
