"""Compares two runs of the same model, layer by layer.

A run is a dict of NumPy arrays. `run_ours` makes one with this package, `dsa_jax.parity.reference` with
transformers, and `numpy.load` reads one from a file of numbers. L layers, i = 0 .. L-1; MoE layers only for
the two gate keys:

    input_ids              [B T]     token ids
    logits                 [B T V]   float32
    layer{i}.index_scores  [B T S]   float32, -inf where query t may not see key s; of layers with an indexer
    layer{i}.topk          [B T K]   key indices, a set per row; -1 and keys not visible count as absent; likewise
    layer{i}.gate_i        [B*T A]   selected experts, a set per row
    layer{i}.gate_w        [B*T A]   their weights
    layer{i}.attn, .mlp    [B T D]   what attention and the feed-forward part add to the residual stream
    layer{i}.out           [B T D]   the residual stream after the layer

All but `logits` may be missing from the reference: the cell of what is missing is empty and cannot fail.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsa_jax.config import ModelConfig
from dsa_jax.parity.numbers import expert_row, max_difference, mean_kl, score_difference, topk_row
from dsa_jax.parity.report import LayerReport, Report, Tolerance
from dsa_jax.transformer import Transformer

Arrays = Mapping[str, np.ndarray]
KINDS = ("index_scores", "topk", "gate_i", "gate_w", "attn", "mlp", "out")
"""What a run holds of a layer, under `layer{i}.{kind}`."""


def compare(ours: Arrays, reference: Arrays, tolerance: Tolerance | None = None) -> Report:
    """Compares two runs on the same tokens.

    Raises ValueError if the runs are of different tokens, if `ours` lacks a number that the reference has, or if
    the shapes of one number differ.
    """
    if "logits" not in reference:
        raise ValueError(f"the reference must hold 'logits', it holds {sorted(reference)}")
    numbers = [int(name[5:].split(".")[0]) for name in reference if name.startswith("layer")]
    n_layers = 1 + max(numbers, default=-1)
    _refuse_mismatch(ours, reference, n_layers)
    logits, reference_logits = ours["logits"], reference["logits"]
    return Report(
        layers=tuple(_layer_report(i, ours, reference) for i in range(n_layers)),
        logits=max_difference(logits, reference_logits),
        kl=mean_kl(logits, reference_logits),
        top1=float((logits.argmax(-1) == reference_logits.argmax(-1)).mean()),
        tolerance=tolerance or Tolerance(),
    )


def _refuse_mismatch(ours: Arrays, reference: Arrays, n_layers: int) -> None:
    names = ["input_ids", "logits", *(f"layer{i}.{kind}" for i in range(n_layers) for kind in KINDS)]
    for name in names:
        if name not in reference:
            continue
        if name not in ours:
            raise ValueError(
                f"the reference holds '{name}', our run does not: is it a run of the same model?"
            )
        if ours[name].shape != reference[name].shape and not name.endswith((".topk", ".gate_i", ".gate_w")):
            raise ValueError(
                f"'{name}' has shape {ours[name].shape} in our run but {reference[name].shape} in the "
                "reference: compare runs of one model on the same tokens"
            )
    if "input_ids" in reference and not np.array_equal(ours["input_ids"], reference["input_ids"]):
        raise ValueError("the runs are of different tokens: pass the reference's input_ids to run_ours")


def _layer_report(layer: int, ours: Arrays, reference: Arrays) -> LayerReport:
    mine = {kind: ours[f"layer{layer}.{kind}"] for kind in KINDS if f"layer{layer}.{kind}" in reference}
    theirs = {kind: reference[f"layer{layer}.{kind}"] for kind in mine}
    row: dict[str, float | None] = {
        kind: max_difference(mine[kind], theirs[kind]) for kind in ("attn", "mlp", "out") if kind in theirs
    }
    if "index_scores" in theirs:
        row["index_scores"] = score_difference(mine["index_scores"], theirs["index_scores"])
    if "topk" in theirs:
        row |= topk_row(mine["topk"], theirs["topk"], theirs.get("index_scores"))
    if "gate_i" in theirs and "gate_w" in theirs:
        row |= expert_row(mine["gate_i"], mine["gate_w"], theirs["gate_i"], theirs["gate_w"])
    return LayerReport(layer=layer, **row)


def run_ours(params: Any, config: ModelConfig, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Runs this package's model on tokens [B T] and returns the arrays that this file's docstring lists.

    Computes in float32 with exact float32 matrix products, whatever `config.dtype` says; pass float32
    `params` too, or their rounding is part of the difference. The switches of `config` (FP8,
    implementation) are kept. Keeps one array [L B T S] of index scores alive, so T is limited by memory.
    """
    model = Transformer(dataclasses.replace(config, dtype="float32"))
    captured = ("index_scores", "topk_indices", "attn", "ffn", "out", "experts", "expert_weights")

    @jax.jit
    def run(params: Any, tokens: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits, _, aux = model.apply(params, tokens, capture=captured)
        return logits, {name: aux[name] for name in captured if name in aux}

    with jax.default_matmul_precision("highest"):
        logits, aux = jax.device_get(run(params, jnp.asarray(tokens, jnp.int32)))

    arrays = {"input_ids": np.asarray(tokens, np.int64), "logits": logits}
    kinds = {
        "index_scores": "index_scores",
        "topk_indices": "topk",
        "attn": "attn",
        "ffn": "mlp",
        "out": "out",
    }
    for name, kind in kinds.items():
        layers = config.full_layers if kind in ("index_scores", "topk") else range(config.n_layers)
        arrays |= {f"layer{i}.{kind}": array for i, array in zip(layers, aux[name], strict=True)}
    for i in range(config.n_moe_layers):
        layer, width = i + config.n_dense_layers, config.n_activated_experts
        arrays[f"layer{layer}.gate_i"] = aux["experts"][i].reshape(-1, width)
        arrays[f"layer{layer}.gate_w"] = aux["expert_weights"][i].reshape(-1, width)
    return arrays
