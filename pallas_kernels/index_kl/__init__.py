"""index_kl: the KL divergence between attention and index scores, with the indexer's gradient."""

import functools
from typing import Any

import jax

from pallas_kernels.dispatch import Implementations, dispatch
from pallas_kernels.index_kl import dense, selected
from pallas_kernels.index_kl.dense import DenseAttention
from pallas_kernels.index_kl.divergence import Indexer
from pallas_kernels.index_kl.selected import SelectedAttention

_LOSS: dict[str, Implementations] = {
    "index_kl_dense": {"xla": dense.loss},
    "index_kl_selected": {"xla": selected.loss},
}
_LOSS_AND_GRADIENTS: dict[str, Implementations] = {
    "index_kl_dense": {"xla": dense.loss_and_gradients},
    "index_kl_selected": {"xla": selected.loss_and_gradients},
}


def index_kl_dense(
    q: jax.Array,
    k: jax.Array,
    weights: jax.Array,
    q_nope: jax.Array,
    q_rope: jax.Array,
    k_nope: jax.Array,
    k_rope: jax.Array,
    lse: jax.Array,
    key_start: jax.Array,
    key_stop: jax.Array,
    token_weights: jax.Array,
    *,
    scale: float,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Index loss (L_I) of the warm-up: KL between dense attention, summed over heads, and softmax of the index scores.

    Equivalent to, over the visible keys s of each query t:

        p = exp(logits - lse).sum(heads);  p /= p.sum()          # the target, constant
        kl[t] = sum_s p log p - p log_softmax(index_scores(q, k, weights))
        loss = sum_t token_weights[t] * kl[t]

    The exact gradient of a score is ``token_weights[t] * (softmax(I) - p)``, so loss and gradients come
    from one pass over blocks of queries: no array of size T x S exists, forward or backward. Only
    ``loss`` is differentiable, and only in q, k and weights; kl and everything else is constant.
    A query without a key has kl = 0.

    Args:
      q: [B T I J], k: [B S J], weights: [B T I] float32: the indexer's, as ``index_scores`` takes them.
      q_nope [B T N P], q_rope [B T N R], k_nope [B S N P], k_rope [B S R], lse [B T N]: the attention's, as
        ``masked_mha`` takes and returns them (the expanded form costs a third of the absorbed one).
      key_start, key_stop: [B T] int32, the interval of keys that each query may see.
      token_weights: [B T] float32; 1 / number of valid tokens gives the mean, 0 leaves a query out.
      scale: softmax scale of the attention.
      implementation: see ``pallas_kernels.dispatch``.

    Returns:
      loss [] and kl [B T], float32, in nats.

    Raises:
      ValueError: shapes contradict each other.

    Source: DeepSeek-V3.2-Exp report, eq. (3).
    """
    B, T, I, J = _check_indexer(q, k, weights, lse, token_weights)
    S, N = k.shape[1], lse.shape[-1]
    P, R = q_nope.shape[-1], q_rope.shape[-1]
    _check_shapes(
        q.shape,
        q_nope=(q_nope, (B, T, N, P)),
        q_rope=(q_rope, (B, T, N, R)),
        k_nope=(k_nope, (B, S, N, P)),
        k_rope=(k_rope, (B, S, R)),
        key_start=(key_start, (B, T)),
        key_stop=(key_stop, (B, T)),
    )
    attention = DenseAttention(q_nope, q_rope, k_nope, k_rope, lse, key_start, key_stop)
    options = "index_kl_dense", scale, implementation
    return _index_kl(*options, Indexer(q, k, weights), attention, token_weights)


def index_kl_selected(
    q: jax.Array,
    k: jax.Array,
    weights: jax.Array,
    q_latent: jax.Array,
    q_rope: jax.Array,
    latent: jax.Array,
    k_rope: jax.Array,
    lse: jax.Array,
    topk_indices: jax.Array,
    token_weights: jax.Array,
    *,
    scale: float,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Index loss (L_I) of the sparse stage: the same KL, with both distributions restricted to the selected keys.

    As ``index_kl_dense``, except that the keys of each query are those that ``topk_indices`` [B T K] lists
    (-1 = none), and that the attention's arrays are those that ``sparse_mla`` takes and returns: q_latent [B T N C],
    q_rope [B T N R], latent [B S C], k_rope [B S R], lse [B T N]. Keys outside the selection get no gradient.

    Source: DeepSeek-V3.2-Exp report, eq. (4).
    """
    B, T, I, J = _check_indexer(q, k, weights, lse, token_weights)
    S, N = k.shape[1], lse.shape[-1]
    C, R = q_latent.shape[-1], q_rope.shape[-1]
    _check_shapes(
        q.shape,
        q_latent=(q_latent, (B, T, N, C)),
        q_rope=(q_rope, (B, T, N, R)),
        latent=(latent, (B, S, C)),
        k_rope=(k_rope, (B, S, R)),
        topk_indices=(topk_indices, (B, T, topk_indices.shape[-1])),
    )
    attention = SelectedAttention(q_latent, q_rope, latent, k_rope, lse, topk_indices)
    options = "index_kl_selected", scale, implementation
    return _index_kl(*options, Indexer(q, k, weights), attention, token_weights)


def _check_indexer(
    q: jax.Array, k: jax.Array, weights: jax.Array, lse: jax.Array, token_weights: jax.Array
) -> tuple[int, ...]:
    if q.ndim != 4:
        raise ValueError(f"q must have shape [B T I J], got {q.shape}")
    B, T, I, J = q.shape
    _check_shapes(
        q.shape,
        k=(k, (B, k.shape[1], J)),
        weights=(weights, (B, T, I)),
        lse=(lse, (B, T, lse.shape[-1])),
        token_weights=(token_weights, (B, T)),
    )
    return q.shape


def _check_shapes(q_shape: tuple[int, ...], **expectations: tuple[jax.Array, tuple[int, ...]]) -> None:
    for name, (array, expected) in expectations.items():
        if array.shape != expected:
            raise ValueError(f"{name} must have shape {expected} to match q {q_shape}, got {array.shape}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _index_kl(
    operation: str,
    scale: float,
    implementation: str | None,
    indexer: Indexer,
    attention: DenseAttention | SelectedAttention,
    token_weights: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    table = _LOSS[operation]
    return dispatch(operation, table, implementation, indexer, attention, token_weights, scale=scale)


def _index_kl_forward(
    operation: str,
    scale: float,
    implementation: str | None,
    indexer: Indexer,
    attention: DenseAttention | SelectedAttention,
    token_weights: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], Indexer]:
    name, table = f"{operation} gradient", _LOSS_AND_GRADIENTS[operation]
    arrays = indexer, attention, token_weights
    loss, kl, gradients = dispatch(name, table, implementation, *arrays, scale=scale)
    return (loss, kl), gradients


def _index_kl_backward(
    operation: str, scale: float, implementation: str | None, gradients: Indexer, cotangents: Any
) -> tuple[Indexer, None, None]:
    d_loss, _ = cotangents
    return Indexer(*((d_loss * g).astype(g.dtype) for g in gradients)), None, None


_index_kl.defvjp(_index_kl_forward, _index_kl_backward)
