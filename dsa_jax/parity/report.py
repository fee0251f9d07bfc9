"""The report of a comparison: tolerances, numbers per layer, the verdict, a table and JSON."""

import dataclasses
import json
import math
from typing import Any

from rich.table import Table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tolerance:
    """What counts as equal. The defaults are for float32 on both sides, without FP8."""

    logits: float = 5e-5  # largest absolute difference of a logit
    index_scores: float = 5e-5  # largest absolute difference of an index score, over the visible keys
    topk_equal: float = 1.0  # smallest fraction of queries whose set of keys is the same
    experts_equal: float = 1.0  # smallest fraction of tokens whose set of experts is the same

    def __post_init__(self) -> None:
        for name in ("logits", "index_scores"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and at least 0, got {getattr(self, name)}")
        for name in ("topk_equal", "experts_equal"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a fraction within [0, 1], got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One layer. None: the reference does not hold this number. Differences are the largest absolute ones."""

    layer: int
    index_scores: float | None = None
    topk_overlap: float | None = None  # mean over queries of |ours & reference| / |reference|
    topk_equal: float | None = None  # fraction of queries with the same set
    topk_gap: float | None = None  # score gap where the sets differ, see `numbers.topk_row`
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
            found += [
                f"layer {row.layer}: {name} differs by {number}: one of the runs holds a number that is not finite"
                for name in ("expert_weights", "attn", "mlp", "out")
                if (number := getattr(row, name)) is not None and not math.isfinite(number)
            ]
        if not math.isfinite(self.kl):
            found.append(f"the KL divergence is {self.kl}: the logits of one of the runs are not finite")
        if not self.logits <= limit.logits:
            found.append(f"logits differ by {self.logits:.2e}, more than {limit.logits:.2e}")
        return tuple(found)

    @property
    def passed(self) -> bool:
        """Whether every number is within its tolerance."""
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
    """The number in this format, empty for None."""
    return "" if number is None else format(number, form)


def finite_or_text(content: Any) -> Any:
    """Numbers that are not finite, which JSON has no words for, become strings; at any depth."""
    if isinstance(content, dict):
        return {key: finite_or_text(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite_or_text(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return str(content)
    return content


def explain_gap(gap: float | None) -> str:
    """Continues the sentence about sets that differ; see `numbers.topk_row`."""
    if gap is None:
        return ""
    return (
        f"; where they differ, the score gap between the lowest selected and the highest rejected key of the reference "
        f"is at most {gap:.1e} (a rounding tie only if this is as small as the differences of the scores)"
    )
