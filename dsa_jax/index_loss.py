"""What the indexer learns from: its KL to the attention of its own layer.

Dense attention gives the warm-up's loss over all visible keys (eq. 3 of the DeepSeek-V3.2-Exp report), sparse
attention the loss over the selected keys (eq. 4). No gradient leaves the indexer: its inputs are detached, and
the attention is a constant target.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import pallas_kernels as kernels
from dsa_jax.cache import Placement
from dsa_jax.config import ModelConfig
from dsa_jax.indexer import index_queries
from dsa_jax.mla import Keys, absorbed_weights, expand, queries
from dsa_jax.rope import Rotation
from dsa_jax.sharding import Partial, local
from pallas_kernels.blocking import join_queries, split_queries


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
    per_query, per_key = ("batch", "queries", None), ("batch", None, None)
    loss = local(
        partial(_loss, config=config),
        in_axes=(per_query, per_query, per_query, per_query, per_query, per_query[:2], per_key, per_key, ()),
        out_axes=(Partial((), over=("batch", "queries")), per_query[:2]),
    )
    bounds = (placement.key_start, placement.key_stop, placement.valid.astype(jnp.float32))
    constant = jax.lax.stop_gradient
    heads = {name: constant(parameters[name]) for name in ("wq_b", "wkv_b")}
    return loss(
        x, q_compressed, rotation, constant(lse), topk_indices, bounds, index_k, constant((latent, k_rope)),
        heads | {"indexer": parameters["indexer"]},
    )  # fmt: skip


def _loss(x, q_compressed, rotation, lse, topk_indices, bounds, index_k, attention_keys, parameters, config):
    """All heads of some queries: the target is a sum over heads, so queries are what devices share out."""
    latent, k_rope = attention_keys
    key_start, key_stop, token_weights = bounds
    scale, implementation = config.softmax_scale, config.implementation
    if topk_indices is None:
        q, weights = index_queries(x, q_compressed, rotation, parameters["indexer"], config)
        q_nope, q_rope = queries(q_compressed, rotation, parameters, config)
        k_nope, _ = expand(latent, parameters, config)  # a third of the absorbed form's operations
        return kernels.index_kl_dense(
            q, index_k, weights, q_nope, q_rope, k_nope, k_rope, lse,
            key_start, key_stop, token_weights, scale=scale, implementation=implementation,
        )  # fmt: skip

    index_k32 = index_k.astype(jnp.float32)  # blocks add their gradients in float32

    @jax.checkpoint
    def one_block(total, xs):
        x, q_compressed, cos, sin, lse, topk_indices, token_weights = xs
        q, weights = index_queries(x, q_compressed, (cos, sin), parameters["indexer"], config)
        q_nope, q_rope = queries(q_compressed, (cos, sin), parameters, config)
        q_latent = jnp.einsum("BTNP,CNP->BTNC", q_nope, absorbed_weights(parameters, config, x.dtype)[0])
        loss, kl = kernels.index_kl_selected(
            q, index_k32.astype(index_k.dtype), weights, q_latent, q_rope, latent, k_rope, lse,
            topk_indices, token_weights, scale=scale, implementation=implementation,
        )  # fmt: skip
        return total + loss, kl

    T = x.shape[1]
    arrays = (x, q_compressed, *rotation, lse, topk_indices, token_weights)
    block = min(config.query_block, T)
    total, kl = jax.lax.scan(
        one_block, jnp.float32(0.0), tuple(split_queries(array, block) for array in arrays)
    )
    return total, join_queries(kl, T)
