"""index_kl_dense with XLA operations: each block of queries reads all keys, and each query sees an interval of them.

With few queries per block, reading the keys would be most of the traffic. So that more queries fit, a block takes few
heads at a time, of the attention and of the indexer, and keeps only their sums over heads: the target and the scores.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num

from pallas_kernels.arithmetic import accumulator, einsum, finite_rows, probabilities
from pallas_kernels.blocking import block_of_heads, join_queries, map_query_blocks, split_queries
from pallas_kernels.index_kl.divergence import Indexer, divergence, normalized, weighted_sum
from pallas_kernels.keys import visible

WIDE = 128  # queries per block at which keys are a small part of the traffic; more would leave few heads at a time


class DenseAttention(NamedTuple):
    """The arrays of ``masked_mha`` without values, and its log-sum-exp."""

    q_nope: Float[Array, "B T N P"]
    q_rope: Float[Array, "B T N R"]
    k_nope: Float[Array, "B S N P"]
    k_rope: Float[Array, "B S R"]
    lse: Float[Array, "B T N"]
    key_start: Int[Array, "B T"]
    key_stop: Int[Array, "B T"]


class Block(NamedTuple):
    """How much is computed at a time."""

    queries: int
    heads: int
    index_heads: int


def loss(
    indexer: Indexer, attention: DenseAttention, token_weights: Float[Array, "B T"], *, scale: float
) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
    """See ``pallas_kernels.index_kl_dense``."""
    (q, k, weights), block = indexer, _block(indexer, attention)

    def block_kl(q, weights, q_nope, q_rope, lse, key_start, key_stop):
        seen = visible(key_start, key_stop, k.shape[1])
        p = _target((q_nope, q_rope, lse), attention, seen, block.heads, scale)
        return divergence(_scores(Indexer(q, k, weights), seen, block.index_heads), p)[0]

    kl = map_query_blocks(block_kl, block.queries, q, weights, *_per_query(attention))
    return weighted_sum(kl, token_weights), kl


def loss_and_gradients(
    indexer: Indexer, attention: DenseAttention, token_weights: Float[Array, "B T"], *, scale: float
) -> tuple[Float[Array, ""], Float[Array, "B T"], Indexer]:
    """The loss, kl and the gradients of the indexer, in one pass.

    With G = token_weight (softmax(I) - p):  dw_i = sum_s G relu(dot_i),  dq_i = w_i sum_s G [dot_i > 0] k_s,
    dk_s = sum_{t,i} G w_i [dot_i > 0] q_i.
    """
    (q, k, weights), block = indexer, _block(indexer, attention)

    def one_block(d_k, xs):
        q, weights, token_weights, q_nope, q_rope, lse, key_start, key_stop = xs
        seen = visible(key_start, key_stop, k.shape[1])
        p = _target((q_nope, q_rope, lse), attention, seen, block.heads, scale)
        of_block = Indexer(q, k, weights)
        kl, softmax = divergence(_scores(of_block, seen, block.index_heads), p)
        counted = seen & (token_weights != 0)[..., None]
        d_scores = jnp.where(counted, token_weights[..., None] * (softmax - p), 0.0)
        d_q, d_k, d_weights = _add_gradients(d_k, d_scores, counted, of_block, block.index_heads)
        return d_k, (kl, d_q, d_weights)

    xs = tuple(split_queries(x, block.queries) for x in (q, weights, token_weights, *_per_query(attention)))
    d_k, results = lax.scan(one_block, jnp.zeros(k.shape, accumulator(k.dtype)), xs)
    kl, d_q, d_weights = (join_queries(x, q.shape[1]) for x in results)
    return weighted_sum(kl, token_weights), kl, Indexer(d_q, d_k.astype(k.dtype), d_weights)


def _per_query(attention: DenseAttention) -> tuple[Array, ...]:
    return attention.q_nope, attention.q_rope, attention.lse, attention.key_start, attention.key_stop


def _block(indexer: Indexer, attention: DenseAttention) -> Block:
    (B, T, I, _), S, N = indexer.q.shape, indexer.k.shape[1], attention.lse.shape[-1]

    def per_query(heads):
        return B * S * 4 * (2 + 2 * heads)  # target, scores; logits and exp, or dots and their gradient

    (queries_n, heads), (queries_i, index_heads) = (block_of_heads(T, n, WIDE, per_query) for n in (N, I))
    return Block(min(queries_n, queries_i), heads, index_heads)


def _target(
    queries: tuple[Array, Array, Array],
    attention: DenseAttention,
    seen: Bool[Array, "B T S"],
    heads: int,
    scale: float,
) -> Float[Array, "B T S"]:
    """The attention of a block of queries (q_nope, q_rope, lse), summed over heads and normalised."""
    k_nope, k_rope = attention.k_nope, attention.k_rope

    def some_heads(p, xs):
        first, q_nope, q_rope, lse = xs
        some_k = lax.dynamic_slice_in_dim(k_nope, first, heads, axis=2)
        logits = einsum("BNTP,BSNP->BNTS", q_nope, some_k) + einsum("BNTR,BSR->BNTS", q_rope, k_rope)
        return p + probabilities(logits * scale, lse, seen[:, None]).sum(axis=1), None

    groups = (jnp.arange(0, k_nope.shape[2], heads), *(_split_heads(x, heads) for x in queries))
    p, _ = lax.scan(some_heads, jnp.zeros(seen.shape, accumulator(k_nope.dtype)), groups)
    return normalized(p)


def _scores(indexer: Indexer, seen: Bool[Array, "B T S"], heads: int) -> Float[Array, "B T S"]:
    """Index scores of a block of queries, -inf where there is no key."""
    q, k, weights = indexer

    def some_heads(scores, xs):
        q, weights = xs
        dots = einsum("BITJ,BSJ->BITS", q, k)
        return scores + (jax.nn.relu(dots) * weights[..., None]).sum(axis=1), None

    zeros = jnp.zeros(seen.shape, accumulator(k.dtype))
    scores, _ = lax.scan(some_heads, zeros, (_split_heads(q, heads), _split_heads(weights, heads)))
    return jnp.where(seen, scores, -jnp.inf)


def _add_gradients(
    d_k: Float[Array, "B S J"],
    d_scores: Float[Array, "B T S"],
    counted: Bool[Array, "B T S"],
    indexer: Indexer,
    heads: int,
) -> Indexer:
    """Gradients of a block of queries; its gradient of k is added to ``d_k``.

    The dots are computed a second time, because those of all heads would not fit. Of a broken row the scores, and so
    ``d_scores``, are NaN already where it counts: the products then take 0 for it.
    """
    q, k, weights = indexer
    finite_k, _ = finite_rows(k)

    def some_heads(d_k, xs):
        q, weights = xs
        dots = jnp.where(counted[:, None], einsum("BITJ,BSJ->BITS", q, k), 0.0)
        d_weights = (jax.nn.relu(dots) * d_scores[:, None]).sum(axis=-1)
        d_dots = jnp.where(dots <= 0, 0.0, weights[..., None] * d_scores[:, None]).astype(q.dtype)
        d_q = einsum("BITS,BSJ->BITJ", d_dots, finite_k).astype(q.dtype)
        return d_k + einsum("BITS,BITJ->BSJ", d_dots, finite_rows(q)[0]), (d_q, d_weights)

    d_k, per_head = lax.scan(some_heads, d_k, (_split_heads(q, heads), _split_heads(weights, heads)))
    d_q, d_weights = (_join_heads(x) for x in per_head)
    return Indexer(d_q.astype(q.dtype), d_k, d_weights.astype(weights.dtype))


def _split_heads(x: Num[Array, "B T N ..."], n: int) -> Num[Array, "groups B n T ..."]:
    """Heads before queries, so that products with keys need no transposition of the largest arrays."""
    x = jnp.swapaxes(x, 1, 2)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, n, *x.shape[2:]), 1, 0)


def _join_heads(x: Num[Array, "groups B n T ..."]) -> Num[Array, "B T N ..."]:
    x = jnp.moveaxis(x, 0, 1)
    return jnp.swapaxes(x.reshape(x.shape[0], -1, *x.shape[3:]), 1, 2)
