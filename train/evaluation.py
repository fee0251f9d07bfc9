"""What a run evaluates before its first stage and after each stage, and the table at its end."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import traverse_util
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dsa_jax.config import ModelConfig
from train.config import Run
from train.data.sources import rows_of, validation_batches
from train.data.synthetic import Needles
from train.measure.evaluate import indexer_quality, needle_accuracy, score
from train.optimizer import group_of
from train.placement import RunSharding
from train.private_jax import process_allgather

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the needles that an evaluation asks for: start to end of the row


class Evaluation:
    """Held-out batches of a run, and its first source of needles if it has one."""

    def __init__(self, run: Run, sharding: RunSharding) -> None:
        self.run = run
        held_out = validation_batches(run, sharding.rows) if run.eval_batches else []
        self.batches = [sharding.global_batch(batch) for batch in held_out]
        sources = [rows_of(source, run.seq_len, "validation") for source in run.data]
        self.needles = next((source for source in sources if isinstance(source, Needles)), None)

    def line(self, params: Any, after: str) -> dict[str, Any]:
        """What eval.jsonl says after the stage ``after``, or "before" the first. params: of ``train.lora.adapted``.

        Cross entropy and accuracy with dense and with sparse attention, quality of the indexers, needles by depth.
        """
        run, model = self.run, self.run.model
        line: dict[str, Any] = {}
        for attention in ("dense", "sparse"):
            result = score(params, model, self.batches, attention)
            line |= {f"ce_{attention}": result.cross_entropy, f"accuracy_{attention}": result.accuracy}
        line["indexer"] = indexer_quality(params, self._model_after(after), self.batches[0])
        if self.needles:
            lengths = [run.seq_len // 4, run.seq_len]
            line["needles"] = needle_accuracy(params, model, self.needles, lengths, DEPTHS, rows=32)
        return line

    def _model_after(self, stage: str) -> ModelConfig:
        """The model whose layer inputs the indexers are judged on: sparse after a sparse stage, else dense."""
        sparse = any(s.name == stage and s.attention == "sparse" for s in self.run.stages)
        return dataclasses.replace(self.run.model, attention="sparse" if sparse else "dense")


def fingerprint(params: Any) -> str:
    """SHA-256 of all parameters except the indexers'. On one mesh a warm-up leaves it as it was.

    Each process hashes the parts that it holds; the result is the hash of these hashes in the order of the processes.
    """
    digest = hashlib.sha256()
    for path, leaf in sorted(traverse_util.flatten_dict(params, sep=".").items()):
        if group_of(path) == "indexer":
            continue
        parts = [(str(part.index), part) for part in leaf.addressable_shards if part.replica_id == 0]
        for index, part in sorted(parts, key=lambda entry: entry[0]):
            digest.update(f"{path} {index}".encode())
            digest.update(np.asarray(part.data).tobytes())
    found = process_allgather(np.frombuffer(digest.digest(), np.uint8))
    return hashlib.sha256(found.tobytes()).hexdigest()


def summarise(evaluations: Sequence[dict[str, Any]], console: Console) -> None:
    """Prints what each stage changed: the same validation batches through dense and through sparse attention."""
    if not evaluations:
        return
    table = Table(
        "after", "step", "CE\ndense", "\nsparse", "accuracy\ndense", "\nsparse", "\nKL", "mass\nrecall",
        "worst\nlayer", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0),
        caption="mass recall: attention mass on the indexer's keys, relative to the best choice of as many keys",
    )  # fmt: skip
    for line in evaluations:
        layers = line["indexer"]
        kl = np.mean([layer["kl"] for layer in layers]) if layers else float("nan")
        shares = [layer["recall"] / layer["recall_oracle"] for layer in layers]
        table.add_row(
            line["after"], str(line["step"]), f"{line['ce_dense']:.4f}", f"{line['ce_sparse']:.4f}",
            f"{line['accuracy_dense']:.3f}", f"{line['accuracy_sparse']:.3f}", f"{kl:.4f}",
            *((f"{np.mean(shares):.3f}", f"{np.min(shares):.3f}") if shares else ("", "")),
        )  # fmt: skip
    console.print(table)
