"""The losses of one batch: next token, MTP, expert balance, and the index loss (L_I).

``cross_entropy`` and ``cross_entropy_per_token`` also serve training loops of your own: they take hidden states and the
head, and never hold the logits of all tokens.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsa_jax.attention_form import for_training
from dsa_jax.config import ModelConfig
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
    """Sum over the targets of -log softmax(hidden head)[target], in nats, without the logits [B T V] in memory.

    Divide by the number of targets for the mean. Differentiable in hidden and head, also on a mesh:

    >>> _, _, aux = Transformer(for_training(config, T)).apply(params, tokens, return_logits=False)
    >>> loss = cross_entropy(aux["final_hidden"], params["params"]["head"], targets) / (targets >= 0).sum()

    Args:
      hidden: the normalised output of the model, ``aux["final_hidden"]``.
      head: ``params["params"]["head"]``.
      targets: the token to predict at each position; -1 where there is none.
    """
    return cross_entropy_per_token(hidden, head, targets)[0].sum()


def cross_entropy_per_token(
    hidden: Float[Array, "B T D"], head: Float[Array, "D V"], targets: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """-log softmax(hidden head)[target] in nats for each target, and whether no other token has a higher logit.

    0 and False where there is no target (-1). Logits exist for one block of tokens at a time, in the backward pass
    too: for 128K tokens and V3.2's vocabulary of 129,280, all logits would take 63 GiB. On a mesh each device
    computes its own tokens over its own part of the vocabulary, and devices exchange three numbers per token.
    """
    per_token, vocab = ("batch", "sequence"), ("vocab",)
    of_parts = shard_map(
        _parts_of_softmax,
        in_axes=((*per_token, None), (None, *vocab), vocab, per_token),
        out_axes=(*per_token, *vocab),
    )
    head, counted = gathered_matrix("head", head), targets >= 0
    hidden = jnp.where(counted[..., None], hidden, 0)  # the others reach no gradient of the head
    lse, highest, chosen = of_parts(hidden, head, jnp.arange(head.shape[1], dtype=jnp.int32), targets)
    chosen = chosen.sum(axis=-1)
    nats = jnp.where(counted, jax.nn.logsumexp(lse, axis=-1) - chosen, 0.0)
    return nats, counted & (chosen >= highest.max(axis=-1))


def _parts_of_softmax(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D part"],
    tokens: Int[Array, " part"],
    targets: Int[Array, "B T"],
) -> tuple[Float[Array, "B T 1"], Float[Array, "B T 1"], Float[Array, "B T 1"]]:
    """Log-sum-exp and maximum of the logits over this part of the vocabulary, and the target's logit, 0 if elsewhere.

    tokens: the ids of this part, ascending without gaps.
    """

    @jax.checkpoint
    def one_block(hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, ...]:
        logits = einsum("BTD,DV->BTV", hidden, head.astype(hidden.dtype))
        column = targets - tokens[0]
        here = (targets >= 0) & (column >= 0) & (column < tokens.shape[0])
        at = jnp.clip(column, 0, tokens.shape[0] - 1)[..., None]
        chosen = jnp.where(here, jnp.take_along_axis(logits, at, axis=-1)[..., 0], 0.0)
        highest = jax.lax.stop_gradient(logits).max(axis=-1)
        return tuple(x[..., None] for x in (jax.nn.logsumexp(logits, axis=-1), highest, chosen))

    B, T, _ = hidden.shape
    return map_query_blocks(one_block, block_size(T, B * head.shape[1] * 4), hidden, targets)


def switched(config: ModelConfig, stage: Stage) -> ModelConfig:
    """The model's config as this stage runs it: its attention, and whether it computes the index loss."""
    return dataclasses.replace(
        config, attention=stage.attention, index_loss=stage.trains in ("indexer", "both")
    )


class Counts(NamedTuple):
    """What the losses of a batch are divided by; at least 1 each."""

    targets: Any
    later: Any  # targets of the MTP layer
    tokens: Any  # that are no padding
    mtp_tokens: Any  # of these, those that have a next token
    rows: Any


