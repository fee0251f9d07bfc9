"""The description of a run: model, data and stages, as frozen dataclasses."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from dsa_jax.config import Fp8Config, ModelConfig, YarnConfig
from train.limits import check_numbers


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Consecutive steps with one attention, one set of trained parameters and one loss.

    attention: "dense"; "sparse" (the indexer's top-k); "window" (the most recent index_topk keys, a control).
    trains: "model" (everything but the indexers), "indexer" (only the indexers, from the index loss L_I), or "both".
    With "both" one step has two disjoint gradients: of CE, MTP and balance for the model, of L_I for the indexers.
    lr, index_lr: peak learning rates of the two groups, each of which has its own clip by global norm. The rates rise
    linearly over lr_warmup steps and, if lr_end is given, fall along a cosine to lr_end times the peak.
    mtp_weight, balance_weight: lambda and alpha of the DeepSeek-V3 report (sections 2.2, 2.1.2).
    first_moment: dtype of Adam's first moment. bfloat16 saves a sixth of the state. The second moment is always
    float32: with beta 0.95 most of its steps would be rounded away.
    bias_step: gamma, the step of the router's bias after each update, outside the optimizer.
    data_seed: stages with equal seeds see the same batches in the same order.
    """

    name: str
    attention: Literal["dense", "sparse", "window"]
    trains: Literal["model", "indexer", "both"]
    steps: int
    lr: float = 0.0
    index_lr: float = 0.0
    lr_warmup: int = 0
    lr_end: float | None = None
    clip: float = 1.0
    weight_decay: float = 0.1
    first_moment: Literal["float32", "bfloat16"] = "float32"
    mtp_weight: float = 0.3
    balance_weight: float = 1e-4
    bias_step: float = 1e-3
    data_seed: int = 0

    def __post_init__(self) -> None:
        for group, rate in (("model", self.lr), ("indexer", self.index_lr)):
            if self.trains in (group, "both") and not rate > 0:
                name = "lr" if group == "model" else "index_lr"
                raise ValueError(
                    f"stage {self.name!r} trains {self.trains!r}, so {name} must be positive, got {rate}"
                )
        if self.steps < 1 or self.lr_warmup < 0 or self.lr_warmup > self.steps:
            raise ValueError(
                f"stage {self.name!r} needs steps >= 1 and 0 <= lr_warmup <= steps, got {self.steps}, {self.lr_warmup}"
            )
        if self.trains != "model" and self.attention == "window":
            raise ValueError(
                f"attention='window' uses no indexer, so trains must be 'model', got {self.trains!r}"
            )
        check_numbers(self, f"stage {self.name!r}: ")


def dense(steps: int, lr: float, **changes: Any) -> Stage:
    """Pre-training: dense attention, CE + MTP + balance. The indexers keep their initial values."""
    return Stage(name="dense", attention="dense", trains="model", steps=steps, lr=lr, **changes)


def indexer_warmup(steps: int, index_lr: float = 1e-3, **changes: Any) -> Stage:
    """Trains only the indexers, towards dense attention (eq. 3 of the DeepSeek-V3.2-Exp report)."""
    return Stage(
        name="indexer_warmup", attention="dense", trains="indexer", steps=steps, index_lr=index_lr, **changes
    )


def sparse(steps: int, lr: float, index_lr: float, **changes: Any) -> Stage:
    """Trains everything through sparse attention, the indexers on the selected keys (eq. 4)."""
    return Stage(
        name="sparse", attention="sparse", trains="both", steps=steps, lr=lr, index_lr=index_lr, **changes
    )


