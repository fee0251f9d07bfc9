"""The folder of a run as its report reads it: config.json, metrics.jsonl and eval.jsonl of ``train.trainer``."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from train.metrics import EVAL_FILE, METRICS_FILE, read_lines
from train.run_folder import read_description

Line = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """The contents of a run's folder. ``metrics`` has at least one line; ``evaluations`` may have none."""

    name: str
    config: Line
    metrics: list[Line]
    evaluations: list[Line]

    @property
    def stages(self) -> list[tuple[str, int, int]]:
        """(name, steps before it, its last step) of each stage that has begun."""
        found, before, last = [], 0, self.metrics[-1]["step"]
        for stage in self.config["stages"]:
            if before < last:
                found.append((stage["name"], before, min(before + stage["steps"], last)))
            before += stage["steps"]
        return found

    def layer_name(self, layer: int) -> str:
        return "MTP layer" if layer == self.config["model"]["n_layers"] else f"layer {layer}"

    def indexer_layer(self, index: int) -> int:
        """Number of the layer at entry ``index`` of a list over the layers that have an indexer, the MTP layer last."""
        if (types := self.config["model"].get("indexer_types")) is None:
            return index
        return [layer for layer, kind in enumerate([*types, "full"]) if kind == "full"][index]

    def moe_layer_name(self, index: int) -> str:
        """Name of entry ``index`` in a list over the MoE layers."""
        return self.layer_name(index + self.config["model"]["n_dense_layers"])


def read_run(folder: str | os.PathLike[str]) -> Record:
    """The record of the run in ``folder``.

    Raises:
      ValueError: a file is missing, has no step yet or is not JSON; the message names it.
    """
    folder = Path(folder)
    for name in ("config.json", METRICS_FILE):
        if not (folder / name).is_file():
            raise ValueError(
                f"a run's folder must have config.json and {METRICS_FILE}: {folder} has no {name}"
            )
    metrics = read_lines(folder / METRICS_FILE)
    if not metrics:
        raise ValueError(f"{folder / METRICS_FILE} must have at least one step, has none yet")
    config = read_description(folder)
    evaluations = read_lines(folder / EVAL_FILE) if (folder / EVAL_FILE).is_file() else []
    return Record(name=folder.resolve().name, config=config, metrics=metrics, evaluations=evaluations)


def moment(line: Line) -> str:
    """When in the run an evaluation took place."""
    return "before training" if line["after"] == "before" else f"after {line['after']}"
