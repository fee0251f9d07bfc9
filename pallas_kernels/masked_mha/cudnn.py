"""masked_mha by cuDNN's fused attention, for bfloat16 on Hopper GPUs.

Plain causal rows, one document each, need no mask, and cuDNN skips the keys behind each query. Which rows these are
is known only when the program runs, so both ways are compiled and ``lax.switch`` picks one per call. Otherwise a
boolean mask says what each query sees. Masks of more than MASK_BYTES are made and used for some queries at a time.

cuDNN multiplies masked probabilities, which are 0, with the values. So a key or value that is not finite is replaced
by 0, and the output of the queries that see it is set to NaN. In the gradients such a query spoils all keys.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.arithmetic import finite_rows
from pallas_kernels.hopper.device import require_hopper
from pallas_kernels.masked_mha.xla import (
    Cotangents,
    Operands,
    Results,
    VisibleKeys,
    seen_keys,
    whole_keys,
)
from pallas_kernels.private_jax import cudnn_attention, cudnn_attention_gradient

Gradients = tuple[Array, Array, Array]  # of whole queries, whole keys and values

MASK_BYTES = 2**30  # of the mask as cuDNN reads it, 2 bytes per query and key
# Of keys and values, with which it ran on a GPU and was right: (96, 64) with the causal bound alone.
WIDTHS = frozenset({(192, 128), (96, 64), (48, 32)})


def forward(operands: Operands, keys: VisibleKeys, *, scale: float) -> Results:
    """See ``pallas_kernels.masked_mha``.

    Raises:
      NotImplementedError: no Hopper GPU, not bfloat16, other widths than ``WIDTHS``, or odd lengths.
    """
    _check(operands)
    q, k, v = _whole(operands)
    (k, of_k), (v, of_v) = finite_rows(k), finite_rows(v)
    broken = jnp.isnan(of_k + of_v)  # [B S N]

    def plain(keys: VisibleKeys) -> Results:
        out, lse = cudnn_attention(q, k, v, None, scale=scale, causal=True)
        spoiled = lax.cummax(broken.astype(jnp.int8), axis=1) > 0
        out = jnp.where(spoiled[..., None], jnp.array(jnp.nan, out.dtype), out)
        return out, jnp.where(spoiled, jnp.nan, lse.swapaxes(1, 2))

    def masked(causal: bool, keys: VisibleKeys) -> Results:
        def attend(begin: int, end: int) -> Results:
            seen = seen_keys(*_rows(keys, begin, end), k.shape[1])
            out, lse = cudnn_attention(q[:, begin:end], k, v, seen[:, None], scale=scale, causal=causal)
            lse = jnp.where(seen.any(axis=2)[..., None], lse.swapaxes(1, 2), -jnp.inf)
            of_seen = jnp.einsum("BTS,BSN->BTN", seen.astype(q.dtype), broken.astype(q.dtype))
            lse = jnp.where(of_seen > 0, jnp.nan, lse)
            spoiled_or_empty = jnp.where(jnp.isnan(lse), jnp.nan, 0).astype(out.dtype)
            return jnp.where(jnp.isfinite(lse)[..., None], out, spoiled_or_empty[..., None]), lse

        parts = [attend(begin, end) for begin, end in _pieces(q, k)]
        out, lse = (jnp.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True))
        return out, lse

    return _choose(q, k, keys, plain, masked)


def backward(
    operands: Operands, keys: VisibleKeys, results: Results, cotangents: Cotangents, *, scale: float
) -> Operands:
    """Gradients of the operands. See ``forward`` for what is refused; a gradient of lse is refused too."""
    _check(operands)
    (out, lse), (d_out, d_lse) = results, cotangents
    if d_lse is not None:
        raise NotImplementedError("cuDNN has no gradient of the log-sum-exp")
    q, k, v = _whole(operands)
    (k, _), (v, _) = finite_rows(k), finite_rows(v)
    lse = lse.swapaxes(1, 2)

    def plain(keys: VisibleKeys) -> Gradients:
        return cudnn_attention_gradient(q, k, v, None, lse, out, d_out, scale=scale, causal=True)

    def masked(causal: bool, keys: VisibleKeys) -> Gradients:
        parts = []
        some = (lse > -jnp.inf).swapaxes(1, 2)[..., None]
        d_seen, lse_seen = jnp.where(some, d_out, 0), jnp.where(lse == -jnp.inf, 0.0, lse)
        for begin, end in _pieces(q, k):
            seen = seen_keys(*_rows(keys, begin, end), k.shape[1])
            part = slice(begin, end)
            parts.append(
                cudnn_attention_gradient(
                    q[:, part], k, v, seen[:, None], lse_seen[..., part], out[:, part], d_seen[:, part],
                    scale=scale, causal=causal,
                )
            )  # fmt: skip
        d_q, d_k, d_v = zip(*parts, strict=True)
        if len(parts) == 1:
            return d_q[0], d_k[0], d_v[0]
        in_float32 = [sum(x.astype(jnp.float32) for x in arrays) for arrays in (d_k, d_v)]
        return jnp.concatenate(d_q, axis=1), in_float32[0].astype(k.dtype), in_float32[1].astype(v.dtype)

    d_q, d_k, d_v = _choose(q, k, keys, plain, masked)
    P = operands.q_nope.shape[-1]
    return Operands(
        q_nope=d_q[..., :P],
        q_rope=d_q[..., P:],
        k_nope=d_k[..., :P],
        k_rope=d_k[..., P:].astype(jnp.float32).sum(axis=2).astype(operands.k_rope.dtype),
        v=d_v,
    )


def _check(operands: Operands) -> None:
    require_hopper()
    q_nope, q_rope, k_nope, _, v = operands
    if dtypes := {x.dtype for x in operands} - {jnp.dtype(jnp.bfloat16)}:
        raise NotImplementedError(f"cuDNN attention is used for bfloat16, got {sorted(map(str, dtypes))}")
    widths = q_nope.shape[-1] + q_rope.shape[-1], v.shape[-1]
    if widths not in WIDTHS:
        raise NotImplementedError(f"widths of keys and values must be one of {sorted(WIDTHS)}, got {widths}")
    T, S = q_nope.shape[1], k_nope.shape[1]
    if T % 2 or S % 2:
        raise NotImplementedError(
            f"cuDNN needs even numbers of queries and keys beside a mask, got {T} and {S}"
        )


def _whole(operands: Operands) -> tuple[Array, Array, Array]:
    """Queries and keys with both of their parts, and values."""
    q = jnp.concatenate([operands.q_nope, operands.q_rope], axis=-1)
    return q, whole_keys(operands.k_nope, operands.k_rope), operands.v


def _choose(
    q: Array,
    k: Array,
    keys: VisibleKeys,
    plain: Callable[[VisibleKeys], Any],
    masked: Callable[[bool, VisibleKeys], Any],
) -> Any:
    """``plain`` where each query t sees keys 0 .. t, else ``masked``, with the causal bound if none sees beyond it."""
    T, S = q.shape[1], k.shape[1]
    if T != S:
        return masked(False, keys)
    bound = jnp.arange(1, T + 1)
    within = (keys.key_stop <= bound).all()
    choices: list[tuple[Array, Callable[[VisibleKeys], Any]]] = []
    if keys.topk_indices is None:
        choices.append((within & (keys.key_start == 0).all() & (keys.key_stop == bound).all(), plain))
    if len(_pieces(q, k)) == 1:
        choices.append((within, partial(masked, True)))
    if not choices:
        return masked(False, keys)
    conditions, functions = zip(*choices, strict=True)
    first = jnp.argmax(jnp.stack([*conditions, jnp.bool_(True)]))
    return lax.switch(first, [*functions, partial(masked, False)], keys)


def _pieces(q: Float[Array, "B T N X"], k: Float[Array, "B S N X"]) -> list[tuple[int, int]]:
    """(first, last + 1) of the queries whose masks are made at once; even numbers of them."""
    (B, T), S = q.shape[:2], k.shape[1]
    size = max(MASK_BYTES // (2 * B * S) // 2 * 2, 2)
    return [(begin, min(begin + size, T)) for begin in range(0, T, size)]


def _rows(
    keys: VisibleKeys, begin: int, end: int
) -> tuple[Int[Array, "B t"], Int[Array, "B t"], tuple[Int[Array, "B t K"], ...]]:
    """The arguments of ``seen_keys`` for these queries."""
    start, stop, *indices = (x[:, begin:end] for x in keys if x is not None)
    return start, stop, tuple(indices)
