"""Tensors -> Orbax checkpoint, a few pieces at a time."""

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

from dsa_jax.checkpoint import pieces
from dsa_jax.checkpoint.files import write_atomically
from dsa_jax.checkpoint.job import Job
from dsa_jax.checkpoint.names import SCALE_SUFFIX, TensorRow, scale_shape, tensor_table
from dsa_jax.checkpoint.orbax_folder import (
    CARRIED_FOLDER,
    FORMAT_VERSION,
    METADATA_FILE,
    TENSORS_FILE,
    ArraySpec,
    Leaf,
    OrbaxWriter,
    disk_full,
)
from dsa_jax.checkpoint.orbax_tensors import SCALES, VALUES
from dsa_jax.checkpoint.pieces import (
    Form,
    Piece,
    cut,
    digest,
    dtype_of_form,
    leaf_forms,
    numpy_dtype,
    read_piece,
    rows_per_piece,
    to_leaf,
)
from dsa_jax.checkpoint.tensors import Carried, Tensors
from dsa_jax.config import ModelConfig

Writes = list[tuple[Leaf, tuple[slice, ...], np.ndarray]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OrbaxPlan:
    """What will be written: the form of each leaf, the arrays, and the pieces that fill them."""

    table: Mapping[str, TensorRow]
    forms: Mapping[Leaf, Form]
    specs: Mapping[Leaf, ArraySpec]

    @property
    def n_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(int(np.prod(spec.shape)) * spec.dtype.itemsize for spec in self.specs.values())

    def pieces(self) -> Iterator[Piece]:
        """All pieces, in order of the table."""
        for name, row in self.table.items():
            if not row.duplicate:
                yield from cut(name, row, self.forms[row.path])

    def piece_bytes(self, piece: Piece) -> int:
        """Bytes of the piece in the arrays, scales included."""
        form = self.forms[piece.row.path]
        size = int(np.prod(piece.shape)) * numpy_dtype(form).itemsize
        if form == "fp8":
            size += 4 * int(np.prod(scale_shape(piece.shape)))
        return size


def plan_orbax(tensors: Tensors, config: ModelConfig, dtype: Form | None) -> OrbaxPlan:
    """The plan for these tensors; dtype as in `pieces.leaf_forms`."""
    table = tensor_table(config)
    stored = {name: tensors.entries[name].dtype for name, row in table.items() if not row.duplicate}
    forms = leaf_forms(table, stored, dtype)
    specs: dict[Leaf, ArraySpec] = {}
    for row in table.values():
        if row.duplicate or row.path in specs or (*row.path, VALUES) in specs:
            continue
        form = forms[row.path]
        rows = rows_per_piece(row, form)
        chunk = _oriented((rows, *row.shape[1:]), row)
        if form != "fp8":
            specs[row.path] = ArraySpec(shape=row.leaf_shape, dtype=numpy_dtype(form), chunk=chunk)
            continue
        specs[(*row.path, VALUES)] = ArraySpec(shape=row.leaf_shape, dtype=numpy_dtype(form), chunk=chunk)
        specs[(*row.path, SCALES)] = ArraySpec(
            shape=row.stack + _oriented(scale_shape(row.shape), row)[len(row.stack) :],
            dtype=np.dtype(np.float32),
            chunk=_oriented(scale_shape((rows, *row.shape[1:])), row),
        )
    return OrbaxPlan(table=table, forms=forms, specs=specs)


def write_orbax(
    job: Job,
    tensors: Tensors,
    config: ModelConfig,
    plan: OrbaxPlan,
    carried: Carried,
    *,
    batch_bytes: int,
    workers: int,
    on_bytes: Callable[[int], None],
) -> None:
    """Fills job.path with the checkpoint, from where an earlier run stopped.

    batch_bytes: arrays written in one commit; twice as much is in memory, and the scratch of each of
    `workers` threads. on_bytes is told of every finished
    batch. Raises OSError when the disk is full; the job can then be resumed.
    """
    writer = OrbaxWriter(job.path)
    known = writer.restore(job.steps)
    digests: dict[str, dict[str, list[str]]] = {}
    for step in job.steps:
        for name, start, *parts in step["pieces"]:
            digests.setdefault(name, {})[str(start)] = parts
    try:
        writer.create(plan.specs)
        if not job.steps:
            job.record({"pieces": [], **writer.state(known)})
        pending: tuple[Any, list[list[Any]], int] | None = None

        def complete() -> None:
            assert pending is not None
            future, done, size = pending
            future.result()
            job.record({"pieces": done, **writer.state(known)})
            for name, start, *parts in done:
                digests.setdefault(name, {})[str(start)] = parts
            on_bytes(size)

        todo = [piece for piece in plan.pieces() if str(piece.start) not in digests.get(piece.name, {})]
        with ThreadPoolExecutor(workers) as pool:
            for batch in _batches(todo, plan, batch_bytes):
                # The pieces of this batch are made while tensorstore still writes the one before.
                made = list(pool.map(lambda piece: _make(tensors, config, plan, piece), batch))
                if pending is not None:
                    complete()
                writes = [write for _, part in made for write in part]
                size = sum(plan.piece_bytes(piece) for piece in batch)
                pending = (writer.commit(writes), [step for step, _ in made], size)
                del made, writes
            if pending is not None:
                complete()
    except (ValueError, RuntimeError) as error:
        if disk_full(error):
            raise OSError(
                f"no space left on the disk of {job.path}; free some and run the same command again, it resumes"
            ) from error
        raise
    _write_metadata(job.path, config, plan, carried, digests)
    writer.finish(plan.specs)


def _oriented(shape: tuple[int, ...], row: TensorRow) -> tuple[int, ...]:
    return (1,) * len(row.stack) + (shape[::-1] if row.transpose else shape)


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


def _make(tensors: Tensors, config: ModelConfig, plan: OrbaxPlan, piece: Piece) -> tuple[list[Any], Writes]:
    """([name, start, digest, and of FP8 the digest of the scales], what to write)."""
    row, form = piece.row, plan.forms[piece.row.path]
    scale_fmt = config.fp8.scale_fmt if config.fp8 else "ue8m0"
    values, scales = read_piece(tensors, piece, dtype_of_form(form), scale_fmt=scale_fmt)
    array = to_leaf(values, row)
    if scales is None:
        return [piece.name, piece.start, digest(array)], [(row.path, piece.region, array)]
    scale_array = to_leaf(scales, row)
    return [piece.name, piece.start, digest(array), digest(scale_array)], [
        ((*row.path, VALUES), piece.region, array),
        ((*row.path, SCALES), piece.scale_region, scale_array),
    ]


def _write_metadata(
    path: Path,
    config: ModelConfig,
    plan: OrbaxPlan,
    carried: Carried,
    digests: Mapping[str, Mapping[str, Any]],
) -> None:
    listed: dict[str, Any] = {}
    for name, row in plan.table.items():
        if row.duplicate:
            continue
        parts = list(digests[name].values())
        for suffix, i in (("", 0), (SCALE_SUFFIX, 1)):
            if len(parts[0]) > i:
                source = carried.stored.get(name + suffix)
                listed[name + suffix] = {"source": source, "sha256": [part[i] for part in parts]}
    write_atomically(
        path / TENSORS_FILE,
        json.dumps({"piece_bytes": pieces.PIECE_BYTES, "tensors": listed}, indent=0).encode(),
    )
    folder = path / CARRIED_FOLDER
    folder.mkdir(exist_ok=True)
    for file in carried.files:
        shutil.copyfile(file, folder / file.name)
    if carried.hf_config is not None:
        write_atomically(folder / "config.json", json.dumps(carried.hf_config, indent=2).encode())
    metadata = {
        "format": FORMAT_VERSION,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "config": dataclasses.asdict(config),
        "forms": {"/".join(leaf): form for leaf, form in plan.forms.items()},
        "elements": config.param_count(),
        "bytes": plan.n_bytes,
    }
    write_atomically(path / METADATA_FILE, json.dumps(metadata, indent=2).encode())
