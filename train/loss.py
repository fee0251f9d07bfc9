"""The losses of one batch: next token, MTP, expert balance, and the indexers' KL."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsa_jax.config import ModelConfig
from dsa_jax.norm import rms_norm
from dsa_jax.transformer import Transformer
from pallas_kernels.arithmetic import einsum
from pallas_kernels.blocking import block_size, split_queries
from train.config import Stage

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def cross_entropy(
    hidden: Float[Array, "B T D"], head: Float[Array, "D V"], targets: Int[Array, "B T"]
) -> Float[Array, ""]:
    """Sum over the targets (-1 = none) of -log softmax(hidden head)[target], in nats.

    Blocked over tokens, in the backward pass too: logits of all tokens (63 GiB for 128K tokens of V3.2's
    129,280 words) never exist.
    """

    @jax.checkpoint
    def one_block(total, xs):
        hidden, targets = xs
        logits = einsum("BTD,DV->BTV", hidden, head.astype(hidden.dtype))
        chosen = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
        nll = jax.nn.logsumexp(logits, axis=-1) - chosen
        return total + jnp.where(targets >= 0, nll, 0.0).sum(), None

    B, T, _ = hidden.shape
    block = block_size(T, B * head.shape[1] * 4)
    total, _ = jax.lax.scan(
        one_block, jnp.float32(0.0), (split_queries(hidden, block), split_queries(targets, block))
    )
    return total


def switched(config: ModelConfig, stage: Stage) -> ModelConfig:
    """The model as this stage runs it."""
    return dataclasses.replace(
        config, attention=stage.attention, index_loss=stage.trains in ("indexer", "both")
    )


def loss_fn(params: Any, batch: Batch, config: ModelConfig, stage: Stage) -> tuple[Float[Array, ""], Metrics]:
    """What the stage minimises, and its parts.

    batch: tokens, targets (the next token, -1 = no loss there) and segment_ids (0 = padding), all [B T] int32.
    Means are over the targets (CE, MTP) or the valid tokens (L_I, then summed over layers).

    Metrics: "ce" and "mtp" [nats per target], "balance", "index_kl" [layers, MTP's last; nats per token],
    "expert_load" [MoE layers, MTP's last; E] in tokens.
    """
    config = switched(config, stage)
    model = Transformer(config)
    tokens, targets, segment_ids = batch["tokens"], batch["targets"], batch["segment_ids"]
    _, _, aux = model.apply(params, tokens, segment_ids=segment_ids)
    tree = params["params"]
    metrics: Metrics = {}
    loads = [aux.get("expert_load", jnp.zeros((0, config.n_routed_experts), jnp.int32))]
    balances = [aux.get("balance", jnp.zeros(0))]
    index_losses = [aux["index_loss"] / _count(segment_ids != 0)] if config.index_loss else []

    mtp_hidden = None
    if config.n_mtp_layers:
        following = jnp.concatenate([tokens[:, 1:], jnp.maximum(targets[:, -1:], 0)], axis=1)
        # A document's last token has no next one to read: for the MTP layer it is padding.
        continues = segment_ids[:, 1:] == segment_ids[:, :-1]
        continues = jnp.concatenate([continues, targets[:, -1:] >= 0], axis=1)
        mtp_ids = jnp.where(continues, segment_ids, 0)
        _, _, mtp = model.apply(params, aux["hidden"], following, segment_ids=mtp_ids, method="mtp_logits")
        mtp_hidden = mtp["hidden"]
        loads.append(mtp["expert_load"][None])
        balances.append(mtp["balance"][None])
        if config.index_loss:
            index_losses.append(mtp["index_loss"][None] / _count(mtp_ids != 0))

    metrics["expert_load"] = jnp.concatenate(loads)
    total = jnp.float32(0.0)
    if stage.trains != "indexer":
        hidden = aux["hidden"]
        if config.mtp_hidden == "pre_norm":
            hidden = rms_norm(hidden, tree["norm"], config.norm_eps)
        metrics["ce"] = _mean(cross_entropy(hidden, tree["head"], targets), targets)
        metrics["balance"] = jnp.concatenate(balances).sum()
        total += metrics["ce"] + stage.balance_weight * metrics["balance"]
        if mtp_hidden is not None:
            head = tree["head"] if config.mtp_shared_embeddings else tree["mtp"]["head"]
            later = after_next(targets, segment_ids)
            metrics["mtp"] = _mean(cross_entropy(mtp_hidden, head, later), later)
            total += stage.mtp_weight * metrics["mtp"]
    if config.index_loss:
        metrics["index_kl"] = jnp.concatenate(index_losses)
        total += metrics["index_kl"].sum()
    metrics["loss"] = total
    return total, metrics


def after_next(targets: Int[Array, "B T"], segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """MTP's targets: the token after the next, -1 where it belongs to another document or to none."""
    same = segment_ids[:, 1:] == segment_ids[:, :-1]
    later = jnp.where(same, targets[:, 1:], -1)
    return jnp.pad(later, ((0, 0), (0, 1)), constant_values=-1)


def _mean(total: jax.Array, targets: jax.Array) -> jax.Array:
    return total / _count(targets >= 0)


def _count(where: jax.Array) -> jax.Array:
    return jnp.maximum(where.sum(), 1)
