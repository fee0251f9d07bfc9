"""index_kl with XLA operations: loss and gradients of a block of queries at a time.

``queries`` and ``keys`` are the attention's arrays, and tell the two forms apart: an interval of keys per query
(q_nope, q_rope, lse, key_start, key_stop) with (k_nope, k_rope), or a list of them
(q_latent, q_rope, lse, topk_indices) with (latent, k_rope).

A block of the first form reads all keys, which with few queries would be most of the traffic. So that more fit, it
takes few heads at a time, of the attention and of the indexer, and keeps their sums: p and the scores.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.special import xlogy
from jaxtyping import Array, Bool, Float, Num

from pallas_kernels.arithmetic import accumulator, einsum, exponentials, probabilities
from pallas_kernels.blocking import block_of_heads, block_size, join_queries, map_query_blocks, split_queries
from pallas_kernels.keys import gather, scatter_add, visible

WIDE = 128  # queries a block, at which keys are a small part of the traffic; more leave few heads a sum

Gradients = tuple[jax.Array, jax.Array, jax.Array]  # of q, k and weights


def loss(
    q: Float[Array, "B T I J"],
    k: Float[Array, "B S J"],
    weights: Float[Array, "B T I"],
    queries: tuple[Array, ...],
    keys: tuple[Array, ...],
    token_weights: Float[Array, "B T"],
    *,
    scale: float,
) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
    """See ``pallas_kernels.index_kl_dense``."""

    block, (n, i), keys = _prepared(q, k, queries, keys)

    def block_kl(q, weights, *queries):
        seen = _seen(queries, k)
        p = _target(queries, keys, seen, n, scale)
        return _kl(_scores(q, k, weights, queries, seen, i), p)[0]

    kl = map_query_blocks(block_kl, block, q, weights, *queries)
    return (token_weights * kl).sum(), kl


def loss_and_gradients(
    q: Float[Array, "B T I J"],
    k: Float[Array, "B S J"],
    weights: Float[Array, "B T I"],
    queries: tuple[Array, ...],
    keys: tuple[Array, ...],
    token_weights: Float[Array, "B T"],
    *,
    scale: float,
) -> tuple[Float[Array, ""], Float[Array, "B T"], Gradients]:
    """The loss, kl and the gradients of (q, k, weights), in one pass.

    With G = token_weight (softmax(I) - p):  dw_i = sum_s G relu(dot_i),  dq_i = w_i sum_s G [dot_i > 0] k_s,
    dk_s = sum_{t,i} G w_i [dot_i > 0] q_i.
    """

    block, (n, i), keys = _prepared(q, k, queries, keys)

    def one_block(d_k, xs):
        q, weights, token_weights, *queries = xs
        seen = _seen(queries, k)
        p = _target(queries, keys, seen, n, scale)
        kl, softmax = _kl(_scores(q, k, weights, queries, seen, i), p)
        d_scores = jnp.where(seen, token_weights[..., None] * (softmax - p), 0.0)
        d_k, d_q, d_weights = _add_gradients(d_k, d_scores, q, k, weights, queries, i)
        return d_k, (kl, d_q, d_weights)

    T = q.shape[1]
    xs = tuple(split_queries(x, block) for x in (q, weights, token_weights, *queries))
    d_k, per_query = lax.scan(one_block, jnp.zeros(k.shape, accumulator(k.dtype)), xs)
    kl, d_q, d_weights = (join_queries(x, T) for x in per_query)
    return (token_weights * kl).sum(), kl, (d_q, d_k.astype(k.dtype), d_weights)


def _is_list(queries: Any) -> bool:
    return len(queries) == 4


def _prepared(q: jax.Array, k: jax.Array, queries: Any, keys: Any) -> tuple[int, tuple[int, int], Any]:
    """Queries a block, heads at a time (of the attention, of the indexer), and the keys as a block takes them."""
    (B, T, I, J), S, N = q.shape, k.shape[1], queries[2].shape[-1]
    if _is_list(queries):
        gathered = J + sum(x.shape[-1] for x in keys)
        numbers = 2 * I + 2 * N + gathered  # dots, their gradient, logits, exp
        block = block_size(T, B * queries[-1].shape[-1] * 4 * numbers)
        return block, (N, I), (jnp.concatenate(keys, axis=-1),)  # a block gathers whole rows

    def per_query(heads):
        return B * S * 4 * (2 + 2 * heads)  # p, scores; logits and exp, or dots and their gradient

    (block_n, n), (block_i, i) = (block_of_heads(T, heads, WIDE, per_query) for heads in (N, I))
    return min(block_n, block_i), (n, i), keys


def _split_heads(x: Num[Array, "B T N ..."], n: int) -> Num[Array, "groups B n T ..."]:
    """Heads before queries, so that products with keys need no transposition of the largest arrays."""
    x = jnp.swapaxes(x, 1, 2)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, n, *x.shape[2:]), 1, 0)


def _join_heads(x: Num[Array, "groups B n T ..."]) -> Num[Array, "B T N ..."]:
    x = jnp.moveaxis(x, 0, 1)
    return jnp.swapaxes(x.reshape(x.shape[0], -1, *x.shape[3:]), 1, 2)


def _seen(queries, k) -> Bool[Array, "B T X"]:
    """X here and below is K, the slots of a list, or S."""
    return queries[-1] >= 0 if _is_list(queries) else visible(queries[-2], queries[-1], k.shape[1])


def _target(queries, keys, seen, n, scale) -> Float[Array, "B T X"]:
    """The attention summed over heads; it sums to 1, or is 0 without keys."""
    if _is_list(queries):
        q_latent, q_rope, lse, indices = queries
        q, gathered = jnp.concatenate([q_latent, q_rope], axis=-1), gather(keys[0], indices)
        logits = jnp.where(seen[:, :, None], einsum("BTNX,BTKX->BTNK", q, gathered) * scale, -jnp.inf)
        p = probabilities(logits, lse).sum(axis=2)
    else:
        k_nope, k_rope = keys

        def some_heads(p, xs):
            first, q_nope, q_rope, lse = xs
            some_k = lax.dynamic_slice_in_dim(k_nope, first, n, axis=2)
            logits = einsum("BNTP,BSNP->BNTS", q_nope, some_k) + einsum("BNTR,BSR->BNTS", q_rope, k_rope)
            logits = jnp.where(seen[:, None], logits * scale, -jnp.inf)
            return p + probabilities(logits, lse).sum(axis=1), None

        groups = (jnp.arange(0, k_nope.shape[2], n), *(_split_heads(x, n) for x in queries[:3]))
        p, _ = lax.scan(some_heads, jnp.zeros(seen.shape, accumulator(k_nope.dtype)), groups)
    total = p.sum(axis=-1, keepdims=True)
    return p / jnp.where(total == 0.0, 1.0, total)


def _scores(q, k, weights, queries, seen, i) -> Float[Array, "B T X"]:
    """Index scores, -inf where there is no key."""
    if _is_list(queries):
        dots = einsum("BTIJ,BTKJ->BTIK", q, gather(k, queries[-1]))
        scores = (jax.nn.relu(dots) * weights[..., None]).sum(axis=2)
    else:

        def some_heads(scores, xs):
            q, weights = xs
            dots = einsum("BITJ,BSJ->BITS", q, k)
            return scores + (jax.nn.relu(dots) * weights[..., None]).sum(axis=1), None

        zeros = jnp.zeros(seen.shape, accumulator(k.dtype))
        scores, _ = lax.scan(some_heads, zeros, (_split_heads(q, i), _split_heads(weights, i)))
    return jnp.where(seen, scores, -jnp.inf)


def _add_gradients(d_k, d_scores, q, k, weights, queries, i):
    """d_k [B S J] with what this block adds to it, d_q [B T I J] and d_weights [B T I].

    The dots are computed a second time: those of all heads would not fit. Of a list they do, and XLA does it once.
    """
    if _is_list(queries):
        listed = gather(k, queries[-1])
        dots = einsum("BTIJ,BTKJ->BTIK", q, listed)
        d_weights = (jax.nn.relu(dots) * d_scores[:, :, None]).sum(axis=-1)
        d_dots = jnp.where(dots > 0, weights[..., None] * d_scores[:, :, None], 0.0).astype(q.dtype)
        d_q = einsum("BTIK,BTKJ->BTIJ", d_dots, listed)
        d_k = scatter_add(d_k, queries[-1], einsum("BTIK,BTIJ->BTKJ", d_dots, q))
    else:

        def some_heads(d_k, xs):
            q, weights = xs
            dots = einsum("BITJ,BSJ->BITS", q, k)
            d_weights = (jax.nn.relu(dots) * d_scores[:, None]).sum(axis=-1)
            d_dots = jnp.where(dots > 0, weights[..., None] * d_scores[:, None], 0.0).astype(q.dtype)
            d_q = einsum("BITS,BSJ->BITJ", d_dots, k).astype(q.dtype)
            return d_k + einsum("BITS,BITJ->BSJ", d_dots, q), (d_q, d_weights)

        d_k, per_head = lax.scan(some_heads, d_k, (_split_heads(q, i), _split_heads(weights, i)))
        d_q, d_weights = (_join_heads(x) for x in per_head)
    return d_k, d_q.astype(q.dtype), d_weights.astype(weights.dtype)


def _kl(scores, p):
    """KL(p || softmax(scores)) [B T] and softmax(scores); 0 where a row has no key."""
    e, total, lse = exponentials(scores)
    log_softmax = scores - jnp.where(lse == -jnp.inf, 0.0, lse)[..., None]
    kl = (xlogy(p, p) - jnp.where(p > 0, p * log_softmax, 0.0)).sum(axis=-1)
    return kl, e / total
