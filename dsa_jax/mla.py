"""Multi-head latent attention with DeepSeek Sparse Attention: project, select, attend.

Two forms compute the same: expanded heads with a mask (MHA, short sequences) and queries absorbed into the
latent space over gathered latents (MQA, long sequences and decode). ``prefers_mha`` is the one place
that chooses.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

import pallas_kernels as kernels
from dsa_jax.cache import Placement
from dsa_jax.config import ModelConfig
from dsa_jax.fp8.e4m3 import BLOCK
from dsa_jax.fp8.quantize import fake_quantize, quantize
from dsa_jax.fp8.weight import as_matrix
from dsa_jax.indexer import Indexer, index_keys, index_queries
from dsa_jax.linear import linear
from dsa_jax.norm import rms_norm
from dsa_jax.rope import Rotation, rotate_interleaved
from dsa_jax.sharding import PartialSum, query_axes, shard_map
from dsa_jax.sharding.zigzag import load_balanced
from pallas_kernels.blocking import map_query_blocks
from pallas_kernels.keys import visible

Parameters = Mapping[str, Any]
Bounds = tuple[jax.Array, jax.Array]  # key_start, key_stop [B T]
Keys = tuple[jax.Array, ...]  # latent [B S C], k_rope [B S R], index_k [B S J]

# Queries of a row from which FP8 index scores pay: keys are quantised once, 384 bytes of traffic each or 0.1 ns,
# and a key saves 9 ns in 1000 queries (docs/benchmarks.md).
FP8_QUERIES = 16


class Mla(nn.Module):
    """Parameters of one attention layer; ``compress`` and ``attend`` are its mathematics."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> Parameters:
        c = self.config
        normal, dtype = nn.initializers.normal(c.init_std), jnp.dtype(c.param_dtype)
        kv_head_dim = c.qk_nope_head_dim + c.v_head_dim
        return {
            "wq_a": self.param("wq_a", normal, (c.d_model, c.q_lora_rank), dtype),
            "q_norm": self.param("q_norm", nn.initializers.ones, (c.q_lora_rank,), jnp.float32),
            "wq_b": self.param("wq_b", normal, (c.q_lora_rank, c.n_heads * c.qk_head_dim), dtype),
            "wkv_a": self.param("wkv_a", normal, (c.d_model, c.kv_lora_rank + c.qk_rope_head_dim), dtype),
            "kv_norm": self.param("kv_norm", nn.initializers.ones, (c.kv_lora_rank,), jnp.float32),
            "wkv_b": self.param("wkv_b", normal, (c.kv_lora_rank, c.n_heads * kv_head_dim), dtype),
            "wo": self.param("wo", normal, (c.n_heads * c.v_head_dim, c.d_model), dtype),
            "indexer": Indexer(c, name="indexer")(),
        }


def compress(
    x: Float[Array, "B T D"], rotation: Rotation, parameters: Parameters, config: ModelConfig
) -> tuple[Float[Array, "B T Q"], Keys]:
    """The normalised query latent, and what a cache stores of each token."""
    q_compressed = rms_norm(linear(x, parameters["wq_a"]), parameters["q_norm"], config.latent_norm_eps)
    kv = linear(x, parameters["wkv_a"])
    latent = rms_norm(kv[..., : config.kv_lora_rank], parameters["kv_norm"], config.latent_norm_eps)
    if config.kv_fp8:
        latent = fake_quantize(latent)
    k_rope = rotate_interleaved(kv[..., config.kv_lora_rank :], rotation)
    return q_compressed, (latent, k_rope, index_keys(x, rotation, parameters["indexer"], config))


def prefers_mha(config: ModelConfig, T: int, S: int) -> bool:
    """Whether T queries over S keys run as expanded heads over all keys, not absorbed heads over the chosen ones.

    Where ``sparse_mla`` has a kernel (Hopper GPUs) the absorbed form: of one V3.2 layer, selection included, it
    was 2.1 times as fast at 2K tokens, 3.6 at 4K and 7.1 at 8K (docs/benchmarks.md). Elsewhere XLA computes both,
    and the one with fewer multiplications runs. ``for_training`` makes the choice for a pass with gradients.
    """
    if config.attention_form != "auto":
        return config.attention_form == "mha"
    widths = config.kv_lora_rank, config.qk_rope_head_dim, jnp.dtype(config.dtype)
    return not kernels.sparse_mla_has_kernel(*widths, config.implementation) and _fewer_expanded(config, T, S)


def for_training(config: ModelConfig, T: int) -> ModelConfig:
    """The config whose attention has a fixed form for rows of T tokens: gradients are XLA's in both forms."""
    if config.attention_form != "auto":
        return config
    return dataclasses.replace(config, attention_form="mha" if _fewer_expanded(config, T, T) else "mqa")


