"""Feed-forward layers: SwiGLU, and the mixture of experts with sigmoid, bias-corrected, group-limited routing."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dsa_jax.config import ModelConfig
from dsa_jax.grouped import grouped_matmul
from dsa_jax.linear import linear, linear_float32

Parameters = Mapping[str, Any]


class Ffn(nn.Module):
    """Parameters of one SwiGLU of width ``width``, or of ``n_experts`` of them stacked."""

    config: ModelConfig
    width: int
    n_experts: int | None = None

    @nn.compact
    def __call__(self) -> Parameters:
        c = self.config
        normal, dtype = nn.initializers.normal(c.init_std), jnp.dtype(c.param_dtype)
        stack = () if self.n_experts is None else (self.n_experts,)
        return {
            "w_gate": self.param("w_gate", normal, (*stack, c.d_model, self.width), dtype),
            "w_up": self.param("w_up", normal, (*stack, c.d_model, self.width), dtype),
            "w_down": self.param("w_down", normal, (*stack, self.width, c.d_model), dtype),
        }


class Moe(nn.Module):
    """Parameters of one MoE layer; ``moe`` is its mathematics."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> Parameters:
        c = self.config
        gate_shape = (c.d_model, c.n_routed_experts)
        return {
            "gate": self.param("gate", nn.initializers.normal(c.init_std), gate_shape, jnp.float32),
            "gate_bias": self.param("gate_bias", nn.initializers.zeros, gate_shape[1:], jnp.float32),
            "experts": Ffn(c, c.d_expert, c.n_routed_experts, name="experts")(),
            "shared_experts": Ffn(c, c.d_expert * c.n_shared_experts, name="shared_experts")(),
        }


def swiglu(x: Float[Array, "*tokens D"], parameters: Parameters) -> Float[Array, "*tokens D"]:
    """w_down(silu(w_gate x) * w_up x), the activation in float32."""
    return linear(
        _activate(linear(x, parameters["w_gate"]), linear(x, parameters["w_up"])), parameters["w_down"]
    )


def route(
    scores: Float[Array, "*tokens E"], bias: Float[Array, " E"], config: ModelConfig
) -> tuple[Int[Array, "*tokens A"], Float[Array, "*tokens A"]]:
    """The A experts of each token and their weights.

    The bias decides who is chosen and never enters the weight. A group counts by the sum of its two best
    biased scores; experts of the other groups are out (-inf: with 0 a negative bias would let them in).

    Source: DeepSeek-V3 report, section 2.1.2; V3.2's ``Gate`` in inference/model.py.
    """
    biased = lax.stop_gradient(scores) + lax.stop_gradient(bias)
    if config.n_expert_groups > 1:
        groups = biased.reshape(*biased.shape[:-1], config.n_expert_groups, -1)
        group_scores = lax.top_k(groups, 2)[0].sum(axis=-1)
        best = lax.top_k(group_scores, config.n_limited_groups)[1]
        kept = (best[..., None] == jnp.arange(config.n_expert_groups)).any(axis=-2)
        biased = jnp.where(kept[..., None], groups, -jnp.inf).reshape(biased.shape)
    experts = lax.top_k(biased, config.n_activated_experts)[1]
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if config.norm_topk_prob:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    return experts, weights * config.route_scale


def moe(
    x: Float[Array, "B T D"], valid: Bool[Array, "B T"], parameters: Parameters, config: ModelConfig
) -> tuple[Float[Array, "B T D"], dict[str, jax.Array]]:
    """Routed experts plus the shared one; no token is dropped.

    Tokens are sorted by expert and multiplied group by group (``grouped_matmul``); the weighted sum over a
    token's experts is float32.

    Returns:
      The output in the dtype of x, and experts [B T A], expert_weights [B T A], expert_load [E], the number of
      valid tokens that chose each expert, and balance, the mean over rows of ``balance_loss``.
    """
    scores = jax.nn.sigmoid(linear_float32(x, parameters["gate"]))
    experts, weights = route(scores, parameters["gate_bias"], config)
    load = jnp.zeros(config.n_routed_experts, jnp.int32).at[experts].add(valid[..., None].astype(jnp.int32))

    B, T, D = x.shape
    A = config.n_activated_experts
    by_expert = jnp.argsort(experts.reshape(-1), stable=True)
    tokens = x.reshape(B * T, D)[by_expert // A]
    group_sizes = jnp.bincount(experts.reshape(-1), length=config.n_routed_experts).astype(jnp.int32)

    routed = parameters["experts"]
    gate = grouped_matmul(tokens, routed["w_gate"], group_sizes)
    hidden = _activate(gate, grouped_matmul(tokens, routed["w_up"], group_sizes))
    outputs = grouped_matmul(hidden, routed["w_down"], group_sizes)[jnp.argsort(by_expert)].reshape(
        B, T, A, D
    )
    y = (outputs.astype(jnp.float32) * weights[..., None]).sum(axis=2)
    y = y + swiglu(x, parameters["shared_experts"]).astype(jnp.float32)
    return y.astype(x.dtype), {
        "experts": experts,
        "expert_weights": weights,
        "expert_load": load,
        "balance": balance_loss(scores, experts, valid).mean(),
    }


def balance_loss(
    scores: Float[Array, "B T E"], experts: Int[Array, "B T A"], valid: Bool[Array, "B T"]
) -> Float[Array, " B"]:
    """sum_i f_i P_i of each row: 1 when its tokens spread evenly, more when few experts get them.

    f_i: share of the row's choices that fell on expert i, times E (no gradient); P_i: mean of its normalised score.

    Source: DeepSeek-V3 report, section 2.1.2 (complementary sequence-wise auxiliary loss, without alpha).
    """
    B, T, E = scores.shape
    weight = valid.astype(jnp.float32)[..., None]
    n_valid = jnp.maximum(weight.sum(axis=1), 1.0)
    rows = jnp.arange(B)[:, None, None]
    chosen = jnp.zeros((B, E), jnp.float32).at[rows, experts].add(jnp.broadcast_to(weight, experts.shape))
    frequency = chosen * (E / experts.shape[-1]) / n_valid
    normalised = scores / (scores.sum(axis=-1, keepdims=True) + 1e-20)
    return (frequency * (normalised * weight).sum(axis=1) / n_valid).sum(axis=-1)


def _activate(gate: jax.Array, up: jax.Array) -> jax.Array:
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)
