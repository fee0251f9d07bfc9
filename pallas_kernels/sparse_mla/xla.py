"""sparse_mla with XLA gathers and einsums, one block of queries at a time."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.arithmetic import accumulator, einsum, exponentials, probabilities
from pallas_kernels.blocking import block_size, join_queries, map_query_blocks, split_queries
from pallas_kernels.keys import gather, scatter_add


def forward(
    q_latent: Float[Array, "B T N C"],
    q_rope: Float[Array, "B T N R"],
    latent: Float[Array, "B S C"],
    k_rope: Float[Array, "B S R"],
    topk_indices: Int[Array, "B T K"],
    latent_scale: Float[Array, "B S G"] | None = None,
    *,
    scale: float,
) -> tuple[Float[Array, "B T N C"], Float[Array, "B T N"]]:
    """See ``pallas_kernels.sparse_mla``."""

    def attend(q_latent, q_rope, topk_indices):
        c, r = gather(latent, topk_indices), gather(k_rope, topk_indices)
        if latent_scale is not None:
            c = _dequantized(c, gather(latent_scale, topk_indices), q_latent.dtype)
        logits = _logits(q_latent, q_rope, c, r, topk_indices, scale)
        p, total, lse = exponentials(logits)
        out = einsum("BTNK,BTKC->BTNC", p.astype(c.dtype), c) / total
        return out.astype(q_latent.dtype), lse

    block = _queries_per_block(q_latent, q_rope, topk_indices)
    return map_query_blocks(attend, block, q_latent, q_rope, topk_indices)


def backward(
    q_latent: Float[Array, "B T N C"],
    q_rope: Float[Array, "B T N R"],
    latent: Float[Array, "B S C"],
    k_rope: Float[Array, "B S R"],
    topk_indices: Int[Array, "B T K"],
    out: Float[Array, "B T N C"],
    lse: Float[Array, "B T N"],
    d_out: Float[Array, "B T N C"],
    d_lse: Float[Array, "B T N"],
    *,
    scale: float,
) -> tuple[Float[Array, "B T N C"], Float[Array, "B T N R"], Float[Array, "B S C"], Float[Array, "B S R"]]:
    """Gradients of (q_latent, q_rope, latent, k_rope), recomputing the probabilities from ``lse``.

    dlogits = p * (dout . c - dout . out + dlse): the softmax's Jacobian plus the log-sum-exp's.
    """
    sum_dtype = accumulator(q_latent.dtype)

    def one_block(key_gradients, xs):
        q_latent, q_rope, topk_indices, out, lse, d_out, d_lse = xs
        c, r = gather(latent, topk_indices), gather(k_rope, topk_indices)
        logits = _logits(q_latent, q_rope, c, r, topk_indices, scale)
        p = probabilities(logits, lse)
        delta = (d_out.astype(sum_dtype) * out.astype(sum_dtype)).sum(axis=-1) - d_lse
        d_logits = p * (einsum("BTNC,BTKC->BTNK", d_out, c) - delta[..., None]) * scale
        p, d_logits = p.astype(c.dtype), d_logits.astype(c.dtype)

        d_q_latent = einsum("BTNK,BTKC->BTNC", d_logits, c)
        d_q_rope = einsum("BTNK,BTKR->BTNR", d_logits, r)
        d_c = einsum("BTNK,BTNC->BTKC", d_logits, q_latent) + einsum("BTNK,BTNC->BTKC", p, d_out)
        d_r = einsum("BTNK,BTNR->BTKR", d_logits, q_rope)
        key_gradients = jax.tree.map(
            lambda total, d: scatter_add(total, topk_indices, d), key_gradients, (d_c, d_r)
        )
        return key_gradients, (d_q_latent.astype(q_latent.dtype), d_q_rope.astype(q_rope.dtype))

    T = q_latent.shape[1]
    block = _queries_per_block(q_latent, q_rope, topk_indices)
    d_lse = jnp.where(lse == -jnp.inf, 0.0, d_lse)  # a row without keys has no gradient
    queries = (q_latent, q_rope, topk_indices, out, lse, d_out, d_lse)
    zeros = (jnp.zeros(latent.shape, sum_dtype), jnp.zeros(k_rope.shape, sum_dtype))
    (d_latent, d_k_rope), blocks = lax.scan(one_block, zeros, tuple(split_queries(x, block) for x in queries))
    d_q_latent, d_q_rope = (join_queries(x, T) for x in blocks)
    return d_q_latent, d_q_rope, d_latent.astype(latent.dtype), d_k_rope.astype(k_rope.dtype)


def _queries_per_block(q_latent: jax.Array, q_rope: jax.Array, topk_indices: jax.Array) -> int:
    B, T, N, C = q_latent.shape
    per_key = (C + q_rope.shape[-1]) * q_latent.dtype.itemsize + 3 * N * 4  # gathered rows; logits, p, a copy
    return block_size(T, B * topk_indices.shape[-1] * per_key)


def _logits(q_latent, q_rope, c, r, topk_indices, scale):
    logits = einsum("BTNC,BTKC->BTNK", q_latent, c) + einsum("BTNR,BTKR->BTNK", q_rope, r)
    return jnp.where((topk_indices >= 0)[:, :, None, :], logits * scale, -jnp.inf)


def _dequantized(values, scales, dtype):
    blocks = values.astype(jnp.float32).reshape(*scales.shape, -1) * scales[..., None]
    return blocks.reshape(values.shape).astype(dtype)
