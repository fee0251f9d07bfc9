"""masked_mha with XLA einsums, one block of queries at a time.

A block reads all keys and, in the backward pass, reads and writes their gradients. With few queries per block that
would be most of the traffic. Where it makes the block wider, it holds only some heads of one row of the batch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.arithmetic import accumulator, einsum, exponentials, finite_rows, probabilities
from pallas_kernels.blocking import block_of_heads, block_size, join_queries, map_query_blocks, split_queries
from pallas_kernels.keys import visible

WIDE = 512  # queries per block at which the keys' traffic is a small part of the logits'


class Operands(NamedTuple):
    """What is multiplied, or its gradients."""

    q_nope: Float[Array, "B T N P"]
    q_rope: Float[Array, "B T N R"]
    k_nope: Float[Array, "B S N P"]
    k_rope: Float[Array, "B S R"]
    v: Float[Array, "B S N H"]


class VisibleKeys(NamedTuple):
    """Which keys each query sees: an interval, and of these only the listed ones unless ``topk_indices`` is None."""

    key_start: Int[Array, "B T"]
    key_stop: Int[Array, "B T"]
    topk_indices: Int[Array, "B T K"] | None


Results = tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]  # out and lse
Cotangents = tuple[Float[Array, "B T N H"], Float[Array, "B T N"] | None]  # of out and lse; None is zero


def forward(operands: Operands, keys: VisibleKeys, *, scale: float) -> Results:
    """See ``pallas_kernels.masked_mha``."""
    q_nope, q_rope, k_nope, k_rope, v = operands

    def some_heads(per_head, per_row):
        q, k, v, broken = per_head

        def attend(q, key_start, key_stop, *topk_indices):
            seen = seen_keys(key_start, key_stop, topk_indices, k.shape[1])
            logits = jnp.where(seen[:, None], _logits(q, k, scale) + _over_keys(broken), -jnp.inf)
            p, total, lse = exponentials(logits)
            out = einsum("BNTS,BSNH->BNTH", p.astype(v.dtype), v) / total
            return jnp.moveaxis(out.astype(q.dtype), 1, 2), jnp.moveaxis(lse, 1, 2)

        return map_query_blocks(attend, _queries_per_block(q, k), q, *per_row)

    q = jnp.concatenate([q_nope, q_rope], axis=-1)
    per_head = q, whole_keys(k_nope, k_rope), *finite_rows(v)
    return _map_heads(some_heads, per_head, _present(*keys))


def backward(
    operands: Operands, keys: VisibleKeys, results: Results, cotangents: Cotangents, *, scale: float
) -> Operands:
    """Gradients of the operands, recomputing the probabilities from ``lse``."""
    (q_nope, q_rope, k_nope, k_rope, v), (out, lse), (d_out, d_lse) = operands, results, cotangents
    sum_dtype = accumulator(q_nope.dtype)

    def some_heads(per_head, per_row):
        q, k, v, broken_keys, out, lse, d_out, d_lse, broken = per_head

        def one_block(key_gradients, xs):
            q, out, lse, d_out, d_lse, broken, key_start, key_stop, *topk_indices = xs
            seen = seen_keys(key_start, key_stop, topk_indices, k.shape[1])[:, None]
            logits = _logits(q, k, scale) + _over_keys(broken_keys)
            p = probabilities(logits, jnp.moveaxis(lse + broken, 2, 1), seen)
            delta = (d_out.astype(sum_dtype) * out.astype(sum_dtype)).sum(axis=-1) - d_lse
            d_p = einsum("BTNH,BSNH->BNTS", d_out, v)
            d_logits = jnp.where(seen, p * (d_p - jnp.moveaxis(delta, 2, 1)[..., None]) * scale, 0.0)
            p, d_logits = p.astype(v.dtype), d_logits.astype(v.dtype)
            d_keys = einsum("BNTS,BTNX->BSNX", d_logits, q), einsum("BNTS,BTNH->BSNH", p, d_out)
            d_q = einsum("BNTS,BSNX->BTNX", d_logits, k).astype(q.dtype)
            return jax.tree.map(jnp.add, key_gradients, d_keys), d_q

        block = _queries_per_block(q, k)
        queries = (q, out, lse, d_out, d_lse, broken, *per_row)
        zeros = tuple(jnp.zeros(x.shape, sum_dtype) for x in (k, v))
        (d_k, d_v), d_q = lax.scan(one_block, zeros, tuple(split_queries(x, block) for x in queries))
        return join_queries(d_q, q.shape[1]), d_k, d_v.astype(v.dtype)

    d_lse = jnp.zeros_like(lse) if d_lse is None else d_lse
    q, of_q = finite_rows(jnp.concatenate([q_nope, q_rope], axis=-1))
    (k, of_k), (v, of_v), (d_out, of_d_out) = (finite_rows(x) for x in (whole_keys(k_nope, k_rope), v, d_out))
    per_head = q, k, v, of_k + of_v, out, lse, d_out, d_lse, of_q + of_d_out
    d_q, d_k, d_v = _map_heads(some_heads, per_head, _present(*keys))
    P = q_nope.shape[-1]
    return Operands(
        q_nope=d_q[..., :P],
        q_rope=d_q[..., P:],
        k_nope=d_k[..., :P].astype(k_nope.dtype),
        k_rope=d_k[..., P:].sum(axis=2).astype(k_rope.dtype),
        v=d_v,
    )


def _present(*arrays: jax.Array | None) -> tuple[jax.Array, ...]:
    return tuple(array for array in arrays if array is not None)


def _map_heads(function: Callable[..., Any], per_head: tuple[Array, ...], per_row: tuple[Array, ...]) -> Any:
    """``function(per_head, per_row)`` on all rows and heads at once, or in turn on a few heads of one row.

    per_head: arrays [B . N ...], q and k first; per_row: arrays [B T ...], the same for all heads. Results are
    [B . N ...].
    """
    (B, T, N, _), S = per_head[0].shape, per_head[1].shape[1]
    wide = min(T, WIDE)
    if _block(T, B * N, S) >= wide or B * N == 1:
        return function(per_head, per_row)
    _, heads = block_of_heads(T, N, WIDE, lambda heads: _bytes(heads, S))

    def split(x):  # [B . N ...] -> [B N/heads . heads ...]
        return jnp.moveaxis(x.reshape(*x.shape[:2], -1, heads, *x.shape[3:]), 2, 1)

    def one_row(row):
        some, per_row = row
        per_row = tuple(x[None] for x in per_row)
        return lax.map(lambda x: jax.tree.map(lambda y: y[0], function([y[None] for y in x], per_row)), some)

    results = lax.map(one_row, (tuple(split(x) for x in per_head), per_row))  # [B N/heads . heads ...]
    return jax.tree.map(lambda x: jnp.moveaxis(x, 1, 2).reshape(B, x.shape[2], N, *x.shape[4:]), results)


def _queries_per_block(q: jax.Array, k: jax.Array) -> int:
    B, T, N, _ = q.shape
    return _block(T, B * N, k.shape[1])


def _block(T: int, rows_and_heads: int, S: int) -> int:
    return block_size(T, _bytes(rows_and_heads, S))


def _bytes(rows_and_heads: int, S: int) -> int:
    return rows_and_heads * S * 3 * 4  # logits, p and a copy in float32


def seen_keys(key_start, key_stop, topk_indices, S) -> Bool[Array, "B T S"]:
    seen = visible(key_start, key_stop, S)
    for indices in topk_indices:  # none, or one array
        listed = jnp.zeros((*indices.shape[:2], S + 1), bool)
        mark = jax.vmap(jax.vmap(lambda row, i: row.at[i].set(True)))
        seen &= mark(listed, jnp.where(indices < 0, S, indices))[..., :S]
    return seen


def whole_keys(k_nope, k_rope) -> Float[Array, "B S N X"]:
    """Whole keys: one product per block writes the logits once, where two products and their sum would write thrice."""
    rotated = jnp.broadcast_to(k_rope[:, :, None], (*k_nope.shape[:3], k_rope.shape[-1]))
    return jnp.concatenate([k_nope, rotated], axis=-1)


def _logits(q, k, scale) -> Float[Array, "B N T S"]:
    """Heads before queries, as a batched product leaves them, so that the largest array is never transposed."""
    return einsum("BTNX,BSNX->BNTS", q, k) * scale


def _over_keys(x: Float[Array, "B S N"]) -> Float[Array, "B N 1 S"]:
    return jnp.swapaxes(x, 1, 2)[:, :, None]
