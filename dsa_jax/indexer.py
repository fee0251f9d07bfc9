"""The lightning indexer: what it stores per key, what it computes per query, and its choice.

Its inputs are detached: no loss of the model reaches it and its loss reaches nothing else
(DeepSeek-V3.2-Exp report, section 2.1).
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dsa_jax.config import ModelConfig
from dsa_jax.fp8.quantize import fake_quantize, rotate_hadamard
from dsa_jax.linear import linear, linear_float32
from dsa_jax.norm import layer_norm
from dsa_jax.rope import Rotation, rotate_halves, rotate_interleaved

Parameters = Mapping[str, Any]


class Indexer(nn.Module):
    """Owns the indexer's parameters; ``index_keys`` and ``index_queries`` are its mathematics."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> Parameters:
        c = self.config
        normal, dtype = nn.initializers.normal(c.init_std), jnp.dtype(c.param_dtype)
        return {
            "wq_b": self.param("wq_b", normal, (c.q_lora_rank, c.index_n_heads * c.index_head_dim), dtype),
            "wk": self.param("wk", normal, (c.d_model, c.index_head_dim), dtype),
            "weights_proj": self.param("weights_proj", normal, (c.d_model, c.index_n_heads), jnp.float32),
            **KeyNorm(c, name="k_norm")(),
        }


class KeyNorm(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self) -> Parameters:
        shape = (self.config.index_head_dim,)
        return {
            "k_norm_scale": self.param("scale", nn.initializers.ones, shape, jnp.float32),
            "k_norm_bias": self.param("bias", nn.initializers.zeros, shape, jnp.float32),
        }


def index_keys(
    x: Float[Array, "B T D"], rotation: Rotation, parameters: Parameters, config: ModelConfig
) -> Float[Array, "B T J"]:
    """k = rope(LayerNorm(x wk)): one key per token, shared by all index heads."""
    k = linear(lax.stop_gradient(x), parameters["wk"])
    k = layer_norm(k, parameters["k_norm_scale"], parameters["k_norm_bias"], config.index_norm_eps)
    return _quantized(_rotate_first_dims(k, rotation, config), config)


def index_queries(
    x: Float[Array, "B T D"],
    q_compressed: Float[Array, "B T Q"],
    rotation: Rotation,
    parameters: Parameters,
    config: ModelConfig,
) -> tuple[Float[Array, "B T I J"], Float[Array, "B T I"]]:
    """q = rope(wq_b of the normalised query latent), and the float32 head weights with both constant scales."""
    q = linear(lax.stop_gradient(q_compressed), parameters["wq_b"])
    q = q.reshape(*q.shape[:2], config.index_n_heads, config.index_head_dim)
    q = _quantized(_rotate_first_dims(q, rotation, config), config)
    weights = linear_float32(lax.stop_gradient(x), parameters["weights_proj"])
    return q, weights * (config.index_n_heads**-0.5 * config.index_head_dim**-0.5)


def _rotate_first_dims(x: jax.Array, rotation: Rotation, config: ModelConfig) -> jax.Array:
    rotate = rotate_interleaved if config.index_rope_interleaved else rotate_halves
    dim = config.qk_rope_head_dim
    return jnp.concatenate([rotate(x[..., :dim], rotation), x[..., dim:]], axis=-1)


def _quantized(x: jax.Array, config: ModelConfig) -> jax.Array:
    return fake_quantize(rotate_hadamard(x)) if config.index_fp8 else x
