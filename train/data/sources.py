"""From a run's description of its data to rows and batches."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

from train.config import Run, Source, Stage
from train.data.rows import BatchIterator, Mixture, PackedRows, batches
from train.data.synthetic import AssociativeRecall, MultiQueryRecall, Needles

Split = Literal["train", "validation"]
VALIDATION_SEED = 1_000_003  # tasks have no files to split, so held-out rows come from another seed
TASKS = {"associative_recall": AssociativeRecall, "multi_query_recall": MultiQueryRecall, "needles": Needles}
Rows = PackedRows | AssociativeRecall | MultiQueryRecall | Needles


def rows_of(source: Source, seq_len: int, split: Split) -> Rows:
    """The rows of one source.

    Raises:
      ValueError: a text source without a folder, unknown or missing options of a task, or sizes that do not fit.
    """
    if source.kind == "text":
        if source.folder is None:
            raise ValueError(
                "a source of kind 'text' needs the folder that `python -m train.data.prepare` wrote"
            )
        return PackedRows(source.folder, split, seq_len)
    options: dict[str, Any] = dict(source.options)
    options["seed"] = options.get("seed", 0) + (VALIDATION_SEED if split == "validation" else 0)
    if source.kind == "needles":
        options["haystack"] = PackedRows(source.folder, split, seq_len) if source.folder else None
    task: Callable[..., Rows] = TASKS[source.kind]
    try:
        inspect.signature(task).bind(seq_len=seq_len, **options)
    except TypeError as error:
        raise ValueError(f"options of a source of kind {source.kind!r}: {error}") from error
    return task(seq_len=seq_len, **options)


def mixture(run: Run, split: Split) -> Mixture:
    """All sources of the run with their weights.

    Raises:
      ValueError: as ``rows_of``, or a source has token ids outside the model's vocabulary.
    """
    sources = [rows_of(source, run.seq_len, split) for source in run.data]
    for source, rows in zip(run.data, sources, strict=True):
        if (n := n_ids(rows)) > run.model.vocab_size:
            raise ValueError(
                f"the model's vocab_size must hold the ids of its data, got {run.model.vocab_size} < {n} "
                f"of a source of kind {source.kind!r}"
            )
    return Mixture(sources, [source.weight for source in run.data])


def n_ids(rows: Rows) -> int:
    """The largest token id of the rows, plus 1."""
    if not isinstance(rows, Needles):
        return rows.vocab_size
    text = rows.haystack.vocab_size if isinstance(rows.haystack, PackedRows) else 0
    ranges = (rows.keys, rows.values, rows.facts)
    return max(text, rows.marker + 1, rows.query_marker + 1, *(ids.stop for ids in ranges))


def training_batches(
    run: Run, stage: Stage, start: dict[str, Any] | None = None, rows: Sequence[int] | None = None
) -> BatchIterator:
    """The endless batches of one stage, or these rows of each. start: the position to resume from."""
    seed = run.seed + stage.data_seed
    return batches(mixture(run, "train"), run.batch, seed, rows=rows, start=start)


def validation_batches(run: Run, rows: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """``run.eval_batches`` held-out batches, or these rows of each; the same on every call."""
    iterator = batches(mixture(run, "validation"), run.batch, 0, rows=rows)
    return [next(iterator) for _ in range(run.eval_batches)]
