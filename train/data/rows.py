"""Rows of tokens for training: text cut from a prepared folder, mixtures, and the iterator of batches.

A row is a dict of three int32 arrays of length T, a batch the same with a leading B:

    tokens       [T]  input token ids
    targets      [T]  the next token; -1 = no loss here (end of a document, padding, not an answer)
    segment_ids  [T]  0 = padding; a run of equal ids = one document

Positions follow from ``segment_ids``, and the MTP layer's targets from ``targets``; neither is stored. A source of
rows is anything with ``__len__`` and ``__getitem__`` whose row i depends on i alone.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from train.data.provenance import again, check_file, read_manifest

Row = dict[str, Int32[np.ndarray, "T"]]
Batch = dict[str, Int32[np.ndarray, "B T"]]


@runtime_checkable
class RowSource(Protocol):
    """Rows by number, 0 <= index < len(source), all of the same length T."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...


@runtime_checkable
class BatchIterator(Iterator[Batch], Protocol):
    """What training needs from its data: batches, and a small JSON-able state to resume from.

    The state is the number of batches taken; after ``set_state(state)`` the next batch is the one that followed
    ``get_state()``.
    """

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


class PackedRows:
    """Rows of T tokens cut from one split of a folder that `python -m train.data.prepare` wrote.

    Row i is tokens i T ... (i + 1) T - 1 of the split and stays on disk until requested. A document that does not
    fit the rest of its row continues in the next row, as a separate segment. Only the last row may be padded.

    Raises:
      ValueError: the folder is not a prepared one, or its files contradict each other.
    """

    def __init__(
        self, folder: str | os.PathLike[str], split: Literal["train", "validation"], seq_len: int
    ) -> None:
        folder = Path(folder)
        manifest = read_manifest(folder)
        if split not in manifest["splits"]:
            raise ValueError(f"split must be one of {', '.join(manifest['splits'])}, got {split!r}")
        if seq_len < 1:
            raise ValueError(f"seq_len must be positive, got {seq_len}")
        self.seq_len = seq_len
        self.vocab_size: int = manifest["vocab_size"]
        self.pad_id: int = manifest["special_tokens"]["pad"]
        self._tokens, self._starts = _arrays(folder, split, manifest)

    def __len__(self) -> int:
        return -(-len(self._tokens) // self.seq_len)

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"row must be in 0 ... {len(self) - 1}, got {index}")
        first, length = index * self.seq_len, self.seq_len
        read = np.asarray(self._tokens[first : first + length + 1], np.int32)
        n_real = min(length, len(self._tokens) - first)
        tokens = np.full(length, self.pad_id, np.int32)
        tokens[:n_real] = read[:n_real]
        # Document of each position; the one after the row tells whether the row's last token has a target.
        document = np.searchsorted(self._starts, np.arange(first, first + len(read)), side="right")
        targets = np.full(length, -1, np.int32)
        n_next = len(read) - 1
        targets[:n_next] = np.where(document[:-1] == document[1:], read[1:], -1)
        segment_ids = np.zeros(length, np.int32)
        segment_ids[:n_real] = document[:n_real] - document[0] + 1
        return {"tokens": tokens, "targets": targets, "segment_ids": segment_ids}


