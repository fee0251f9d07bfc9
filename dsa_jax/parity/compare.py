"""Says how far two runs of the same model are apart, layer by layer.

A run is a dict of NumPy arrays. `run_ours` makes one with this package, `dsa_jax.parity.reference` with
transformers, and `numpy.load` reads one from a file of numbers. L layers, i = 0 .. L-1; MoE layers only for
the two gate keys:

    input_ids              [B T]     token ids
    logits                 [B T V]   float32
    layer{i}.index_scores  [B T S]   float32, -inf where query t may not see key s
    layer{i}.topk          [B T K]   key indices, a set per row; -1 and keys not visible count as absent
    layer{i}.gate_i        [B*T A]   chosen experts, a set per row
    layer{i}.gate_w        [B*T A]   their weights
    layer{i}.attn, .mlp    [B T D]   what attention and the feed-forward part add to the residual stream
    layer{i}.out           [B T D]   the residual stream after the layer

Everything but `logits` may be missing from the reference: its cell is then empty and cannot fail.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from dsa_jax.config import ModelConfig
from dsa_jax.transformer import Transformer

Arrays = Mapping[str, np.ndarray]
NO_SCORE = (
    -1e30
)  # an index score below this is a mask, whether written as -inf or as the lowest finite number


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tolerance:
    """What still counts as equal. The defaults are for float32 on both sides, without FP8."""

    logits: float = 5e-5  # largest absolute difference of a logit
    index_scores: float = 5e-5  # largest absolute difference of an index score, over the visible keys
    topk_equal: float = 1.0  # smallest fraction of queries whose set of keys is the same
    experts_equal: float = 1.0  # smallest fraction of tokens whose set of experts is the same


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One layer. None: the reference does not hold this number. Differences are the largest absolute ones."""

    layer: int
    index_scores: float | None = None
    topk_overlap: float | None = None  # mean over queries of |ours & reference| / |reference|
    topk_equal: float | None = None  # fraction of queries with the same set
    topk_gap: float | None = None  # see `topk_row`
    experts_equal: float | None = None  # fraction of tokens with the same set
    expert_weights: float | None = None  # over the tokens with the same set
    attn: float | None = None
    mlp: float | None = None
    out: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """The comparison of two runs."""

    layers: tuple[LayerReport, ...]
    logits: float  # largest absolute difference
    kl: float  # mean over tokens of KL(reference || ours), in nats
    top1: float  # fraction of tokens with the same most likely next token
    tolerance: Tolerance

    @property
    def failures(self) -> tuple[str, ...]:
        """One sentence for each number beyond the tolerance. NaN is beyond every tolerance."""
        limit, found = self.tolerance, []
        for row in self.layers:
            if row.index_scores is not None and not row.index_scores <= limit.index_scores:
                found.append(
                    f"layer {row.layer}: index scores differ by {row.index_scores:.2e}, "
                    f"more than {limit.index_scores:.2e}"
                )
            if row.topk_equal is not None and not row.topk_equal >= limit.topk_equal:
                found.append(
                    f"layer {row.layer}: {row.topk_equal:.4%} of the top-k sets agree, "
                    f"fewer than {limit.topk_equal:.4%}{explain_gap(row.topk_gap)}"
                )
            if row.experts_equal is not None and not row.experts_equal >= limit.experts_equal:
                found.append(
                    f"layer {row.layer}: {row.experts_equal:.4%} of the expert sets agree, "
                    f"fewer than {limit.experts_equal:.4%}"
                )
        if not self.logits <= limit.logits:
            found.append(f"logits differ by {self.logits:.2e}, more than {limit.logits:.2e}")
        return tuple(found)

    @property
    def passed(self) -> bool:
        return not self.failures

    def table(self) -> Table:
        """One row per layer, and the model's output in the caption."""
        columns = ["index scores", "top-k overlap", "top-k equal", "experts equal", "expert weights"]
        table = Table(
            "layer",
            *columns,
            "attention",
            "mlp",
            "output",
            title="largest absolute difference, or fraction that agrees",
            caption=(
                f"logits {self.logits:.2e}   KL(reference || ours) {self.kl:.2e} nats   "
                f"same most likely token {self.top1:.2%}"
            ),
        )
        for row in self.layers:
            differences = [row.expert_weights, row.attn, row.mlp, row.out]
            fractions = [row.topk_overlap, row.topk_equal, row.experts_equal]
            table.add_row(
                str(row.layer),
                cell(row.index_scores, ".2e"),
                *(cell(number, ".4%") for number in fractions),
                *(cell(number, ".2e") for number in differences),
            )
        return table

    def to_json(self) -> str:
        """All numbers, with the verdict. A number that is not finite is written as a string, as in "inf"."""
        content = dataclasses.asdict(self) | {"passed": self.passed, "failures": self.failures}
        return json.dumps(finite_or_text(content), indent=2, allow_nan=False)


