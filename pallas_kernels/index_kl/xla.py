"""index_kl with XLA operations: loss and gradients of a block of queries at a time.

``queries`` and ``keys`` are the attention's arrays, and tell the two forms apart: an interval of keys per query
(q_nope, q_rope, lse, key_start, key_stop) with (k_nope, k_rope), or a list of them
(q_latent, q_rope, lse, topk_indices) with (latent, k_rope).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.special import xlogy
from jaxtyping import Array, Float

from pallas_kernels.arithmetic import accumulator, einsum, exponentials, probabilities
from pallas_kernels.blocking import block_size, join_queries, map_query_blocks, split_queries
from pallas_kernels.keys import gather, scatter_add, visible

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

    def block_kl(q, weights, *queries):
        dots, p, seen = _dots_and_target(q, k, queries, keys, scale)
        return _kl(_scores(dots, weights, seen), p)[0]

    kl = map_query_blocks(block_kl, _queries_per_block(q, k, queries, keys), q, weights, *queries)
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

    def one_block(d_k, xs):
        q, weights, token_weights, *queries = xs
        dots, p, seen = _dots_and_target(q, k, queries, keys, scale)
        kl, softmax = _kl(_scores(dots, weights, seen), p)
        d_scores = jnp.where(seen, token_weights[..., None] * (softmax - p), 0.0)
        d_weights = (jax.nn.relu(dots) * d_scores[:, :, None]).sum(axis=-1)
        d_dots = jnp.where(dots > 0, weights[..., None] * d_scores[:, :, None], 0.0).astype(q.dtype)
        if _is_list(queries):
            d_q = einsum("BTIK,BTKJ->BTIJ", d_dots, gather(k, queries[-1]))
            d_listed = einsum("BTIK,BTIJ->BTKJ", d_dots, q)
            d_k = scatter_add(d_k, queries[-1], d_listed)
        else:
            d_q = einsum("BTIS,BSJ->BTIJ", d_dots, k)
            d_k = d_k + einsum("BTIS,BTIJ->BSJ", d_dots, q)
        return d_k, (kl, d_q.astype(q.dtype), d_weights.astype(weights.dtype))

    T = q.shape[1]
    block = _queries_per_block(q, k, queries, keys)
    xs = tuple(split_queries(x, block) for x in (q, weights, token_weights, *queries))
    d_k, per_query = lax.scan(one_block, jnp.zeros(k.shape, accumulator(k.dtype)), xs)
    kl, d_q, d_weights = (join_queries(x, T) for x in per_query)
    return (token_weights * kl).sum(), kl, (d_q, d_k.astype(k.dtype), d_weights)


def _is_list(queries: Any) -> bool:
    return len(queries) == 4


def _queries_per_block(q: jax.Array, k: jax.Array, queries: Any, keys: Any) -> int:
    B, T, I, J = q.shape
    N, X = queries[2].shape[-1], queries[-1].shape[-1] if _is_list(queries) else k.shape[1]
    gathered = J + sum(x.shape[-1] for x in keys) if _is_list(queries) else 0
    return block_size(T, B * X * 4 * (2 * I + 2 * N + gathered))  # dots, their gradient, logits, exp


def _dots_and_target(q, k, queries, keys, scale):
    """Index dots [B T I X], target p [B T X] (sums to 1, or is 0 without keys), seen [B T X]; X is S or K."""
    if _is_list(queries):
        q_latent, q_rope, lse, indices = queries
        gathered, seen = gather(jnp.concatenate(keys, axis=-1), indices), indices >= 0
        logits = einsum("BTNX,BTKX->BTNK", jnp.concatenate([q_latent, q_rope], axis=-1), gathered)
        dots = einsum("BTIJ,BTKJ->BTIK", q, gather(k, indices))
    else:
        q_nope, q_rope, lse, key_start, key_stop = queries
        k_nope, k_rope = keys
        seen = visible(key_start, key_stop, k.shape[1])
        logits = einsum("BTNP,BSNP->BTNS", q_nope, k_nope) + einsum("BTNR,BSR->BTNS", q_rope, k_rope)
        dots = einsum("BTIJ,BSJ->BTIS", q, k)
    logits = jnp.where(seen[:, :, None], logits * scale, -jnp.inf)
    p = probabilities(logits, lse).sum(axis=2)
    total = p.sum(axis=-1, keepdims=True)
    return dots, p / jnp.where(total == 0.0, 1.0, total), seen


def _scores(dots, weights, seen):
    return jnp.where(seen, (jax.nn.relu(dots) * weights[..., None]).sum(axis=2), -jnp.inf)


def _kl(scores, p):
    """KL(p || softmax(scores)) [B T] and softmax(scores); 0 where a row has no key."""
    e, total, lse = exponentials(scores)
    log_softmax = scores - jnp.where(lse == -jnp.inf, 0.0, lse)[..., None]
    kl = (xlogy(p, p) - jnp.where(p > 0, p * log_softmax, 0.0)).sum(axis=-1)
    return kl, e / total
