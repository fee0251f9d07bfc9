"""Floating-point operations of this implementation's forward pass and training step, per token.

Counted are matrix products, 2 operations per multiply-add, over the (query, key) pairs that the mathematics needs.
Query t sees t + 1 keys, so a row of T tokens has (T + 1) / 2 pairs per token on average; a selection has min(K, t + 1).
Not counted: norms, softmax, rotations, the top-k, relu and head sum of the index scores, the embedding, keys that a
blocked kernel multiplies and then masks, and recomputation in the backward pass. With the letters of
``dsa_jax.config``, per token and layer:

    projections   2 (D Q + Q N (P+R) + D (C+R) + C N (P+H) + N H D)    expanding the latent and absorbing cost the same
    indexer       2 (Q I J + D J + D I) + 2 I J (T+1)/2                only for sparse attention with T > K, and not in
                                                                       layers that share another's selection
    attention     2 N (P+R+H) (T+1)/2                                  expanded heads (MHA), for any selection
                  2 N (2C+R) mean(min(K, t+1))                         absorbed heads (MQA) over the selected latents
                  (dense MQA: (T+1)/2 keys; a window: min(K, t+1) keys in both forms)
    feed_forward  6 D F, or 6 D F_expert (A + shared) + 2 D E          dense, or experts and router
    index_kl      per pair: target 2 N (P+R) if dense, 2 N (C+R) if selected, and index dot products 2 I J

and once per token: head 2 D V; mtp 4 D D, one MoE layer and its head. The model chooses the form of attention
(``attention_form.prefers_mha``), so sparse attention over short rows costs as much as dense attention plus the indexer.
"""

from typing import Literal

from dsa_jax.attention_form import for_training, prefers_mha
from dsa_jax.config import ModelConfig

Flops = dict[str, float]  # part -> operations per token; the sum of the values is the total


def forward_flops(config: ModelConfig, length: int, *, mtp: bool = False) -> Flops:
    """Operations per token of a forward pass with logits, for rows of one document of ``length`` tokens, without cache.

    Raises:
      ValueError: mtp=True for a model without that layer, or length is not within 1 .. max_seq_len.
    """
    if not 1 <= length <= config.max_seq_len:
        raise ValueError(f"length must be within 1 .. max_seq_len={config.max_seq_len}, got {length}")
    if mtp and not config.n_mtp_layers:
        raise ValueError("mtp=True needs a model with n_mtp_layers=1, got n_mtp_layers=0")
    head = 2.0 * config.d_model * config.vocab_size
    attention, (dense, moe) = _attention_layer(config, length), _feed_forward(config)
    parts = {name: config.n_layers * value for name, value in attention.items()}
    parts["indexer"] = len(config.full_layers) * attention["indexer"]
    parts["feed_forward"] = config.n_dense_layers * dense + config.n_moe_layers * moe
    parts["head"] = head
    if mtp:
        parts["mtp"] = 4.0 * config.d_model**2 + sum(attention.values()) + moe + head
    return parts


def training_flops(
    config: ModelConfig, length: int, trains: Literal["model", "indexer", "both"] = "both"
) -> Flops:
    """Operations per token of one training step; ``config.attention`` says which attention.

    trains "model": the forward pass and twice as much backward, including the MTP layer; selection has no backward.
    "both": also the index loss, whose gradient costs 4 I J per pair, and the backward pass of the indexer's
    projections, which costs as much as their forward pass because their inputs are detached. "indexer": the model's
    forward pass without heads, and the same for the indexer; MTP counts as a whole layer.
    """
    has_mtp, learns = bool(config.n_mtp_layers), trains != "model"
    if trains != "indexer":
        config = for_training(config, length)
    parts = forward_flops(config, length, mtp=has_mtp)
    layer, head = _attention_layer(config, length), parts["head"]
    index = _index_learning(config, length) if learns else dict.fromkeys(("indexer", "index_kl"), 0.0)
    per_layer = index["indexer"] + index["index_kl"]
    if trains == "indexer":
        parts["head"] = 0.0
        if has_mtp:
            parts["mtp"] += per_layer - head
    else:
        trained = {name: 3.0 * value for name, value in parts.items() if name != "indexer"}
        if has_mtp:
            trained["mtp"] += per_layer - 2.0 * layer["indexer"]
        parts |= trained
    parts["indexer"] += len(config.full_layers) * index["indexer"]
    parts["index_kl"] = len(config.full_layers) * index["index_kl"]
    return parts


def _visible(length: int) -> float:
    """Visible keys per query, mean over a row."""
    return (length + 1) / 2


def _selected(config: ModelConfig, length: int) -> float:
    """min(index_topk, visible keys) per query, mean over a row."""
    full = max(length - config.index_topk, 0)
    short = length - full
    return (short * (short + 1) / 2 + full * config.index_topk) / length


def _index_projections(config: ModelConfig) -> float:
    heads, dim = config.index_n_heads, config.index_head_dim
    return 2.0 * (config.q_lora_rank * heads * dim + config.d_model * (dim + heads))


def _attention_layer(config: ModelConfig, length: int) -> Flops:
    """projections, indexer and attention of one layer, forward."""
    N, P, R, H = config.n_heads, config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    D, Q, C = config.d_model, config.q_lora_rank, config.kv_lora_rank
    projections = 2.0 * (D * Q + Q * N * (P + R) + D * (C + R) + C * N * (P + H) + N * H * D)
    indexer = 0.0
    if config.attention == "sparse" and length > config.index_topk:
        dots = 2.0 * config.index_n_heads * config.index_head_dim
        indexer = _index_projections(config) + dots * _visible(length)
    mha = prefers_mha(config, length, length)
    reads_all = config.attention == "dense" or (config.attention == "sparse" and mha)  # and masks
    keys = _visible(length) if reads_all else _selected(config, length)
    attention = 2.0 * N * (P + R + H if mha else 2 * C + R) * keys
    return {"projections": projections, "indexer": indexer, "attention": attention}


def _feed_forward(config: ModelConfig) -> tuple[float, float]:
    """(dense layer, MoE layer)."""
    experts = config.n_activated_experts + config.n_shared_experts
    moe = 6.0 * config.d_model * config.d_expert * experts + 2.0 * config.d_model * config.n_routed_experts
    return 6.0 * config.d_model * config.d_ff, moe


def _index_learning(config: ModelConfig, length: int) -> Flops:
    """What the index loss adds per layer: "indexer" projections; "index_kl" target, dot products and gradients."""
    N, C, R, P = config.n_heads, config.kv_lora_rank, config.qk_rope_head_dim, config.qk_nope_head_dim
    dots = 2.0 * config.index_n_heads * config.index_head_dim
    if config.attention == "dense":
        kl = _visible(length) * (2.0 * N * (P + R) + 3 * dots)
    else:
        kl = _selected(config, length) * (2.0 * N * (C + R) + 3 * dots)
        if prefers_mha(config, length, length):
            kl += 2.0 * N * C * P  # absorbs the queries, which MQA attention would have done already
    forward_done = config.attention == "sparse" and length > config.index_topk
    return {"indexer": (1 if forward_done else 2) * _index_projections(config), "index_kl": kl}
