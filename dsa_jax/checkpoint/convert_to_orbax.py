"""A checkpoint -> Orbax checkpoint, a few pieces at a time, resumable after every commit."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from dsa_jax.checkpoint.checksums import write_checksums
from dsa_jax.checkpoint.files import write_atomically
from dsa_jax.checkpoint.job import Job
from dsa_jax.checkpoint.names import SCALE_SUFFIX
from dsa_jax.checkpoint.open_checkpoint import Checkpoint
from dsa_jax.checkpoint.orbax_folder import CARRIED_FOLDER, FORMAT_VERSION, METADATA_FILE
from dsa_jax.checkpoint.orbax_plan import OrbaxPlan
from dsa_jax.checkpoint.orbax_tensors import SCALES, VALUES
from dsa_jax.checkpoint.orbax_writer import OrbaxWriter
from dsa_jax.checkpoint.pieces import Leaf, Piece, digest, dtype_of_form, read_finite_piece, to_leaf
from dsa_jax.config import Fp8Config

Digests = dict[str, dict[str, list[str]]]
"""Released name -> first row of each piece, as text -> digest of its values and, for FP8, of its scales."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Made:
    """One piece, ready to be written. entry: [name, first row, *digests], as it goes into the journal."""

    entry: list[Any]
    writes: list[tuple[Leaf, tuple[slice, ...], np.ndarray]]


def write_orbax(
    job: Job,
    checkpoint: Checkpoint,
    plan: OrbaxPlan,
    *,
    batch_bytes: int,
    workers: int,
    on_bytes: Callable[[int], None],
) -> None:
    """Fills job.path with the checkpoint, from where an earlier run stopped.

    batch_bytes: bytes of the arrays in one commit. Two batches are in memory, and the scratch space of each of
    `workers` threads. on_bytes is told of every finished batch. When the disk is full, `files.disk_full`
    is true of the exception raised; the job can then be resumed.
    """
    writer = OrbaxWriter(job.path)
    commits = _Commits(job, writer, on_bytes)
    commits.begin(plan)
    todo = [piece for piece in plan.pieces() if not commits.finished(piece)]
    with ThreadPoolExecutor(workers) as pool:
        for batch in _batches(todo, plan, batch_bytes):
            # The pieces of this batch are made while tensorstore still writes the one before.
            made = list(pool.map(lambda piece: _make(checkpoint, plan, piece), batch))
            commits.complete()
            commits.start(made, sum(plan.piece_bytes(piece) for piece in batch))
            del made
        commits.complete()
    _write_checksums(checkpoint, plan, job.path, commits.digests)
    _write_metadata(checkpoint, plan, job.path)
    writer.finish(plan.specs)


class _Commits:
    """The commits of one conversion: one at a time is under way, and the journal has a line for each finished one.

    digests: those of all finished pieces, an earlier run's included.
    """

    def __init__(self, job: Job, writer: OrbaxWriter, on_bytes: Callable[[int], None]) -> None:
        self._job, self._writer, self._on_bytes = job, writer, on_bytes
        self._known = writer.restore(job.steps)
        self._pending: tuple[Any, list[list[Any]], int] | None = None
        self.digests: Digests = {}
        for step in job.steps:
            self._remember(step["pieces"])

    def begin(self, plan: OrbaxPlan) -> None:
        """Creates the arrays, or opens those of an earlier run."""
        self._writer.create(plan.specs)
        if not self._job.steps:
            self._record([])

    def finished(self, piece: Piece) -> bool:
        return str(piece.start) in self.digests.get(piece.name, {})

    def start(self, made: list[_Made], size: int) -> None:
        """Starts the commit of these pieces, of `size` bytes."""
        future = self._writer.commit([write for part in made for write in part.writes])
        self._pending = (future, [part.entry for part in made], size)

    def complete(self) -> None:
        """Waits for the commit under way, if there is one, and records it."""
        if self._pending is None:
            return
        future, entries, size = self._pending
        future.result()
        self._pending = None
        self._record(entries)
        self._remember(entries)
        self._on_bytes(size)

    def _record(self, entries: list[list[Any]]) -> None:
        self._job.record({"pieces": entries, **self._writer.state(self._known)})

    def _remember(self, entries: list[list[Any]]) -> None:
        for name, start, *parts in entries:
            self.digests.setdefault(name, {})[str(start)] = parts


def _batches(pieces: list[Piece], plan: OrbaxPlan, batch_bytes: int) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    used = 0
    for piece in pieces:
        size = plan.piece_bytes(piece)
        if batch and used + size > batch_bytes:
            yield batch
            batch, used = [], 0
        batch.append(piece)
        used += size
    if batch:
        yield batch


def _make(checkpoint: Checkpoint, plan: OrbaxPlan, piece: Piece) -> _Made:
    row, form = piece.row, plan.forms[piece.row.path]
    scale_fmt = (checkpoint.config.fp8 or Fp8Config()).scale_fmt
    values, scales = read_finite_piece(checkpoint.tensors, piece, dtype_of_form(form), scale_fmt=scale_fmt)
    array = to_leaf(values, row)
    entry = [piece.name, piece.start, digest(array)]
    if scales is None:
        return _Made(entry=entry, writes=[(row.path, piece.region, array)])
    scale_array = to_leaf(scales, row)
    return _Made(
        entry=[*entry, digest(scale_array)],
        writes=[
            ((*row.path, VALUES), piece.region, array),
            ((*row.path, SCALES), piece.scale_region, scale_array),
        ],
    )


def _write_checksums(checkpoint: Checkpoint, plan: OrbaxPlan, path: Path, digests: Mapping[str, Any]) -> None:
    listed: dict[str, Any] = {}
    for name, row in plan.table.items():
        if row.duplicate:
            continue
        parts = list(digests[name].values())
        for suffix, i in (("", 0), (SCALE_SUFFIX, 1)):
            if len(parts[0]) > i:
                source = checkpoint.carried.stored.get(name + suffix)
                listed[name + suffix] = {"source": source, "sha256": [part[i] for part in parts]}
    write_checksums(path, listed)


def _write_metadata(checkpoint: Checkpoint, plan: OrbaxPlan, path: Path) -> None:
    folder = path / CARRIED_FOLDER
    folder.mkdir(exist_ok=True)
    carried = checkpoint.carried
    for file in carried.files:
        shutil.copyfile(file, folder / file.name)
    if carried.hf_config is not None:
        write_atomically(folder / "config.json", json.dumps(carried.hf_config, indent=2).encode())
    metadata = {
        "format": FORMAT_VERSION,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "config": dataclasses.asdict(checkpoint.config),
        "forms": {"/".join(leaf): form for leaf, form in plan.forms.items()},
        "elements": checkpoint.config.param_count(),
        "bytes": plan.n_bytes,
    }
    write_atomically(path / METADATA_FILE, json.dumps(metadata, indent=2).encode())