@dataclass(frozen=True, kw_only=True)
class Source:
    """Rows of one kind and their share of each batch.

    kind: "text" is packed documents of ``folder``, written by `python -m train.data.prepare`. The others are tasks
    of train.data.synthetic with known answers; ``options`` are their arguments. "needles" hide in rows of ``folder``.
    data_sha256: identity of the data in ``folder``, which a run fills in when it starts and compares when it resumes.
    """

    kind: Literal["text", "associative_recall", "multi_query_recall", "needles"]
    folder: str | None = None
    weight: float = 1.0
    options: tuple[tuple[str, int | float | bool], ...] = ()
    data_sha256: str | None = None

    def __post_init__(self) -> None:
        check_numbers(self)


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters that train instead of the weights (arXiv 2106.09685).

    W + alpha / rank * A B for the attention projections and, with ``experts``, for all feed-forward matrices. The
    router's bias has no adapter and still moves, unless the stage has bias_step=0.
    """

    rank: int = 16
    alpha: float = 32.0
    experts: bool = True

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 < self.alpha < math.inf:
            raise ValueError(f"rank must be at least 1 and alpha positive, got {self.rank} and {self.alpha}")
        check_numbers(self)


@dataclass(frozen=True, kw_only=True)
class MeshSpec:
    """Size of each mesh axis of ``dsa_jax.sharding``; data defaults to the devices that the others leave."""

    data: int | None = None
    expert: int = 1
    context: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        check_numbers(self)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training run: stages in order, each starting from the parameters of the one before.

    batch, seq_len: rows per step, on all devices together, and tokens per row. accumulate: in how many parts, one
    after the other, a step takes its rows; more parts need less memory and give the same step up to rounding. mesh:
    None is one device or, with several processes, data parallelism over all devices. init_from: folder of a checkpoint
    (Hugging Face or Orbax) to start from; ``model`` must have its sizes. any_tokenizer: text may have been made with
    another tokenizer than that checkpoint's. checkpoint_every, log_every: in steps. keep: how many checkpoints are
    kept. eval_batches: validation batches per evaluation, before the first stage and after each.
    """

    model: ModelConfig
    stages: tuple[Stage, ...]
    data: tuple[Source, ...]
    batch: int
    seq_len: int
    accumulate: int = 1
    seed: int = 0
    init_from: str | None = None
    any_tokenizer: bool = False
    lora: Lora | None = None
    mesh: MeshSpec | None = None
    checkpoint_every: int = 500
    keep: int = 2
    log_every: int = 10
    eval_batches: int = 4

    def __post_init__(self) -> None:
        check_numbers(self)
        if not self.stages or not self.data:
            raise ValueError(f"a run needs stages and data, got {len(self.stages)} and {len(self.data)}")
        if self.batch % self.accumulate:
            raise ValueError(
                f"batch must be a multiple of accumulate, got {self.batch} rows in {self.accumulate} parts"
            )

    def check_rows(self) -> None:
        """Raises ValueError for rows that are too long for the model, or too short to select keys from.

        Not part of the construction: ``train.initial.from_checkpoint`` may still replace the model.
        """
        if self.seq_len > self.model.max_seq_len:
            raise ValueError(
                f"seq_len must not exceed the model's max_seq_len, got {self.seq_len} > {self.model.max_seq_len}"
            )
        sparse_stages = [stage.name for stage in self.stages if stage.attention != "dense"]
        if sparse_stages and self.model.index_topk >= self.seq_len:
            raise ValueError(
                f"stages {sparse_stages} select nothing unless index_topk < seq_len, got "
                f"{self.model.index_topk} >= {self.seq_len}"
            )

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> tuple[int, int]:
        """(index of the stage, steps done in it) after ``step`` steps. A boundary belongs to the stage that ends there.

        Raises:
          ValueError: the run has fewer steps.
        """
        for index, stage in enumerate(self.stages):
            if step <= stage.steps:
                return index, step
            step -= stage.steps
        raise ValueError(f"the run has {self.steps} steps, got step {self.steps + step}")


# What may change when a run is resumed.
MAY_CHANGE = frozenset(
    {"mesh", "accumulate", "any_tokenizer", "checkpoint_every", "keep", "log_every", "eval_batches"}
)


def to_json(run: Run) -> dict[str, Any]:
    """The run as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(run)))


def from_json(values: dict[str, Any]) -> Run:
    """The run that ``to_json`` described."""
    model = dict(values["model"])
    model["yarn"] = model["yarn"] and YarnConfig(**model["yarn"])
    model["fp8"] = model["fp8"] and Fp8Config(**{**model["fp8"], "block": tuple(model["fp8"]["block"])})
    model["eos_token_ids"] = tuple(model["eos_token_ids"])
    model["indexer_types"] = model.get("indexer_types") and tuple(model["indexer_types"])
    sources = [
        Source(**{**source, "options": tuple((name, value) for name, value in source["options"])})
        for source in values["data"]
    ]
    return Run(
        **{
            **values,
            "model": ModelConfig(**model),
            "stages": tuple(Stage(**stage) for stage in values["stages"]),
            "data": tuple(sources),
            "lora": values["lora"] and Lora(**values["lora"]),
            "mesh": values.get("mesh") and MeshSpec(**values["mesh"]),
        }
    )


def contradictions(stored: dict[str, Any], run: Run) -> list[str]:
    """What differs between the run that wrote a checkpoint and this one, as "name: then X, now Y".

    Stages added after the stored ones are no contradiction, and neither are fields that the stored run was written
    without and that have their default values now.
    """
    stored, now = to_json(from_json(stored)), to_json(run)
    now["stages"] = now["stages"][: len(stored["stages"])]
    found = differences(stored, now)
    return [f"{name}: then {x!r}, now {y!r}" for name, x, y in found if name.split(".")[0] not in MAY_CHANGE]


def differences(x: Any, y: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """("stages[0].lr", value in x, value in y) for each field in which two runs in JSON differ."""
    if isinstance(x, dict) and isinstance(y, dict):
        for key in dict.fromkeys([*x, *y]):
            yield from differences(x.get(key), y.get(key), f"{name}.{key}" if name else key)
    elif isinstance(x, list) and isinstance(y, list) and all(isinstance(part, dict) for part in x + y):
        for index, parts in enumerate(itertools.zip_longest(x, y)):
            yield from differences(*parts, f"{name}[{index}]")
    elif x != y:
        yield name, x, y
