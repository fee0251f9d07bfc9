"""The lightning indexer: its key per token, its queries and head weights, and the keys that it selects.

Its inputs are detached: no loss of the model reaches the indexer, and the index loss (L_I) reaches nothing else
(DeepSeek-V3.2-Exp report, section 2.1).
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

import pallas_kernels as kernels
from dsa_jax.cache import Queries
from dsa_jax.config import ModelConfig
from dsa_jax.fp8.e4m3 import BLOCK
from dsa_jax.fp8.quantize import fake_quantize, quantize, rotate_hadamard
from dsa_jax.linear import linear, linear_float32
from dsa_jax.norm import layer_norm
from dsa_jax.rope import Rotation, rotate_halves, rotate_interleaved
from dsa_jax.sharding.zigzag import load_balanced
from pallas_kernels.blocking import map_query_blocks

Parameters = Mapping[str, Any]

# FP8 index scores pay from this number of queries per row. Quantising a key costs 384 bytes of traffic (0.1 ns) once,
# and saves 9 ns per 1000 queries (docs/benchmarks.md).
MIN_QUERIES_FOR_FP8 = 16


class Indexer(nn.Module):
    """Declares the parameters that ``index_keys`` and ``index_queries`` read."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> Parameters:
        c = self.config
        normal, dtype = nn.initializers.normal(c.init_std), jnp.dtype(c.param_dtype)
        return {
            "wq_b": self.param("wq_b", normal, (c.q_lora_rank, c.index_n_heads * c.index_head_dim), dtype),
            "wk": self.param("wk", normal, (c.d_model, c.index_head_dim), dtype),
            "weights_proj": self.param("weights_proj", normal, (c.d_model, c.index_n_heads), jnp.float32),
            "k_norm": KeyNorm(c, name="k_norm")(),
        }


class KeyNorm(nn.Module):
    """Declares scale and bias of the LayerNorm of the index keys."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> Parameters:
        shape = (self.config.index_head_dim,)
        return {
            "scale": self.param("scale", nn.initializers.ones, shape, jnp.float32),
            "bias": self.param("bias", nn.initializers.zeros, shape, jnp.float32),
        }


def index_keys(
    hidden: Float[Array, "B T D"], rotation: Rotation, parameters: Parameters, config: ModelConfig
) -> Float[Array, "B T J"]:
    """k = rope(LayerNorm(hidden wk)): one key per token, which all index heads share."""
    k = linear(lax.stop_gradient(hidden), parameters["wk"])
    k = layer_norm(k, parameters["k_norm"]["scale"], parameters["k_norm"]["bias"], config.index_norm_eps)
    return _quantized(_rotate_first_dims(k, rotation, config), config)


def index_queries(
    queries: Queries, parameters: Parameters, config: ModelConfig
) -> tuple[Float[Array, "B T I J"], Float[Array, "B T I"]]:
    """q = rope(q_compressed wq_b), and the float32 weight of each head, times both constant scales of the score."""
    q = linear(lax.stop_gradient(queries.q_compressed), parameters["wq_b"])
    q = q.reshape(*q.shape[:2], config.index_n_heads, config.index_head_dim)
    q = _quantized(_rotate_first_dims(q, queries.rotation, config), config)
    weights = linear_float32(lax.stop_gradient(queries.hidden), parameters["weights_proj"])
    return q, weights * (config.index_n_heads**-0.5 * config.index_head_dim**-0.5)


def select(
    queries: Queries,
    index_k: Float[Array, "B S J"],
    parameters: Parameters,
    config: ModelConfig,
    *,
    with_scores: bool = False,
    split_over: tuple[str, ...] = (),
    balance: bool | None = None,
) -> tuple[Int[Array, "B T K"], Float[Array, "B T S"] | None]:
    """The keys that the indexer selects for each query (-1 = no key), ``config.query_block`` queries at a time.

    Args:
      parameters: the indexer's.
      with_scores: also return the index scores.
      split_over: inside ``shard_map``, the mesh axes that the queries of a row are split over.
      balance: whether the devices along these axes share the work evenly (``sharding.zigzag``); None: where it pays.
        It never happens for an odd T, or with scores.
    """
    in_fp8 = _multiplies_fp8(index_k, queries.hidden.shape[1], config)
    k, k_scale = in_fp8_with_scale(index_k) if in_fp8 else (index_k, None)

    def project(queries: Queries) -> tuple[jax.Array, jax.Array]:
        q, weights = index_queries(queries, parameters, config)
        if in_fp8:
            q, q_scale = in_fp8_with_scale(q)
            weights = weights * q_scale
        return q, weights

    def choose(
        q: jax.Array, weights: jax.Array, key_start: jax.Array, key_stop: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
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

    if balance is None:  # a kernel skips the keys that no query of a block sees; XLA multiplies all
        sizes = config.index_n_heads, config.index_head_dim
        balance = kernels.index_scores_has_kernel(*sizes, k.dtype, config.implementation)
    if balance and split_over and queries.hidden.shape[1] % 2 == 0 and not with_scores:
        q, weights = map_query_blocks(project, config.query_block, queries)
        choose_all = load_balanced(partial(map_query_blocks, choose, config.query_block), split_over)
        return choose_all(*lax.stop_gradient((q, weights)), queries.key_start, queries.key_stop)

    def project_and_choose(queries: Queries) -> tuple[jax.Array, jax.Array | None]:
        return choose(*project(queries), queries.key_start, queries.key_stop)

    return map_query_blocks(project_and_choose, config.query_block, queries)


def in_fp8_with_scale(x: Float[Array, "*rows X"]) -> tuple[Float[Array, "*rows X"], Float[Array, "*rows"]]:
    """float8_e4m3fn values, and the scale of each row of 128; exact if x is what ``fake_quantize`` returned."""
    values, scales = quantize(x)
    return values, scales[..., 0]


def _multiplies_fp8(index_k: jax.Array, n_queries: int, config: ModelConfig) -> bool:
    """Whether the index scores are products of FP8 values rather than of the bfloat16 values that they stand for.

    Not in float32, whose products are to be exact: tensor cores add FP8 products in fewer bits.
    """
    quantised = config.index_fp8 and config.index_head_dim == BLOCK
    return quantised and index_k.dtype == jnp.bfloat16 and n_queries >= MIN_QUERIES_FOR_FP8


def _rotate_first_dims(x: jax.Array, rotation: Rotation, config: ModelConfig) -> jax.Array:
    rotate = rotate_interleaved if config.index_rope_interleaved else rotate_halves
    dim = config.qk_rope_head_dim
    return jnp.concatenate([rotate(x[..., :dim], rotation), x[..., dim:]], axis=-1)


def _quantized(x: jax.Array, config: ModelConfig) -> jax.Array:
    return fake_quantize(rotate_hadamard(x)) if config.index_fp8 else x
