"""masked_mha with XLA einsums, one block of queries at a time."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.arithmetic import accumulator, einsum, exponentials, probabilities
from pallas_kernels.blocking import block_size, join_queries, map_query_blocks, split_queries
from pallas_kernels.keys import visible


def forward(
    q_nope: Float[Array, "B T N P"],
    q_rope: Float[Array, "B T N R"],
    k_nope: Float[Array, "B S N P"],
    k_rope: Float[Array, "B S R"],
    v: Float[Array, "B S N H"],
    key_start: Int[Array, "B T"],
    key_stop: Int[Array, "B T"],
    topk_indices: Int[Array, "B T K"] | None,
    *,
    scale: float,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """See ``pallas_kernels.masked_mha``."""

    def attend(q_nope, q_rope, key_start, key_stop, *topk_indices):
        seen = _seen(key_start, key_stop, topk_indices, k_rope.shape[1])
        logits = _logits(q_nope, q_rope, k_nope, k_rope, seen, scale)
        p, total, lse = exponentials(logits)
        out = einsum("BTNS,BSNH->BTNH", p.astype(v.dtype), v) / total
        return out.astype(q_nope.dtype), lse

    queries = _present(q_nope, q_rope, key_start, key_stop, topk_indices)
    return map_query_blocks(attend, _queries_per_block(q_nope, k_rope), *queries)


def backward(
    q_nope: Float[Array, "B T N P"],
    q_rope: Float[Array, "B T N R"],
    k_nope: Float[Array, "B S N P"],
    k_rope: Float[Array, "B S R"],
    v: Float[Array, "B S N H"],
    key_start: Int[Array, "B T"],
    key_stop: Int[Array, "B T"],
    topk_indices: Int[Array, "B T K"] | None,
    out: Float[Array, "B T N H"],
    lse: Float[Array, "B T N"],
    d_out: Float[Array, "B T N H"],
    d_lse: Float[Array, "B T N"],
    *,
    scale: float,
) -> tuple[
    Float[Array, "B T N P"],
    Float[Array, "B T N R"],
    Float[Array, "B S N P"],
    Float[Array, "B S R"],
    Float[Array, "B S N H"],
]:
    """Gradients of (q_nope, q_rope, k_nope, k_rope, v), recomputing the probabilities from ``lse``."""
    sum_dtype = accumulator(q_nope.dtype)

    def one_block(key_gradients, xs):
        q_nope, q_rope, out, lse, d_out, d_lse, key_start, key_stop, *topk_indices = xs
        seen = _seen(key_start, key_stop, topk_indices, k_rope.shape[1])
        logits = _logits(q_nope, q_rope, k_nope, k_rope, seen, scale)
        p = probabilities(logits, lse)
        delta = (d_out.astype(sum_dtype) * out.astype(sum_dtype)).sum(axis=-1) - d_lse
        d_logits = p * (einsum("BTNH,BSNH->BTNS", d_out, v) - delta[..., None]) * scale
        p, d_logits = p.astype(v.dtype), d_logits.astype(v.dtype)
        d_keys = (
            einsum("BTNS,BTNP->BSNP", d_logits, q_nope),
            einsum("BTNS,BTNR->BSR", d_logits, q_rope),
            einsum("BTNS,BTNH->BSNH", p, d_out),
        )
        d_q_nope = einsum("BTNS,BSNP->BTNP", d_logits, k_nope).astype(q_nope.dtype)
        d_q_rope = einsum("BTNS,BSR->BTNR", d_logits, k_rope).astype(q_rope.dtype)
        return jax.tree.map(jnp.add, key_gradients, d_keys), (d_q_nope, d_q_rope)

    block = _queries_per_block(q_nope, k_rope)
    d_lse = jnp.where(lse == -jnp.inf, 0.0, d_lse)  # a row without keys has no gradient
    queries = _present(q_nope, q_rope, out, lse, d_out, d_lse, key_start, key_stop, topk_indices)
    zeros = tuple(jnp.zeros(x.shape, sum_dtype) for x in (k_nope, k_rope, v))
    (d_k_nope, d_k_rope, d_v), d_queries = lax.scan(
        one_block, zeros, tuple(split_queries(x, block) for x in queries)
    )
    d_q_nope, d_q_rope = (join_queries(x, q_nope.shape[1]) for x in d_queries)
    return (
        d_q_nope,
        d_q_rope,
        d_k_nope.astype(k_nope.dtype),
        d_k_rope.astype(k_rope.dtype),
        d_v.astype(v.dtype),
    )


def _present(*arrays: jax.Array | None) -> tuple[jax.Array, ...]:
    return tuple(array for array in arrays if array is not None)


def _queries_per_block(q_nope: jax.Array, k_rope: jax.Array) -> int:
    B, T, N, _ = q_nope.shape
    return block_size(T, B * N * k_rope.shape[1] * 3 * 4)  # logits, p and a copy in float32


def _seen(key_start, key_stop, topk_indices, S) -> Bool[Array, "B T S"]:
    seen = visible(key_start, key_stop, S)
    for indices in topk_indices:  # none, or one array
        listed = jnp.zeros((*indices.shape[:2], S + 1), bool)
        mark = jax.vmap(jax.vmap(lambda row, i: row.at[i].set(True)))
        seen &= mark(listed, jnp.where(indices < 0, S, indices))[..., :S]
    return seen


def _logits(q_nope, q_rope, k_nope, k_rope, seen, scale):
    logits = einsum("BTNP,BSNP->BTNS", q_nope, k_nope) + einsum("BTNR,BSR->BTNS", q_rope, k_rope)
    return jnp.where(seen[:, :, None, :], logits * scale, -jnp.inf)
