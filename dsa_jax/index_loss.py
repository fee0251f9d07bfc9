"""The index loss (L_I): the KL divergence from the attention of a layer to the softmax of its index scores.

With dense attention it covers all visible keys (the warm-up, eq. 3 of the DeepSeek-V3.2-Exp report), with sparse
attention the selected keys (eq. 4). Its gradient stays inside the indexer: the indexer's inputs are detached, and the
attention is a constant target.

Only the indexer's queries and keys learn from the loss, so the gradient is small: a few parameters and one array per
token. It is computed together with the loss, in one pass over the queries, and kept for the backward pass.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

import pallas_kernels as kernels
from dsa_jax.cache import Keys, Queries
from dsa_jax.config import ModelConfig
from dsa_jax.indexer import index_queries
from dsa_jax.mla import PER_KEY, absorb_keys, expand, query_heads
from dsa_jax.sharding import PartialSum, as_stored, constrain, shard_map
from pallas_kernels.arithmetic import accumulator
from pallas_kernels.blocking import join_queries, split_queries


class Target(NamedTuple):
    """What ``mla.attend`` computed: the log-sum-exp of each head, and the keys it is over (None: all visible ones)."""

    lse: Float[Array, "B T N"]
    topk_indices: Int[Array, "B T K"] | None


class Learned(NamedTuple):
    """What the loss is differentiated for; its gradient has the same structure."""

    query_weights: Any  # wq_b and weights_proj of the indexer
    index_k: Any  # [B S J]


class Constants(NamedTuple):
    """What the loss reads and no gradient reaches."""

    queries: Any
    keys: Any  # without index_k, which is learned
    heads: Any  # wq_b and wkv_b of the attention
    target: Any
    valid: Any  # [B T], False for padding


class Losses(NamedTuple):
    """The loss in nats, and its gradient for ``Learned`` in float32 (None if not asked for)."""

    total: Any  # the sum of kl over the valid tokens
    kl: Any  # [B T], 0 for padding
    gradients: Any


def index_loss(
    queries: Queries,
    keys: Keys,
    target: Target,
    valid: Bool[Array, "B T"],
    parameters: Mapping[str, Any],
    config: ModelConfig,
) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
    """(sum over the valid tokens, KL per token [B T]), in nats. Only the sum is differentiable.

    queries, keys: as ``mla.attend`` takes them. parameters: of the attention layer, the indexer's included.
    """
    indexer = parameters["indexer"]
    learned = Learned({name: indexer[name] for name in ("wq_b", "weights_proj")}, keys.index_k)
    heads = {name: parameters[name] for name in ("wq_b", "wkv_b")}
    constants = Constants(queries, keys._replace(index_k=None), heads, target, valid)
    return _index_loss(config, learned, lax.stop_gradient(constants))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _index_loss(config: ModelConfig, learned: Learned, constants: Constants) -> tuple[jax.Array, jax.Array]:
    losses = _spread(config, learned, constants, with_gradients=False)
    return losses.total, losses.kl


def _forward(
    config: ModelConfig, learned: Learned, constants: Constants
) -> tuple[tuple[jax.Array, jax.Array], Learned]:
    losses = _spread(config, learned, constants, with_gradients=True)
    gradients = jax.tree.map(lambda g, x: g.astype(x.dtype), losses.gradients, learned)
    gradients = Learned(
        query_weights=as_stored("attn.indexer", gradients.query_weights),
        index_k=constrain(gradients.index_k, "batch", "sequence", None),
    )
    return (losses.total, losses.kl), checkpoint_name(gradients, "index_gradients")


def _backward(
    config: ModelConfig, gradients: Learned, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[Learned, None]:
    d_total, _ = cotangents
    return jax.tree.map(lambda g: (d_total * g).astype(g.dtype), gradients), None


_index_loss.defvjp(_forward, _backward)


def _spread(config: ModelConfig, learned: Learned, constants: Constants, with_gradients: bool) -> Losses:
    """The loss with the queries split over devices, and all heads on each: the target is a sum over heads."""
    per_query = ("batch", "queries", None)
    gradients = Learned(
        query_weights=PartialSum((), over=("batch", "queries")),
        index_k=PartialSum(PER_KEY, over=("queries",)),
    )
    loss = shard_map(
        partial(_dense if constants.target.topk_indices is None else _selected, config, with_gradients),
        in_axes=(
            Learned(query_weights=(), index_k=PER_KEY),
            Constants(
                queries=Queries.axes("queries"),
                keys=PER_KEY,
                heads=(),
                target=per_query,
                valid=per_query[:2],
            ),
        ),
        out_axes=Losses(
            total=PartialSum((), over=("batch", "queries")),
            kl=per_query[:2],
            gradients=gradients if with_gradients else None,
        ),
    )
    return loss(learned, constants)


def _dense(config: ModelConfig, with_gradients: bool, learned: Learned, constants: Constants) -> Losses:
    """The loss over all visible keys."""
    queries, keys, heads = constants.queries, constants.keys, constants.heads

    def loss(learned: Learned) -> tuple[jax.Array, jax.Array]:
        q, weights = index_queries(queries, learned.query_weights, config)
        q_nope, q_rope = query_heads(queries, heads, config)
        k_nope, _ = expand(keys.latent, heads, config)  # a third of the absorbed form's operations
        return kernels.index_kl_dense(
            q, learned.index_k, weights, q_nope, q_rope, k_nope, keys.k_rope, constants.target.lse,
            queries.key_start, queries.key_stop, constants.valid.astype(jnp.float32),
            scale=config.softmax_scale, implementation=config.implementation,
        )  # fmt: skip

    return _evaluate(loss, learned, with_gradients)


def _selected(config: ModelConfig, with_gradients: bool, learned: Learned, constants: Constants) -> Losses:
    """The loss over the selected keys, ``config.query_block`` queries at a time."""
    keys, heads = constants.keys, constants.heads

    def one_block(sums: Losses, xs: Any) -> tuple[Losses, jax.Array]:
        queries, target, valid = xs
        q_nope, q_rope = query_heads(queries, heads, config)
        q_latent = absorb_keys(q_nope, heads, config)

        def loss(learned: Learned) -> tuple[jax.Array, jax.Array]:
            q, weights = index_queries(queries, learned.query_weights, config)
            return kernels.index_kl_selected(
                q, learned.index_k, weights, q_latent, q_rope, keys.latent, keys.k_rope, target.lse,
                target.topk_indices, valid.astype(jnp.float32),
                scale=config.softmax_scale, implementation=config.implementation,
            )  # fmt: skip

        block = _evaluate(loss, learned, with_gradients)
        return jax.tree.map(jnp.add, sums, block._replace(kl=None)), block.kl

    T = constants.valid.shape[1]
    block = min(config.query_block, T)
    per_query = constants.queries, constants.target, constants.valid
    gradients = jax.tree.map(jnp.zeros_like, _in_float32(learned)) if with_gradients else None
    sums, kl = lax.scan(
        one_block,
        Losses(total=jnp.float32(0.0), kl=None, gradients=gradients),
        jax.tree.map(lambda array: split_queries(array, block), per_query),
    )
    return sums._replace(kl=join_queries(kl, T))


def _evaluate(
    loss: Callable[[Learned], tuple[jax.Array, jax.Array]], learned: Learned, with_gradients: bool
) -> Losses:
    """``loss`` (total, kl) at ``learned``, and its gradients in float32 if they are asked for."""
    if not with_gradients:
        return Losses(*loss(learned), gradients=None)

    def of_float32(in_float32: Learned) -> tuple[jax.Array, jax.Array]:
        return loss(jax.tree.map(lambda x, given: x.astype(given.dtype), in_float32, learned))

    (total, kl), gradients = jax.value_and_grad(of_float32, has_aux=True)(_in_float32(learned))
    return Losses(total, kl, gradients)


def _in_float32(learned: Learned) -> Learned:
    return jax.tree.map(lambda x: x.astype(accumulator(x.dtype)), learned)