def cell(number: float | None, form: str) -> str:
    return "" if number is None else format(number, form)


def finite_or_text(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: finite_or_text(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite_or_text(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return str(content)
    return content


def explain_gap(gap: float | None) -> str:
    if gap is None:
        return ""
    return (
        f"; where they differ, the last key in and the first key out are at most {gap:.1e} apart in the "
        "reference's index scores (rounding swaps them only if this is as small as the score differences)"
    )


def max_difference(ours: np.ndarray, reference: np.ndarray) -> float:
    """Largest absolute difference; NaN in either array gives NaN."""
    return float(np.max(np.abs(ours.astype(np.float32) - reference.astype(np.float32)), initial=0.0))


def membership(indices: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """topk [B T K] -> [B T S] bool, true where a visible key was selected; -1 selects nothing."""
    n_keys = visible.shape[-1]
    if indices.size and not (-1 <= indices.min() and indices.max() < n_keys):
        raise ValueError(
            f"top-k indices lie in [{indices.min()}, {indices.max()}] but there are {n_keys} keys: "
            "use 0 .. keys-1, or -1 for no key"
        )
    selected = np.zeros((*visible.shape[:-1], n_keys + 1), dtype=bool)  # the last column catches -1
    np.put_along_axis(selected, indices.astype(np.int64), True, axis=-1)
    return selected[..., :-1] & visible


def topk_row(ours: np.ndarray, reference: np.ndarray, scores: np.ndarray | None) -> dict[str, float | None]:
    """Compares selected sets.

    ours, reference: [B T K] key indices. scores: [B T S] index scores of the reference, or None: then query
    t sees the keys 0 .. t. `topk_gap` is the largest distance, over the rows whose sets differ, between the
    lowest selected and the highest rejected score of the reference: it tells a swap of two equal scores
    from a wrong selection.
    """
    if scores is None:
        n_tokens = ours.shape[1]
        visible = np.broadcast_to(
            np.tril(np.ones((n_tokens, n_tokens), bool)), (ours.shape[0], n_tokens, n_tokens)
        )
    else:
        visible = scores > NO_SCORE
    mine, theirs = membership(ours, visible), membership(reference, visible)
    size = theirs.sum(-1)
    overlap = np.where(
        size > 0, (mine & theirs).sum(-1) / np.maximum(size, 1), (mine.sum(-1) == 0).astype(float)
    )
    equal = (mine == theirs).all(-1)
    gap = None
    if scores is not None and not equal.all():
        row_scores, row_selected, row_visible = scores[~equal], theirs[~equal], visible[~equal]
        last_in = np.min(row_scores, axis=-1, where=row_selected, initial=np.inf)
        first_out = np.max(row_scores, axis=-1, where=row_visible & ~row_selected, initial=-np.inf)
        gap = float(np.max(last_in - first_out))
    return {"topk_overlap": float(overlap.mean()), "topk_equal": float(equal.mean()), "topk_gap": gap}


def expert_row(
    our_ids: np.ndarray, our_weights: np.ndarray, ids: np.ndarray, weights: np.ndarray
) -> dict[str, float | None]:
    """Compares chosen experts as sets, [tokens A] each, and the weights where the sets agree."""
    width = ids.shape[-1]
    our_order, order = (np.argsort(x.reshape(-1, width), axis=-1) for x in (our_ids, ids))
    equal = (
        np.take_along_axis(our_ids.reshape(-1, width), our_order, -1)
        == np.take_along_axis(ids.reshape(-1, width), order, -1)
    ).all(-1)
    our_sorted = np.take_along_axis(our_weights.reshape(-1, width), our_order, -1)
    sorted_weights = np.take_along_axis(weights.reshape(-1, width), order, -1)
    return {
        "experts_equal": float(equal.mean()),
        "expert_weights": max_difference(our_sorted[equal], sorted_weights[equal]),
    }


def score_difference(ours: np.ndarray, reference: np.ndarray) -> float:
    """Largest difference over the keys that are visible in the reference; inf if ours masks other keys."""
    visible = reference > NO_SCORE
    if not np.array_equal(ours > NO_SCORE, visible):
        return math.inf
    return max_difference(ours[visible], reference[visible])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def mean_kl(ours: np.ndarray, reference: np.ndarray) -> float:
    """Mean KL(reference || ours) over the tokens of [B T V] logits, one sequence at a time."""
    total = 0.0
    for row, reference_row in zip(ours, reference, strict=True):
        log_p = log_softmax(reference_row)
        total += float((np.exp(log_p) * (log_p - log_softmax(row))).sum())
    return total / (ours.shape[0] * ours.shape[1])


def compare(ours: Arrays, reference: Arrays, tolerance: Tolerance | None = None) -> Report:
    """Compares two runs on the same tokens.

    Errors: ValueError if the runs are of different tokens, if `ours` lacks a number that the reference has,
    or if the shapes of one number differ.
    """
    n_layers = 1 + max(
        (int(key[5:].split(".")[0]) for key in reference if key.startswith("layer")), default=-1
    )
    kinds = ("index_scores", "topk", "gate_i", "gate_w", "attn", "mlp", "out")
    names = ["logits", *(f"layer{i}.{kind}" for i in range(n_layers) for kind in kinds)]
    if "logits" not in reference:
        raise ValueError(
            f"the reference holds no 'logits', only {sorted(reference)}: it cannot be compared with"
        )
    for name in ["input_ids", *names]:
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

    rows = []
    for i in range(n_layers):
        mine = {kind: ours[f"layer{i}.{kind}"] for kind in kinds if f"layer{i}.{kind}" in reference}
        theirs = {kind: reference[f"layer{i}.{kind}"] for kind in mine}
        row: dict[str, float | None] = {}
        if "index_scores" in theirs:
            row["index_scores"] = score_difference(mine["index_scores"], theirs["index_scores"])
        if "topk" in theirs:
            row |= topk_row(mine["topk"], theirs["topk"], theirs.get("index_scores"))
        if "gate_i" in theirs and "gate_w" in theirs:
            row |= expert_row(mine["gate_i"], mine["gate_w"], theirs["gate_i"], theirs["gate_w"])
        row |= {
            kind: max_difference(mine[kind], theirs[kind])
            for kind in ("attn", "mlp", "out")
            if kind in theirs
        }
        rows.append(LayerReport(layer=i, **row))

    logits, reference_logits = ours["logits"], reference["logits"]
    return Report(
        layers=tuple(rows),
        logits=max_difference(logits, reference_logits),
        kl=mean_kl(logits, reference_logits),
        top1=float((logits.argmax(-1) == reference_logits.argmax(-1)).mean()),
        tolerance=tolerance or Tolerance(),
    )


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
    renamed = {
        "index_scores": "index_scores",
        "topk_indices": "topk",
        "attn": "attn",
        "ffn": "mlp",
        "out": "out",
    }
    for i in range(config.n_layers):
        arrays |= {f"layer{i}.{key}": aux[name][i] for name, key in renamed.items()}
    for i in range(config.n_moe_layers):
        layer, width = i + config.n_dense_layers, config.n_activated_experts
        arrays[f"layer{layer}.gate_i"] = aux["experts"][i].reshape(-1, width)
        arrays[f"layer{layer}.gate_w"] = aux["expert_weights"][i].reshape(-1, width)
    return arrays
