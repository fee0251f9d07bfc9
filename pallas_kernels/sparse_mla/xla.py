"""sparse_mla with XLA gathers and einsums, one block of queries at a time."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.arithmetic import accumulator, einsum, exponentials, probabilities
from pallas_kernels.blocking import block_size, join_queries, map_query_blocks, split_queries
from pallas_kernels.keys import gather, scatter_add


class Operands(NamedTuple):
    """What is multiplied, or its gradients."""

    q_latent: Float[Array, "B T N C"]
    q_rope: Float[Array, "B T N R"]
    latent: Float[Array, "B S C"]
    k_rope: Float[Array, "B S R"]


Results = tuple[Float[Array, "B T N C"], Float[Array, "B T N"]]  # out and lse, or their cotangents


def forward(
    q_latent: Float[Array, "B T N C"],
    q_rope: Float[Array, "B T N R"],
    latent: Float[Array, "B S C"],
    k_rope: Float[Array, "B S R"],
    topk_indices: Int[Array, "B T K"],
    latent_scale: Float[Array, "B S G"] | None = None,
    *,
    scale: float,
) -> Results:
    """See ``pallas_kernels.sparse_mla``."""

    def attend(q_latent, q_rope, topk_indices):
        c, r = gather(latent, topk_indices), gather(k_rope, topk_indices)
        if latent_scale is not None:
            c = _dequantized(c, gather(latent_scale, topk_indices), q_latent.dtype)
        logits = einsum("BTNC,BTKC->BTNK", q_latent, c) + einsum("BTNR,BTKR->BTNK", q_rope, r)
        logits = jnp.where((topk_indices >= 0)[:, :, None], logits * scale, -jnp.inf)
        p, total, lse = exponentials(logits)
        out = einsum("BTNK,BTKC->BTNC", p.astype(c.dtype), c) / total
        return out.astype(q_latent.dtype), lse

    block = _queries_per_block(q_latent, q_rope, topk_indices)
    return map_query_blocks(attend, block, q_latent, q_rope, topk_indices)


def backward(
    operands: Operands,
    topk_indices: Int[Array, "B T K"],
    results: Results,
    cotangents: Results,
    *,
    scale: float,
) -> Operands:
    """Gradients of the operands, recomputing the probabilities from ``lse``.

    dlogits = p * (dout . c - dout . out + dlse): the softmax's Jacobian plus the log-sum-exp's.
    """
    (q_latent, q_rope, latent, k_rope), (out, lse), (d_out, d_lse) = operands, results, cotangents
    T, C, sum_dtype = q_latent.shape[1], q_latent.shape[-1], accumulator(q_latent.dtype)
    keys = jnp.concatenate([latent, k_rope], axis=-1)
    # Queries and gradients of the outputs are joined at one width. A block then gathers its keys once, and takes one
    # product for logits and d_p, one for the keys' gradients and one scattered addition.
    q = jnp.concatenate([q_latent, q_rope], axis=-1)
    d_wide = jnp.pad(d_out, ((0, 0), (0, 0), (0, 0), (0, q_rope.shape[-1])))
    rows = jnp.concatenate([q, d_wide], axis=2)
    delta = (d_out.astype(sum_dtype) * out.astype(sum_dtype)).sum(axis=-1) - d_lse

    def one_block(d_keys, xs):
        rows, topk_indices, lse, delta = xs
        gathered = gather(keys, topk_indices)
        logits, d_p = jnp.split(einsum("BTMX,BTKX->BTMK", rows, gathered), 2, axis=2)
        seen = (topk_indices >= 0)[:, :, None]
        p = probabilities(logits * scale, lse, seen)
        d_logits = jnp.where(seen, p * (d_p - delta[..., None]) * scale, 0.0).astype(keys.dtype)
        d_q = einsum("BTNK,BTKX->BTNX", d_logits, gathered)
        weights = jnp.concatenate([d_logits, p.astype(keys.dtype)], axis=2)
        d_gathered = einsum("BTMK,BTMX->BTKX", weights, rows)
        return scatter_add(d_keys, topk_indices, d_gathered), d_q.astype(q.dtype)

    block = _queries_per_block(q_latent, q_rope, topk_indices)
    xs = tuple(split_queries(x, block) for x in (rows, topk_indices, lse, delta))
    d_keys, d_q = lax.scan(one_block, jnp.zeros(keys.shape, sum_dtype), xs)
    d_q, d_keys = join_queries(d_q, T), d_keys.astype(keys.dtype)
    return Operands(d_q[..., :C], d_q[..., C:], d_keys[..., :C], d_keys[..., C:])


def _queries_per_block(q_latent: jax.Array, q_rope: jax.Array, topk_indices: jax.Array) -> int:
    B, T, N, C = q_latent.shape
    per_key = (C + q_rope.shape[-1]) * q_latent.dtype.itemsize + 3 * N * 4  # gathered rows; logits, p, a copy
    return block_size(T, B * topk_indices.shape[-1] * per_key)


def _dequantized(values, scales, dtype):
    blocks = values.astype(jnp.float32).reshape(*scales.shape, -1) * scales[..., None]
    return blocks.reshape(values.shape).astype(dtype)
