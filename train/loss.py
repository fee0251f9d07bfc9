"""The losses of one batch: next token, MTP, expert balance, and the indexers' KL."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsa_jax.config import ModelConfig
from dsa_jax.mla import for_training
from dsa_jax.norm import rms_norm
from dsa_jax.sharding import gathered_matrix, shard_map
from dsa_jax.transformer import Transformer
from pallas_kernels.arithmetic import einsum
from pallas_kernels.blocking import block_size, map_query_blocks
from train.config import Stage

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def cross_entropy(
    hidden: Float[Array, "B T D"], head: Float[Array, "D V"], targets: Int[Array, "B T"]
) -> Float[Array, ""]:
    """Sum over the targets (-1 = none) of -log softmax(hidden head)[target], in nats."""
    return predictions(hidden, head, targets)[0].sum()


def predictions(
    hidden: Float[Array, "B T D"], head: Float[Array, "D V"], targets: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Of every target -log softmax(hidden head)[target] in nats, and whether no other word is likelier.

    0 and False where there is none (-1). Blocked over tokens, in the backward pass too: logits of all tokens (63 GiB
    for 128K tokens of V3.2's 129,280 words) never exist. On a mesh every device has its own tokens and
    its own part of the words, and what a token's parts have to say to each other is three numbers each.
    """
    tokens, words = ("batch", "sequence"), ("vocab",)
    of_parts = shard_map(
        _blocks_of_words,
        in_axes=((*tokens, None), (None, *words), words, tokens),
        out_axes=(*tokens, *words),
    )
    head = gathered_matrix("head", head)
    lse, highest, chosen = of_parts(hidden, head, jnp.arange(head.shape[1], dtype=jnp.int32), targets)
    chosen, counted = chosen.sum(axis=-1), targets >= 0
    nats = jnp.where(counted, jax.nn.logsumexp(lse, axis=-1) - chosen, 0.0)
    return nats, counted & (chosen >= highest.max(axis=-1))


def _blocks_of_words(hidden, head, words, targets):
    """Each [B T 1]: log-sum-exp and maximum of a token's logits over these words, and the target's logit or 0."""

    @jax.checkpoint
    def one_block(hidden, targets):
        logits = einsum("BTD,DV->BTV", hidden, head.astype(hidden.dtype))
        place = targets - words[0]
        here = (targets >= 0) & (place >= 0) & (place < words.shape[0])
        at = jnp.clip(place, 0, words.shape[0] - 1)[..., None]
        chosen = jnp.where(here, jnp.take_along_axis(logits, at, axis=-1)[..., 0], 0.0)
        highest = jax.lax.stop_gradient(logits).max(axis=-1)
        return tuple(x[..., None] for x in (jax.nn.logsumexp(logits, axis=-1), highest, chosen))

    B, T, _ = hidden.shape
    return map_query_blocks(one_block, block_size(T, B * head.shape[1] * 4), hidden, targets)


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
    if stage.trains != "indexer":
        config = for_training(config, batch["tokens"].shape[1])
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
        metrics["ce"] = _mean(cross_entropy(final_hidden(aux, tree, config), tree["head"], targets), targets)
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


def final_hidden(aux: Any, tree: Any, config: ModelConfig) -> Float[Array, "B T D"]:
    """What the head multiplies, from what ``Transformer`` returns beside its logits."""
    hidden = aux["hidden"]
    return rms_norm(hidden, tree["norm"], config.norm_eps) if config.mtp_hidden == "pre_norm" else hidden


def after_next(targets: Int[Array, "B T"], segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """MTP's targets: the token after the next, -1 where it belongs to another document or to none."""
    same = segment_ids[:, 1:] == segment_ids[:, :-1]
    later = jnp.where(same, targets[:, 1:], -1)
    return jnp.pad(later, ((0, 0), (0, 1)), constant_values=-1)


def _mean(total: jax.Array, targets: jax.Array) -> jax.Array:
    return total / _count(targets >= 0)


def _count(where: jax.Array) -> jax.Array:
    return jnp.maximum(where.sum(), 1)
