"""`verify`: reads a checkpoint and checks every tensor against the checksum written with it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from dsa_jax.checkpoint.checksums import read_checksums
from dsa_jax.checkpoint.job import refuse_incomplete
from dsa_jax.checkpoint.names import SCALE_SUFFIX, tensor_table
from dsa_jax.checkpoint.open_checkpoint import load_config, open_tensors
from dsa_jax.checkpoint.orbax_tensors import SCALES, VALUES, OrbaxTensors
from dsa_jax.checkpoint.pieces import FORM_OF_DTYPE, NOT_FINITE, Piece, all_finite, cut, digest
from dsa_jax.checkpoint.run_digests import StepVerification, steps_of_run
from dsa_jax.checkpoint.tensors import FP8, Tensors, describe_fault, find_faults


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verification:
    """tensors: how many were read; faults: one sentence each; checksums: whether the folder has any."""

    tensors: int
    bytes_read: int
    faults: tuple[str, ...]
    checksums: bool


def verify(
    path: str | os.PathLike[str],
    *,
    ignore: Iterable[str] = (),
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Verification:
    """Checks names, shapes, dtypes, block scales and, where `convert` wrote the folder, every checksum.

    Of a training run, or of one of its steps (RUN/checkpoints/N), every array against the digest saved with it.
    ignore: as in `load_config`. on_progress(bytes done, bytes in all). Raises ValueError for an unfinished
    conversion and for a folder whose config cannot be read.
    """
    path = Path(path)
    if steps := steps_of_run(path):
        step = StepVerification(steps, on_progress)
        return Verification(
            tensors=step.tensors,
            bytes_read=step.bytes_read,
            faults=tuple(step.faults),
            checksums=step.checked,
        )
    refuse_incomplete(path)
    config = load_config(path, ignore=ignore)
    tensors = open_tensors(path, config)
    faults = [
        describe_fault(kind, names) for kind, names in find_faults(tensors, config, read_scales=True).items()
    ]
    checksums = read_checksums(path)
    listed = checksums.tensors if checksums else {}
    piece_bytes = checksums.piece_bytes if checksums else None
    total = sum(entry.size for entry in tensors.entries.values())
    done = checked = 0
    for name, row in tensor_table(config).items():
        entry = tensors.entries.get(name)
        if entry is None or entry.dtype not in FORM_OF_DTYPE or row.duplicate and name not in listed:
            continue
        pieces = [*cut(name, row, FORM_OF_DTYPE[entry.dtype], piece_bytes)]
        for each, found in _digests(tensors, pieces, entry.dtype == FP8).items():
            checked += 1
            done += tensors.entries[each].size
            if isinstance(found, str):
                faults.append(f"{each}: {found}")
            elif listed and (fault := _fault(each, found, listed.get(each))):
                faults.append(fault)
        on_progress(done, total)
    missing = set(listed) - set(tensors.entries)
    faults += [f"{name} has a checksum and is missing" for name in sorted(missing)]
    return Verification(
        tensors=checked, bytes_read=tensors.bytes_read, faults=tuple(faults), checksums=bool(listed)
    )


def _fault(name: str, found: list[str], listed: dict[str, Any] | None) -> str | None:
    if listed is None:
        return f"{name} has no checksum"
    return None if listed["sha256"] == found else f"{name} differs from its checksum"


def _digests(tensors: Tensors, pieces: list[Piece], fp8: bool) -> dict[str, list[str] | str]:
    """Name -> digests of its pieces as `convert` made them, or what is wrong with them."""
    name = pieces[0].name
    scale = name + SCALE_SUFFIX
    found: dict[str, list[str] | str] = {}
    try:
        digests = []
        for piece in pieces:
            values = _stored(tensors, piece, "")
            if not all_finite(values):
                raise ValueError(f"{NOT_FINITE} (rows {piece.start} .. {piece.stop - 1})")
            digests.append(digest(values))
        found[name] = digests
        if fp8 and isinstance(tensors, OrbaxTensors):
            found[scale] = [digest(_stored(tensors, piece, SCALE_SUFFIX)) for piece in pieces]
        elif fp8:
            found[scale] = [digest(tensors.read_rows(scale, 0, tensors.entries[scale].shape[0]))]
    except ValueError as error:
        found[name] = str(error)
    return found


def _stored(tensors: Tensors, piece: Piece, suffix: str) -> np.ndarray:
    """The piece as it is stored."""
    if not isinstance(tensors, OrbaxTensors):
        return tensors.read_rows(piece.name, piece.start, piece.stop)
    leaf = piece.row.path
    if not tensors.is_fp8(leaf):
        return tensors.reader.read(leaf, piece.region)
    if suffix:
        return tensors.reader.read((*leaf, SCALES), piece.scale_region)
    return tensors.reader.read((*leaf, VALUES), piece.region)