def _fewer_expanded(config: ModelConfig, T: int, S: int) -> bool:
    """Whether expanded heads cost fewer multiplications.

    Counted per query and head: MHA multiplies every key (P + R + H) and shares the expansion of S latents
    among T queries; MQA multiplies min(K, S) latents (2 C + R) and absorbs its query and output.
    For V3.2 the two meet near S = 7,000 when all of it is prefilled at once; decode is always MQA.
    """
    P, R, H, C = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim, config.kv_lora_rank
    chosen = min(config.index_topk, S) if config.attention == "sparse" else S
    mha = S * (P + R + H) + C * (P + H) * S / T
    mqa = chosen * (2 * C + R) + C * (P + H)
    return mha <= mqa


def attend(
    x: Float[Array, "B T D"],
    q_compressed: Float[Array, "B T Q"],
    keys: Keys,
    rotation: Rotation,
    placement: Placement,
    parameters: Parameters,
    config: ModelConfig,
    capture: tuple[str, ...] = (),
) -> tuple[Float[Array, "B T D"], dict[str, jax.Array]]:
    """Attention output for T queries over S keys, and what is captured of "index_scores", "topk_indices", "lse".

    Selection, and in the MQA form everything per query and head, runs over ``config.query_block`` queries at
    a time, so that memory does not grow with T x S or T x N x C. When no query can see more than
    ``index_topk`` keys the selection is all of them and no score is computed.
    """
    latent, k_rope, index_k = keys
    bounds = (placement.key_start, placement.key_stop)
    captured = [name for name in ("index_scores", "topk_indices") if name in capture]
    selects = config.attention == "sparse" and (latent.shape[1] > config.index_topk or bool(captured))

    chosen, extras = None, {}
    if selects:
        per_query = ("batch", "queries", None)
        with_scores, split_over = "index_scores" in captured, query_axes(x.shape[1])
        selection = shard_map(
            partial(select, config=config, with_scores=with_scores, split_over=split_over),
            in_axes=(per_query, per_query, per_query, per_query[:2], ("batch", None, None), ()),
            out_axes=(per_query, per_query),
        )
        chosen, scores = selection(x, q_compressed, rotation, bounds, index_k, parameters["indexer"])
        chosen = checkpoint_name(chosen, "topk_indices")
        extras = {"index_scores": scores, "topk_indices": chosen}
        extras = {name: extras[name] for name in captured}

    per_query, per_key = ("batch", "sequence", None), ("batch", None, None)
    weights = {"wq_b": (None, "heads"), "wkv_b": (None, "heads"), "wo": ("heads", None)}
    attention = shard_map(
        partial(attend_heads, config=config, with_lse="lse" in capture),
        in_axes=(per_query, per_query, per_query[:2], per_query, per_key, per_key, weights),
        out_axes=(PartialSum(per_query, over=("heads",)), ("batch", "sequence", "heads")),
    )
    out, lse = attention(
        q_compressed, rotation, bounds, chosen, latent, k_rope, {name: parameters[name] for name in weights}
    )
    return out, extras if lse is None else extras | {"lse": lse}


def select(
    x: Float[Array, "B T D"],
    q_compressed: Float[Array, "B T Q"],
    rotation: Rotation,
    bounds: Bounds,
    index_k: Float[Array, "B S J"],
    indexer: Parameters,
    config: ModelConfig,
    with_scores: bool = False,
    split_over: tuple[str, ...] = (),
    balance: bool | None = None,
) -> tuple[Int[Array, "B T K"], Float[Array, "B T S"] | None]:
    """The indexer's choice for each query, and the index scores if they are wanted.

    split_over: inside ``shard_map``, the mesh axes that the queries of a row are split over. Their devices even out the
    work (``causal_balance``) if ``balance``, or if that is None and it pays; never for an odd T or for scores.
    """
    # In float32 the FP8 values are multiplied as float32: tensor cores add FP8 products in fewer bits.
    in_fp8 = config.index_fp8 and index_k.dtype == jnp.bfloat16
    in_fp8 = in_fp8 and config.index_head_dim == BLOCK and x.shape[1] >= FP8_QUERIES
    k, k_scale = in_fp8_with_scale(index_k) if in_fp8 else (index_k, None)

    def index_queries_of(x, q_compressed, cos, sin):
        q, weights = index_queries(x, q_compressed, (cos, sin), indexer, config)
        if in_fp8:
            q, q_scale = in_fp8_with_scale(q)
            weights = weights * q_scale
        return q, weights

    def choose(q, weights, key_start, key_stop):
        scores = kernels.index_scores(
            q, k, weights, key_start, key_stop, k_scale=k_scale, implementation=config.implementation
        )
        indices = kernels.select_topk(
            scores,
            config.index_topk,
            key_start=key_start,
            key_stop=key_stop,
            implementation=config.implementation,
        )
        return indices, scores if with_scores else None

    T = x.shape[1]
    if balance is None:  # a kernel skips keys that no query of a block sees; XLA multiplies all
        sizes = config.index_n_heads, config.index_head_dim
        balance = kernels.index_scores_has_kernel(*sizes, k.dtype, config.implementation)
    if balance and split_over and T % 2 == 0 and not with_scores:
        q, weights = map_query_blocks(index_queries_of, config.query_block, x, q_compressed, *rotation)
        choose_all = load_balanced(partial(map_query_blocks, choose, config.query_block), split_over)
        return choose_all(*lax.stop_gradient((q, weights)), *bounds)

    def one_block(x, q_compressed, cos, sin, key_start, key_stop):
        q, weights = index_queries_of(x, q_compressed, cos, sin)
        return choose(q, weights, key_start, key_stop)

    return map_query_blocks(one_block, config.query_block, x, q_compressed, *rotation, *bounds)


