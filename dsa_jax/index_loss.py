"""What the indexer learns from: its KL to the attention of its own layer.

Dense attention gives the warm-up's loss over all visible keys (eq. 3 of the DeepSeek-V3.2-Exp report), sparse
attention the loss over the selected keys (eq. 4). No gradient leaves the indexer: its inputs are detached, and
the attention is a constant target.

Nothing but the indexer learns from it, so its gradient is that of a few parameters and the keys: it is taken
together with the loss, in the one pass over the queries that the loss takes, and kept for the backward pass.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

import pallas_kernels as kernels
from dsa_jax.cache import Placement
from dsa_jax.config import ModelConfig
from dsa_jax.indexer import index_queries
from dsa_jax.mla import Keys, absorbed_weights, expand, queries
from dsa_jax.rope import Rotation
from dsa_jax.sharding import PartialSum, as_stored, constrain, shard_map
from pallas_kernels.arithmetic import accumulator
from pallas_kernels.blocking import join_queries, split_queries

PER_QUERY, PER_KEY = ("batch", "queries", None), ("batch", None, None)


def index_loss(
    x: Float[Array, "B T D"],
    q_compressed: Float[Array, "B T Q"],
    keys: Keys,
    rotation: Rotation,
    placement: Placement,
    parameters: Mapping[str, Any],
    config: ModelConfig,
    lse: Float[Array, "B T N"],
    topk_indices: Int[Array, "B T K"] | None,
) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
    """(sum over the valid tokens, KL per token), in nats; only the sum is differentiable.

    lse is that of the attention whose keys are ``topk_indices``, or all visible ones if that is None.
    """
    latent, k_rope, index_k = keys
    bounds = (placement.key_start, placement.key_stop, placement.valid.astype(jnp.float32))
    heads = {name: parameters[name] for name in ("wq_b", "wkv_b")}
    constants = (x, q_compressed, rotation, lse, topk_indices, bounds, (latent, k_rope), heads)
    of_queries = {name: parameters["indexer"][name] for name in ("wq_b", "weights_proj")}
    return _index_loss(config, (of_queries, index_k), lax.stop_gradient(constants))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _index_loss(config, learned, constants):
    total, kl, _ = _spread(config, learned, constants, with_gradients=False)
    return total, kl


def _forward(config, learned, constants):
    total, kl, gradients = _spread(config, learned, constants, with_gradients=True)
    of_queries, of_keys = jax.tree.map(lambda g, x: g.astype(x.dtype), gradients, learned)
    of_queries, of_keys = as_stored("attn.indexer", of_queries), constrain(of_keys, "batch", "sequence", None)
    return (total, kl), checkpoint_name((of_queries, of_keys), "index_gradients")


def _backward(config, gradients, cotangents):
    d_total, _ = cotangents
    return jax.tree.map(lambda g: (d_total * g).astype(g.dtype), gradients), None


_index_loss.defvjp(_forward, _backward)


def _spread(config, learned, constants, with_gradients):
    """``_loss`` with all heads of some queries on each device: the target is a sum over heads."""
    per_query = (PER_QUERY, PER_QUERY, PER_QUERY, PER_QUERY, PER_QUERY, PER_QUERY[:2])
    gradients = PartialSum((), over=("batch", "queries")), PartialSum(PER_KEY, over=("queries",))
    loss = shard_map(
        partial(_loss, config=config, with_gradients=with_gradients),
        in_axes=(((), PER_KEY), (*per_query, PER_KEY, ())),
        out_axes=(
            PartialSum((), over=("batch", "queries")), PER_QUERY[:2], gradients if with_gradients else None,
        ),
    )  # fmt: skip
    return loss(learned, constants)


def _loss(learned, constants, config, with_gradients):
    """The loss, kl [B T] and, if asked for, the gradients of ``learned`` in float32."""
    x, q_compressed, rotation, lse, topk_indices, bounds, (latent, k_rope), heads = constants
    key_start, key_stop, token_weights = bounds
    switches = {"scale": config.softmax_scale, "implementation": config.implementation}
    in_float32 = jax.tree.map(lambda x: x.astype(accumulator(x.dtype)), learned)

    def evaluate(loss):
        """((loss, gradients), kl); the loss is a function of what is learned."""
        as_given = lambda ours: jax.tree.map(lambda x, given: x.astype(given.dtype), ours, learned)  # noqa: E731
        if not with_gradients:
            total, kl = loss(learned)
            return (total, None), kl
        (total, kl), gradients = jax.value_and_grad(lambda ours: loss(as_given(ours)), has_aux=True)(
            in_float32
        )
        return (total, gradients), kl

    if topk_indices is None:

        def dense(learned):
            indexer, index_k = learned
            q, weights = index_queries(x, q_compressed, rotation, indexer, config)
            q_nope, q_rope = queries(q_compressed, rotation, heads, config)
            k_nope, _ = expand(latent, heads, config)  # a third of the absorbed form's operations
            return kernels.index_kl_dense(
                q, index_k, weights, q_nope, q_rope, k_nope, k_rope, lse, key_start, key_stop, token_weights, **switches
            )  # fmt: skip

        (total, gradients), kl = evaluate(dense)
        return total, kl, gradients

    def one_block(sums, xs):
        x, q_compressed, cos, sin, lse, topk_indices, token_weights = xs
        q_nope, q_rope = queries(q_compressed, (cos, sin), heads, config)
        q_latent = jnp.einsum("BTNP,CNP->BTNC", q_nope, absorbed_weights(heads, config, x.dtype)[0])

        def selected(learned):
            indexer, index_k = learned
            q, weights = index_queries(x, q_compressed, (cos, sin), indexer, config)
            return kernels.index_kl_selected(
                q, index_k, weights, q_latent, q_rope, latent, k_rope, lse, topk_indices, token_weights, **switches
            )  # fmt: skip

        block, kl = evaluate(selected)
        return jax.tree.map(jnp.add, sums, block), kl

    T = x.shape[1]
    block = min(config.query_block, T)
    arrays = (x, q_compressed, *rotation, lse, topk_indices, token_weights)
    gradients = jax.tree.map(jnp.zeros_like, in_float32) if with_gradients else None
    (total, gradients), kl = lax.scan(
        one_block, (jnp.float32(0.0), gradients), tuple(split_queries(array, block) for array in arrays)
    )
    return total, join_queries(kl, T), gradients
