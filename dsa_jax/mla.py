"""Multi-head latent attention with DeepSeek Sparse Attention: project, select, attend.

Two forms compute the same: expanded heads with a mask (MHA, short sequences) and queries absorbed into the
latent space over gathered latents (MQA, long sequences and decode). ``prefers_mha`` is the one place
that chooses.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

import pallas_kernels as kernels
from dsa_jax.cache import Placement
from dsa_jax.config import ModelConfig
from dsa_jax.fp8_weight import as_matrix
from dsa_jax.indexer import Indexer, index_keys, index_queries
from dsa_jax.linear import linear
from dsa_jax.norm import rms_norm
from dsa_jax.quantize import fake_quantize
from dsa_jax.rope import Rotation, rotate_interleaved
from pallas_kernels.blocking import map_query_blocks
from pallas_kernels.keys import visible

Parameters = Mapping[str, Any]
Keys = tuple[jax.Array, ...]  # latent [B S C], k_rope [B S R], index_k [B S J]


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
    """Whether expanded heads over all S keys cost fewer multiplications than absorbed heads over the chosen ones.

    Counted per query and head: MHA multiplies every key (P + R + H) and shares the expansion of S latents
    among T queries; MQA multiplies min(K, S) latents (2 C + R) and absorbs its query and output.
    For V3.2 the two meet near S = 7,000 when all of it is prefilled at once; decode is always MQA.
    """
    if config.attention_form != "auto":
        return config.attention_form == "mha"
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
    T, S = x.shape[1], latent.shape[1]
    captured = [name for name in ("index_scores", "topk_indices") if name in capture]
    selects = config.attention == "sparse" and (S > config.index_topk or bool(captured))
    wants_lse = "lse" in capture

    def select(x, q_compressed, cos, sin, key_start, key_stop):
        q, weights = index_queries(x, q_compressed, (cos, sin), parameters["indexer"], config)
        scores = kernels.index_scores(
            q, index_k, weights, key_start, key_stop, implementation=config.implementation
        )
        indices = kernels.select_topk(
            scores,
            config.index_topk,
            key_start=key_start,
            key_stop=key_stop,
            implementation=config.implementation,
        )
        extras = {"index_scores": scores, "topk_indices": indices}
        return checkpoint_name(indices, "topk_indices"), {name: extras[name] for name in captured}

    if prefers_mha(config, T, S):
        chosen, extras = (
            map_query_blocks(select, config.query_block, x, q_compressed, *rotation, *bounds)
            if selects
            else (None, {})
        )
        q_nope, q_rope = queries(q_compressed, rotation, parameters, config)
        k_nope, v = expand(latent, parameters, config)
        out, lse = kernels.masked_mha(
            q_nope, q_rope, k_nope, k_rope, v, *bounds, chosen,
            scale=config.softmax_scale, implementation=config.implementation,
        )  # fmt: skip
        extras |= {"lse": lse} if wants_lse else {}
        return linear(out.reshape(*out.shape[:2], -1), parameters["wo"]), extras

    # One rounding at the end of the backward pass, not one per block: blocks add their gradients in float32.
    latent32, k_rope32 = latent.astype(jnp.float32), k_rope.astype(jnp.float32)

    def attend_block(x, q_compressed, cos, sin, key_start, key_stop):
        if selects:
            chosen, extras = select(x, q_compressed, cos, sin, key_start, key_stop)
        else:
            chosen, extras = _all_visible(key_start, key_stop, S), {}
        q_nope, q_rope = queries(q_compressed, (cos, sin), parameters, config)
        w_uk, w_uv = absorbed_weights(parameters, config, x.dtype)
        out, lse = kernels.sparse_mla(
            jnp.einsum("BTNP,CNP->BTNC", q_nope, w_uk),
            q_rope, latent32.astype(latent.dtype), k_rope32.astype(k_rope.dtype), chosen,
            scale=config.softmax_scale, implementation=config.implementation,
        )  # fmt: skip
        out = jnp.einsum("BTNC,CNH->BTNH", out, w_uv)
        extras |= {"lse": lse} if wants_lse else {}
        return linear(out.reshape(*out.shape[:2], -1), parameters["wo"]), extras

    attend_block = jax.checkpoint(
        attend_block, policy=jax.checkpoint_policies.save_only_these_names("topk_indices")
    )
    return map_query_blocks(attend_block, config.query_block, x, q_compressed, *rotation, *bounds)


def queries(
    q_compressed: Float[Array, "B T Q"], rotation: Rotation, parameters: Parameters, config: ModelConfig
) -> tuple[Float[Array, "B T N P"], Float[Array, "B T N R"]]:
    """The heads' queries: the part without position, and the rotated part."""
    q = linear(q_compressed, parameters["wq_b"]).reshape(*q_compressed.shape[:2], config.n_heads, -1)
    q_nope, q_rope = jnp.split(q, [config.qk_nope_head_dim], axis=-1)
    return q_nope, rotate_interleaved(q_rope, rotation)


def expand(
    latent: Float[Array, "B S C"], parameters: Parameters, config: ModelConfig
) -> tuple[Float[Array, "B S N P"], Float[Array, "B S N H"]]:
    """Keys (without position) and values of all heads. wkv_b goes head by head: first P for k, then H for v."""
    kv = linear(latent, parameters["wkv_b"]).reshape(*latent.shape[:2], config.n_heads, -1)
    k_nope, v = jnp.split(kv, [config.qk_nope_head_dim], axis=-1)
    return k_nope, v


def absorbed_weights(
    parameters: Parameters, config: ModelConfig, dtype: jnp.dtype
) -> tuple[Float[Array, "C N P"], Float[Array, "C N H"]]:
    """W_uk, which takes queries into the latent space, and W_uv, which takes outputs out of it."""
    w = as_matrix(parameters["wkv_b"], dtype).reshape(config.kv_lora_rank, config.n_heads, -1)
    return w[..., : config.qk_nope_head_dim], w[..., config.qk_nope_head_dim :]


def _all_visible(key_start, key_stop, S):
    return jnp.where(visible(key_start, key_stop, S), jnp.arange(S, dtype=jnp.int32), -1)
