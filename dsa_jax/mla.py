"""Multi-head latent attention with DeepSeek Sparse Attention: project, then attend to the keys selected by the indexer.

Attention runs in one of two forms (``attention_form.prefers_mha`` chooses). MHA expands the latents to keys and values
per head and masks the keys that are not selected. MQA absorbs the expansion into queries and outputs, so that all
heads read the selected latents.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

import pallas_kernels as kernels
from dsa_jax.adapted import AdaptedWeight
from dsa_jax.attention_form import prefers_mha
from dsa_jax.cache import Keys, Placement, Queries
from dsa_jax.config import ModelConfig
from dsa_jax.fp8.quantize import fake_quantize
from dsa_jax.fp8.weight import as_matrix
from dsa_jax.indexer import Indexer, index_keys, select
from dsa_jax.linear import linear
from dsa_jax.norm import rms_norm
from dsa_jax.rope import Rotation, rotate_interleaved
from dsa_jax.sharding import PartialSum, query_axes, shard_map
from pallas_kernels.arithmetic import einsum
from pallas_kernels.blocking import map_query_blocks
from pallas_kernels.keys import visible

Parameters = Mapping[str, Any]

PER_KEY = ("batch", None, None)  # logical axes: every device has all keys of its rows
WEIGHTS_OF_HEADS = {"wq_b": (None, "heads"), "wkv_b": (None, "heads"), "wo": ("heads", None)}


class Mla(nn.Module):
    """Declares the parameters of one attention layer, which ``compress``, ``select_keys`` and ``attend`` read."""

    config: ModelConfig
    has_indexer: bool = True

    @nn.compact
    def __call__(self) -> Parameters:
        c = self.config
        normal, dtype = nn.initializers.normal(c.init_std), jnp.dtype(c.param_dtype)
        kv_head_dim = c.qk_nope_head_dim + c.v_head_dim
        parameters = {
            "wq_a": self.param("wq_a", normal, (c.d_model, c.q_lora_rank), dtype),
            "q_norm": self.param("q_norm", nn.initializers.ones, (c.q_lora_rank,), jnp.float32),
            "wq_b": self.param("wq_b", normal, (c.q_lora_rank, c.n_heads * c.qk_head_dim), dtype),
            "wkv_a": self.param("wkv_a", normal, (c.d_model, c.kv_lora_rank + c.qk_rope_head_dim), dtype),
            "kv_norm": self.param("kv_norm", nn.initializers.ones, (c.kv_lora_rank,), jnp.float32),
            "wkv_b": self.param("wkv_b", normal, (c.kv_lora_rank, c.n_heads * kv_head_dim), dtype),
            "wo": self.param("wo", normal, (c.n_heads * c.v_head_dim, c.d_model), dtype),
        }
        return parameters | ({"indexer": Indexer(c, name="indexer")()} if self.has_indexer else {})


def compress(
    hidden: Float[Array, "B T D"],
    rotation: Rotation,
    placement: Placement,
    parameters: Parameters,
    config: ModelConfig,
) -> tuple[Queries, Keys]:
    """The queries of T tokens, and their keys [B T ...], which are what a cache stores.

    Args:
      hidden: the normalised input of the layer.
      parameters: of one layer, as ``Mla`` declares them: ``params["params"]["dense_layers"]["attn"]`` without its
        leading layer axis, for example.
    """
    q_compressed = rms_norm(linear(hidden, parameters["wq_a"]), parameters["q_norm"], config.latent_norm_eps)
    kv = linear(hidden, parameters["wkv_a"])
    latent = rms_norm(kv[..., : config.kv_lora_rank], parameters["kv_norm"], config.latent_norm_eps)
    if config.kv_fp8:
        latent = fake_quantize(latent)
    k_rope = rotate_interleaved(kv[..., config.kv_lora_rank :], rotation)
    indexer = parameters.get("indexer")
    keys = Keys(latent, k_rope, None if indexer is None else index_keys(hidden, rotation, indexer, config))
    return Queries(hidden, q_compressed, rotation, placement.key_start, placement.key_stop), keys


def select_keys(
    queries: Queries,
    keys: Keys,
    parameters: Parameters,
    config: ModelConfig,
    capture: tuple[str, ...] = (),
) -> tuple[Int[Array, "B T K"] | None, dict[str, jax.Array]]:
    """The keys that a layer's indexer selects for T queries out of S keys; None: its queries read all visible keys.

    Selection runs over ``config.query_block`` queries at a time, so memory does not grow with T x S. When no query can
    see more than ``index_topk`` keys, all visible keys are selected and no score is computed, unless ``capture`` names
    "index_scores" or "topk_indices", which are then in the dict that is returned.
    """
    T, S = queries.hidden.shape[1], keys.latent.shape[1]
    captured = {"index_scores", "topk_indices"} & set(capture)
    if config.attention != "sparse" or not (S > config.index_topk or captured):
        return None, {}
    per_query = ("batch", "queries", None)
    selection = shard_map(
        partial(select, config=config, with_scores="index_scores" in captured, split_over=query_axes(T)),
        in_axes=(Queries.axes("queries"), PER_KEY, ()),
        out_axes=(per_query, per_query),
    )
    selected, scores = selection(queries, keys.index_k, parameters["indexer"])
    selected = checkpoint_name(selected, "topk_indices")
    found = {"index_scores": scores, "topk_indices": selected}
    return selected, {name: array for name, array in found.items() if name in captured}


def attend(
    queries: Queries,
    keys: Keys,
    selected: Int[Array, "B T K"] | None,
    parameters: Parameters,
    config: ModelConfig,
    with_lse: bool = False,
) -> tuple[Float[Array, "B T D"], Float[Array, "B T N"] | None]:
    """Attention output for T queries over S keys, and the log-sum-exp of each head if ``with_lse``.

    In the MQA form all work per query and head runs over ``config.query_block`` queries at a time, so memory does not
    grow with T x N x C.

    Args:
      selected: the keys that each query reads, from ``select_keys`` of this layer or of an earlier one; None: all
        visible ones.
    """
    per_query = ("batch", "sequence", None)
    attention = shard_map(
        partial(attend_heads, config=config, with_lse=with_lse),
        in_axes=(Queries.axes("sequence"), per_query, PER_KEY, WEIGHTS_OF_HEADS),
        out_axes=(PartialSum(per_query, over=("heads",)), ("batch", "sequence", "heads")),
    )
    return attention(
        dataclasses.replace(queries, hidden=None),
        selected,
        keys._replace(index_k=None),
        {name: parameters[name] for name in WEIGHTS_OF_HEADS},
    )


def attend_heads(
    queries: Queries,
    selected: Int[Array, "B T K"] | None,
    keys: Keys,
    parameters: Parameters,
    config: ModelConfig,
    with_lse: bool = False,
) -> tuple[Float[Array, "B T D"], Float[Array, "B T N"] | None]:
    """The part of the output that comes from the heads in ``parameters``, and their log-sum-exp if ``with_lse``.

    They read the selected keys, or all visible ones if ``selected`` is None. ``queries.hidden`` and ``keys.index_k``
    are not read and may be None.
    """
    T, S = queries.q_compressed.shape[1], keys.latent.shape[1]
    if prefers_mha(config, T, S):
        q_nope, q_rope = query_heads(queries, parameters, config)
        k_nope, v = expand(keys.latent, parameters, config)
        out, lse = kernels.masked_mha(
            q_nope, q_rope, k_nope, keys.k_rope, v, queries.key_start, queries.key_stop, selected,
            scale=config.softmax_scale, implementation=config.implementation,
        )  # fmt: skip
        return linear(out.reshape(*out.shape[:2], -1), parameters["wo"]), lse if with_lse else None

    # Each block adds its gradient of the keys in float32, so that the backward pass rounds once, not once per block.
    latent32, k_rope32 = keys.latent.astype(jnp.float32), keys.k_rope.astype(jnp.float32)

    @jax.checkpoint
    def one_block(queries: Queries, *selected: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        indices = selected[0] if selected else _all_visible(queries.key_start, queries.key_stop, S)
        q_nope, q_rope = query_heads(queries, parameters, config)
        out, lse = kernels.sparse_mla(
            absorb_keys(q_nope, parameters, config),
            q_rope, latent32.astype(keys.latent.dtype), k_rope32.astype(keys.k_rope.dtype), indices,
            scale=config.softmax_scale, implementation=config.implementation,
        )  # fmt: skip
        out = absorb_values(out, parameters, config)
        return linear(out.reshape(*out.shape[:2], -1), parameters["wo"]), lse if with_lse else None

    arguments = (queries,) if selected is None else (queries, selected)
    return map_query_blocks(one_block, config.query_block, *arguments)


def query_heads(
    queries: Queries, parameters: Parameters, config: ModelConfig
) -> tuple[Float[Array, "B T N P"], Float[Array, "B T N R"]]:
    """The queries of each head: the part without position, and the rotated part."""
    q_compressed = queries.q_compressed
    q = linear(q_compressed, parameters["wq_b"]).reshape(*q_compressed.shape[:2], -1, config.qk_head_dim)
    q_nope, q_rope = jnp.split(q, [config.qk_nope_head_dim], axis=-1)
    return q_nope, rotate_interleaved(q_rope, queries.rotation)


def expand(
    latent: Float[Array, "B S C"], parameters: Parameters, config: ModelConfig
) -> tuple[Float[Array, "B S N P"], Float[Array, "B S N H"]]:
    """Keys (without position) and values of each head. In wkv_b each head has P columns for k, then H for v."""
    head_dim = config.qk_nope_head_dim + config.v_head_dim
    kv = linear(latent, parameters["wkv_b"]).reshape(*latent.shape[:2], -1, head_dim)
    k_nope, v = jnp.split(kv, [config.qk_nope_head_dim], axis=-1)
    return k_nope, v


def absorb_keys(
    q_nope: Float[Array, "B T N P"], parameters: Parameters, config: ModelConfig
) -> Float[Array, "B T N C"]:
    """The queries in the latent space: q W_uk^T, where W_uk [C N P] is the part of wkv_b that makes keys."""
    keys = slice(None, config.qk_nope_head_dim)
    beside = ("b", "BTNP,rNP->BTNr"), ("a", "BTNr,Cr->BTNC")
    return _absorb("BTNP,CNP->BTNC", beside, q_nope, keys, parameters, config)


def absorb_values(
    out: Float[Array, "B T N C"], parameters: Parameters, config: ModelConfig
) -> Float[Array, "B T N H"]:
    """The values of latent outputs: out W_uv, where W_uv [C N H] is the part of wkv_b that makes values."""
    values = slice(config.qk_nope_head_dim, None)
    beside = ("a", "BTNC,Cr->BTNr"), ("b", "BTNr,rNH->BTNH")
    return _absorb("BTNC,CNH->BTNH", beside, out, values, parameters, config)


def _absorb(
    equation: str,
    beside: tuple[tuple[str, str], ...],
    x: jax.Array,
    part: slice,
    parameters: Parameters,
    config: ModelConfig,
) -> jax.Array:
    """x times this part of each head's columns of wkv_b, and of the product of its factors if it has an adapter.

    equation: of the product with the weight. beside: the adapter's factors in the order in which x meets them, each
    with the equation of its product.
    """
    weight, head_dim = parameters["wkv_b"], config.qk_nope_head_dim + config.v_head_dim

    def of_heads(matrix: jax.Array) -> jax.Array:
        return matrix.reshape(matrix.shape[0], -1, head_dim)[..., part]

    if not isinstance(weight, AdaptedWeight):
        return jnp.einsum(equation, x, of_heads(as_matrix(weight, x.dtype)))
    product = einsum(equation, x, of_heads(as_matrix(weight.weight, x.dtype)))
    factors, added = {"a": weight.a, "b": of_heads(weight.b)}, x.astype(jnp.float32)
    for name, of_factor in beside:
        added = einsum(of_factor, added, factors[name])
    return (product + added).astype(x.dtype)


def _all_visible(key_start: jax.Array, key_stop: jax.Array, S: int) -> jax.Array:
    return jnp.where(visible(key_start, key_stop, S), jnp.arange(S, dtype=jnp.int32), -1)