def _arrays(folder: Path, split: str, manifest: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a split, on disk, and where its documents start, both as the manifest describes them."""
    stated, file = manifest["splits"][split], folder / f"{split}.npy"
    check_file(file, stated.get("sha256"), "what `train.data.prepare` wrote")
    try:
        tokens, starts = np.load(file, mmap_mode="r"), np.load(folder / f"{split}_starts.npy")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"{folder}: the arrays of {split} cannot be read ({error}); {again(folder)}"
        ) from error
    if len(tokens) != stated["tokens"] or tokens.dtype != manifest.get("dtype", tokens.dtype):
        raise ValueError(
            f"{file} must hold the manifest's {stated['tokens']} tokens of {manifest.get('dtype', 'any dtype')}, has "
            f"{len(tokens)} of {tokens.dtype}"
        )
    inside = len(starts) and starts[0] == 0 and (np.diff(starts) > 0).all() and starts[-1] < len(tokens)
    if len(starts) != stated.get("documents", len(starts)) or not inside:
        raise ValueError(
            f"{folder / split}_starts.npy must rise from 0 to below {len(tokens)} over the manifest's "
            f"{stated.get('documents')} documents, has {len(starts)}; {again(folder)}"
        )
    return tokens, starts


@dataclass(frozen=True)
class Mixture:
    """Several sources in one stream, in any stretch of which source i has the share weights[i] / sum(weights).

    sources: RowSources or Mixtures with one row length. The source of row n of the stream depends only on n and the
    weights. Each source is shuffled and repeated separately, so a small one repeats more often.

    Raises:
      ValueError: not one positive weight per source, or rows of different lengths.
    """

    sources: Sequence["RowSource | Mixture"]
    weights: Sequence[float | int]

    def __post_init__(self) -> None:
        if len(self.sources) != len(self.weights) or not self.sources:
            raise ValueError(
                "Mixture needs at least one source and a weight for each, got "
                f"{len(self.sources)} sources and {len(self.weights)} weights"
            )
        if not all(0 < weight < float("inf") for weight in self.weights):
            raise ValueError(f"Mixture.weights must be positive and finite, got {tuple(self.weights)}")
        lengths = [row_length(source) for source in self.sources]
        if len(set(lengths)) > 1:
            raise ValueError(f"Mixture.sources must have rows of one length, got {lengths}")


def row_length(source: RowSource | Mixture) -> int:
    """T, the tokens per row of a source.

    Raises:
      ValueError: the source has no row.
    """
    if isinstance(source, Mixture):
        return row_length(source.sources[0])
    if len(source) == 0:
        raise ValueError(f"a source must have at least one row, {type(source).__name__} has none")
    return len(source[0]["tokens"])


def batches(
    source: RowSource | Mixture,
    batch: int,
    seed: int,
    *,
    shuffle: bool = True,
    rows: Sequence[int] | None = None,
    epochs: int | None = None,
    start: dict[str, Any] | None = None,
) -> BatchIterator:
    """Batches of rows through grain. Threads read ahead; the order depends only on the arguments.

    batch: rows of the global batch, B. seed: of the shuffling, which changes with each epoch.
    rows: the rows of each global batch to read and return; None = all. Processes that divide the rows 0 ... B - 1
    among them have together what a single process has.
    epochs: passes over the source, without a last incomplete batch; None = endless.
    start: a state from ``get_state`` to resume from. Source, batch, seed and shuffle must be the same; rows may differ.

    Raises:
      ValueError: sizes that do not fit.
      ImportError: grain is not installed.
    """
    if batch < 1:
        raise ValueError(f"batch must be positive, got {batch}")
    rows = range(batch) if rows is None else rows
    if not rows or not 0 <= min(rows) <= max(rows) < batch:
        raise ValueError(f"rows must be some of 0 ... {batch - 1}, got {list(rows)}")
    row_length(source)  # refuses an empty source, which would repeat forever
    try:
        import grain
    except ImportError as error:
        raise ImportError("train.data.rows.batches reads through grain: pip install grain") from error

    def stream_of(part: RowSource | Mixture) -> Any:
        if isinstance(part, Mixture):
            return grain.MapDataset.mix([stream_of(inner) for inner in part.sources], list(part.weights))
        dataset = grain.MapDataset.source(part).seed(seed)
        return (dataset.shuffle() if shuffle else dataset).repeat(epochs)

    stream = stream_of(source)
    if len(stream) < batch:
        raise ValueError(
            f"{epochs} epochs must fill at least one batch of {batch} rows, got {len(stream)} rows"
        )
    dataset = grain.MapDataset.source(_Batches(stream, batch, rows))
    # grain's default keeps 500 elements ready; an element here is a whole batch.
    iterator = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))
    if start is not None:
        iterator.set_state(start)
    return iterator


@dataclass(frozen=True)
class _Batches:
    """Some rows of each complete batch of a stream."""

    stream: Any
    batch: int
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.stream) // self.batch

    def __getitem__(self, index: int) -> Batch:
        found = [self.stream[index * self.batch + row] for row in self.rows]
        return {name: np.stack([row[name] for row in found]) for name in found[0]}