def in_fp8_with_scale(x: Float[Array, "*rows X"]) -> tuple[Float[Array, "*rows X"], Float[Array, "*rows"]]:
    """float8_e4m3fn values and the scale of each row of 128; exact if x is what ``fake_quantize`` returned."""
    values, scales = quantize(x)
    return values, scales[..., 0]


def attend_heads(
    q_compressed: Float[Array, "B T Q"],
    rotation: Rotation,
    bounds: Bounds,
    chosen: Int[Array, "B T K"] | None,
    latent: Float[Array, "B S C"],
    k_rope: Float[Array, "B S R"],
    parameters: Parameters,
    config: ModelConfig,
    with_lse: bool = False,
) -> tuple[Float[Array, "B T D"], Float[Array, "B T N"] | None]:
    """What these heads (as many as the weights hold) add to the output, over the chosen keys or all visible ones."""
    S = latent.shape[1]
    if prefers_mha(config, q_compressed.shape[1], S):
        q_nope, q_rope = queries(q_compressed, rotation, parameters, config)
        k_nope, v = expand(latent, parameters, config)
        out, lse = kernels.masked_mha(
            q_nope, q_rope, k_nope, k_rope, v, *bounds, chosen,
            scale=config.softmax_scale, implementation=config.implementation,
        )  # fmt: skip
        return linear(out.reshape(*out.shape[:2], -1), parameters["wo"]), lse if with_lse else None

    # One rounding at the end of the backward pass, not one per block: blocks add their gradients in float32.
    latent32, k_rope32 = latent.astype(jnp.float32), k_rope.astype(jnp.float32)

    @jax.checkpoint
    def one_block(q_compressed, cos, sin, key_start, key_stop, *chosen):
        indices = chosen[0] if chosen else _all_visible(key_start, key_stop, S)
        q_nope, q_rope = queries(q_compressed, (cos, sin), parameters, config)
        w_uk, w_uv = absorbed_weights(parameters, config, q_compressed.dtype)
        out, lse = kernels.sparse_mla(
            jnp.einsum("BTNP,CNP->BTNC", q_nope, w_uk),
            q_rope, latent32.astype(latent.dtype), k_rope32.astype(k_rope.dtype), indices,
            scale=config.softmax_scale, implementation=config.implementation,
        )  # fmt: skip
        out = jnp.einsum("BTNC,CNH->BTNH", out, w_uv)
        return linear(out.reshape(*out.shape[:2], -1), parameters["wo"]), lse if with_lse else None

    arrays = (q_compressed, *rotation, *bounds, *(() if chosen is None else (chosen,)))
    return map_query_blocks(one_block, config.query_block, *arrays)


def queries(
    q_compressed: Float[Array, "B T Q"], rotation: Rotation, parameters: Parameters, config: ModelConfig
) -> tuple[Float[Array, "B T N P"], Float[Array, "B T N R"]]:
    """The heads' queries: the part without position, and the rotated part."""
    q = linear(q_compressed, parameters["wq_b"]).reshape(*q_compressed.shape[:2], -1, config.qk_head_dim)
    q_nope, q_rope = jnp.split(q, [config.qk_nope_head_dim], axis=-1)
    return q_nope, rotate_interleaved(q_rope, rotation)


def expand(
    latent: Float[Array, "B S C"], parameters: Parameters, config: ModelConfig
) -> tuple[Float[Array, "B S N P"], Float[Array, "B S N H"]]:
    """Keys (without position) and values of all heads. wkv_b goes head by head: first P for k, then H for v."""
    head_dim = config.qk_nope_head_dim + config.v_head_dim
    kv = linear(latent, parameters["wkv_b"]).reshape(*latent.shape[:2], -1, head_dim)
    k_nope, v = jnp.split(kv, [config.qk_nope_head_dim], axis=-1)
    return k_nope, v


def absorbed_weights(
    parameters: Parameters, config: ModelConfig, dtype: jnp.dtype
) -> tuple[Float[Array, "C N P"], Float[Array, "C N H"]]:
    """W_uk, which takes queries into the latent space, and W_uv, which takes outputs out of it."""
    head_dim = config.qk_nope_head_dim + config.v_head_dim
    w = as_matrix(parameters["wkv_b"], dtype).reshape(config.kv_lora_rank, -1, head_dim)
    return w[..., : config.qk_nope_head_dim], w[..., config.qk_nope_head_dim :]


def _all_visible(key_start, key_stop, S):
    return jnp.where(visible(key_start, key_stop, S), jnp.arange(S, dtype=jnp.int32), -1)
