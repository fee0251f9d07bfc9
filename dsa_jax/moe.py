"""Feed-forward layers: SwiGLU, and the mixture of experts with sigmoid, bias-corrected, group-limited routing."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from dsa_jax.adapted import AdaptedWeight
from dsa_jax.config import ModelConfig
from dsa_jax.expert_dispatch import dispatch_and_combine
from dsa_jax.fp8.weight import Fp8Weight
from dsa_jax.linear import linear, linear_float32
from dsa_jax.sharding import PartialSum, constrain, expert_devices, shard_map
from pallas_kernels import grouped_matmul

Parameters = Mapping[str, Any]


class Ffn(nn.Module):
    """Declares the parameters of one SwiGLU of this width, or of ``n_experts`` of them, stacked."""

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
    """Declares the parameters of one MoE layer, which ``moe`` reads."""

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

    The bias takes part in the choice and never enters the weight. A group is scored by the sum of its two best
    biased scores. Experts outside the best groups get -inf: with 0 they could beat experts with a negative bias.

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

    Tokens are sorted by expert, so that each expert multiplies one group of rows (``grouped_matmul``). The weighted
    sum over a token's experts is float32.

    Returns:
      The output in the dtype of x; and "experts" [B T A], "expert_weights" [B T A], "expert_load" [E] (the number of
      valid tokens that chose each expert) and "balance" (the mean of ``balance_loss`` over the rows of the batch).
    """
    per_token, per_row = ("batch", "sequence", None), ("rows", "sequence", None)
    x = constrain(x, *per_token)
    scores = jax.nn.sigmoid(linear_float32(x, parameters["gate"]))
    routing = shard_map(
        partial(_route_and_count, config=config),
        in_axes=(per_token, (None,), per_token[:2]),
        out_axes=(per_token, per_token, PartialSum((None,), over=("batch", "sequence"))),
    )
    experts, weights, load = routing(scores, parameters["gate_bias"], valid)

    in_and_out = {
        "w_gate": ("experts", None, "ff"),
        "w_up": ("experts", None, "ff"),
        "w_down": ("experts", "ff", None),
    }
    n_devices = expert_devices(x.shape[0])
    if n_devices > 1:
        routed = shard_map(
            partial(dispatched_experts, config=config, n_devices=n_devices),
            in_axes=(per_token, per_token, per_token, in_and_out),
            out_axes=PartialSum(per_token, over=("ff",)),
        )
        y = routed(x, experts, weights, parameters["experts"])
    else:
        routed = shard_map(
            partial(routed_experts, config=config),
            in_axes=(per_row, per_row, per_row, in_and_out, ("experts",)),
            out_axes=PartialSum(per_row, over=("experts", "ff")),
        )
        y = routed(x, experts, weights, parameters["experts"], jnp.arange(config.n_routed_experts))
    y = constrain(y, *per_token) + swiglu(x, parameters["shared_experts"]).astype(jnp.float32)
    return y.astype(x.dtype), {
        "experts": experts,
        "expert_weights": weights,
        "expert_load": load,
        "balance": balance_loss(scores, experts, valid).mean(),
    }