def counts_of(batch: Batch) -> Counts:
    def count(where: jax.Array) -> jax.Array:
        return jnp.maximum(where.sum(), 1)

    targets, segment_ids = batch["targets"], batch["segment_ids"]
    return Counts(
        targets=count(targets >= 0),
        later=count(after_next(targets, segment_ids) >= 0),
        tokens=count(segment_ids != 0),
        mtp_tokens=count(_mtp_inputs(batch)[1] != 0),
        rows=jnp.int32(targets.shape[0]),
    )


def loss_fn(
    params: Any, batch: Batch, config: ModelConfig, stage: Stage, counts: Counts | None = None
) -> tuple[Float[Array, ""], Metrics]:
    """The scalar that the stage minimises, and its parts.

    batch: tokens, targets (the next token, -1 = none) and segment_ids (0 = padding), all [B T] int32.
    counts: those of the batch that this one is a part of; its losses are then the parts' sums. None: its own.
    Cross entropies are means over the targets. Index losses are means over the valid tokens, summed over the layers
    that have an indexer.

    Metrics: "ce" and "mtp" [nats per target], "balance", "index_kl" [full layers, MTP's last; nats per token],
    "expert_load" [MoE layers, MTP's last; E] in tokens.
    """
    config, counts = switched(config, stage), counts or counts_of(batch)
    tokens, targets, segment_ids = batch["tokens"], batch["targets"], batch["segment_ids"]
    if stage.trains != "indexer":
        config = for_training(config, tokens.shape[1])
    model, tree = Transformer(config), params["params"]
    _, _, main = model.apply(params, tokens, segment_ids=segment_ids, return_logits=False)
    parts = [_per_layer(main, counts.tokens, config)]
    if config.n_mtp_layers:
        next_tokens, mtp_ids = _mtp_inputs(batch)
        _, _, mtp = model.apply(
            params,
            main["hidden"],
            next_tokens,
            segment_ids=mtp_ids,
            method="mtp_logits",
            return_logits=False,
        )
        parts.append(_per_layer(jax.tree.map(lambda x: x[None], mtp), counts.mtp_tokens, config))
    layers = {name: jnp.concatenate([part[name] for part in parts]) for name in parts[0]}

    metrics: Metrics = {"expert_load": layers["expert_load"]}
    total = jnp.float32(0.0)
    if stage.trains != "indexer":
        metrics["ce"] = cross_entropy(main["final_hidden"], tree["head"], targets) / counts.targets
        metrics["balance"] = layers["balance"].sum() * (tokens.shape[0] / counts.rows)
        total += metrics["ce"] + stage.balance_weight * metrics["balance"]
        if config.n_mtp_layers:
            head = tree["head"] if config.mtp_shared_embeddings else tree["mtp"]["head"]
            later = after_next(targets, segment_ids)
            metrics["mtp"] = cross_entropy(mtp["final_hidden"], head, later) / counts.later
            total += stage.mtp_weight * metrics["mtp"]
    if config.index_loss:
        metrics["index_kl"] = layers["index_loss"]
        total += metrics["index_kl"].sum()
    metrics["loss"] = total
    return total, metrics


def _per_layer(aux: Metrics, n_tokens: jax.Array, config: ModelConfig) -> Metrics:
    """From the model's aux, per layer: "expert_load" and "balance" of MoE layers, and "index_loss" per token."""
    found = {
        "expert_load": aux.get("expert_load", jnp.zeros((0, config.n_routed_experts), jnp.int32)),
        "balance": aux.get("balance", jnp.zeros(0)),
    }
    if config.index_loss:
        found["index_loss"] = aux["index_loss"] / n_tokens
    return found


def _mtp_inputs(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """(next tokens, segment ids) for the MTP layer. The last token of a document has no next one: it is padding."""
    tokens, targets, segment_ids = batch["tokens"], batch["targets"], batch["segment_ids"]
    next_tokens = jnp.concatenate([tokens[:, 1:], jnp.maximum(targets[:, -1:], 0)], axis=1)
    continues = segment_ids[:, 1:] == segment_ids[:, :-1]
    continues = jnp.concatenate([continues, targets[:, -1:] >= 0], axis=1)
    return next_tokens, jnp.where(continues, segment_ids, 0)


def after_next(targets: Int[Array, "B T"], segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """MTP's targets: the token after the next, -1 where the document has none."""
    same = segment_ids[:, 1:] == segment_ids[:, :-1]
    later = jnp.where(same, targets[:, 1:], -1)
    return jnp.pad(later, ((0, 0), (0, 1)), constant_values=-1)