def routed_experts(
    x: Float[Array, "B T D"],
    experts: Int[Array, "B T A"],
    weights: Float[Array, "B T A"],
    parameters: Parameters,
    held: Int[Array, " held"],
    config: ModelConfig,
) -> Float[Array, "B T D"]:
    """Weighted sum over those experts of each token that this device holds (the numbers ``held``); float32.

    For tokens that every device along "expert" has: the devices' results are summed.
    """
    n_held = held.shape[0]
    if n_held == config.n_routed_experts:
        return _sum_of_experts(x, experts, weights, parameters, n_held)
    # Any share of the tokens may choose these experts. One row of the batch at a time, there is room for all of them.
    own = jnp.where((experts >= held[0]) & (experts <= held[-1]), experts - held[0], n_held)

    @jax.checkpoint
    def one_row(row: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        x, own, weights = (array[None] for array in row)
        return _sum_of_experts(x, own, weights, parameters, n_held)[0]

    return lax.map(one_row, (x, own, weights))


def dispatched_experts(
    x: Float[Array, "B T D"],
    experts: Int[Array, "B T A"],
    weights: Float[Array, "B T A"],
    parameters: Parameters,
    config: ModelConfig,
    n_devices: int,
) -> Float[Array, "B T D"]:
    """Weighted sum over all experts of each token, on whichever of ``n_devices`` devices they are; float32.

    For tokens that no other device has: they are dispatched to their experts.
    """
    n_held = config.n_routed_experts // n_devices

    def apply(rows: jax.Array, held: jax.Array) -> jax.Array:
        one = jnp.ones((1, rows.shape[0], 1), jnp.float32)
        found = _sum_of_experts(rows[None], held[None, :, None], one, parameters, n_held)
        return found[0].astype(rows.dtype)

    return dispatch_and_combine(x, experts, weights, n_held, n_devices, apply)


def _sum_of_experts(
    x: Float[Array, "B T D"],
    experts: Int[Array, "B T A"],
    weights: Float[Array, "B T A"],
    parameters: Parameters,
    n_experts: int,
) -> Float[Array, "B T D"]:
    """Weighted sum over the experts of each token. The number n_experts stands for none and adds 0."""
    B, T, D = x.shape
    A = experts.shape[-1]
    by_expert = jnp.argsort(experts.reshape(-1), stable=True)  # rows of no expert come last, and give 0
    group_sizes = jnp.bincount(experts.reshape(-1), length=n_experts).astype(jnp.int32)
    tokens = x.reshape(B * T, D)[by_expert // A]

    def product(rows: jax.Array, name: str) -> jax.Array:
        return _grouped_linear(rows, parameters[name], group_sizes)

    outputs = product(_activate(product(tokens, "w_gate"), product(tokens, "w_up")), "w_down")
    outputs = outputs[jnp.argsort(by_expert)].reshape(B, T, A, D)
    return (outputs.astype(jnp.float32) * weights[..., None]).sum(axis=2)


def _grouped_linear(
    rows: Float[Array, "M X"],
    weights: Array | Fp8Weight | AdaptedWeight,
    group_sizes: Int[Array, " groups"],
) -> Float[Array, "M Y"]:
    """``grouped_matmul`` in the dtype of rows, by weights that may be kept in FP8 and have adapters (``linear``)."""

    def product(rows: jax.Array, weights: Array | Fp8Weight, out_dtype: DTypeLike) -> jax.Array:
        if isinstance(weights, Fp8Weight):
            values, scales = weights.values, weights.scales
        else:
            values, scales = weights, None
        return grouped_matmul(rows, values, group_sizes, weight_scales=scales, out_dtype=out_dtype)

    if not isinstance(weights, AdaptedWeight):
        return product(rows, weights, rows.dtype)
    beside = product(rows.astype(jnp.float32), weights.a, jnp.float32)
    added = product(beside, weights.b, jnp.float32)
    return (product(rows, weights.weight, jnp.float32) + added).astype(rows.dtype)


def _route_and_count(
    scores: Float[Array, "B T E"], bias: Float[Array, " E"], valid: Bool[Array, "B T"], config: ModelConfig
) -> tuple[Int[Array, "B T A"], Float[Array, "B T A"], Int[Array, " E"]]:
    experts, weights = route(scores, bias, config)
    load = jnp.zeros(config.n_routed_experts, jnp.int32).at[experts].add(valid[..., None].astype(jnp.int32))
    return experts, weights, load


def balance_loss(
    scores: Float[Array, "B T E"], experts: Int[Array, "B T A"], valid: Bool[Array, "B T"]
) -> Float[Array, " B"]:
    """sum_i f_i P_i per row of the batch: 1 when all experts get as many tokens, more when few experts get most.

    f_i: E times the share of the row's choices that went to expert i (no gradient). P_i: its mean normalised score.

    Source: DeepSeek-V3 report, section 2.1.2 (complementary sequence-wise auxiliary loss, without alpha).
    """
    B, T, E = scores.shape
    weight = valid.astype(jnp.float32)[..., None]
    scores = jnp.where(valid[..., None], scores, 0.0)
    n_valid = jnp.maximum(weight.sum(axis=1), 1.0)
    rows = jnp.arange(B)[:, None, None]
    chosen = jnp.zeros((B, E), jnp.float32).at[rows, experts].add(jnp.broadcast_to(weight, experts.shape))
    frequency = chosen * (E / experts.shape[-1]) / n_valid
    normalised = scores / (scores.sum(axis=-1, keepdims=True) + 1e-20)
    return (frequency * (normalised * weight).sum(axis=1) / n_valid).sum(axis=-1)


def _activate(gate: jax.Array, up: jax.Array) -> jax.Array:
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)
