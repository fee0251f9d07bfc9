"""`verify`: reads a checkpoint and holds every tensor against the checksum written with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dsa_jax.checkpoint.job import refuse_incomplete
from dsa_jax.checkpoint.names import SCALE_SUFFIX, tensor_table
from dsa_jax.checkpoint.open_checkpoint import load_config, open_tensors
from dsa_jax.checkpoint.orbax_folder import TENSORS_FILE
from dsa_jax.checkpoint.orbax_tensors import SCALES, VALUES, OrbaxTensors, read_piece_bytes, read_tensors_file
from dsa_jax.checkpoint.pieces import Form, Piece, cut, digest
from dsa_jax.checkpoint.tensors import FP8, Tensors, describe_fault, find_faults

_FORMS: dict[str, Form] = {FP8: "fp8", "BF16": "bfloat16", "F16": "bfloat16", "F32": "float32"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verification:
    """tensors: how many were read; faults: one sentence each; checksums: False when there are none to hold."""

    tensors: int
    bytes_read: int
    faults: tuple[str, ...]
    checksums: bool


def verify(
    path: str | Path, *, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> Verification:
    """Checks names, shapes, dtypes, block scales and, where `convert` wrote the folder, every checksum.

    on_progress(bytes done, bytes in all). Raises ValueError for an unfinished conversion and for a folder
    whose config cannot be read.
    """
    path = Path(path)
    refuse_incomplete(path)
    config = load_config(path)
    tensors = open_tensors(path, config)
    faults = [
        describe_fault(kind, names) for kind, names in find_faults(tensors, config, read_scales=True).items()
    ]
    listed = read_tensors_file(path) if (path / TENSORS_FILE).is_file() else {}
    piece_bytes = read_piece_bytes(path) if listed else None
    total = sum(entry.size for entry in tensors.entries.values())
    done = checked = 0
    for name, row in tensor_table(config).items():
        entry = tensors.entries.get(name)
        if entry is None or entry.dtype not in _FORMS or row.duplicate and name not in listed:
            continue
        found = _digests(tensors, [*cut(name, row, _FORMS[entry.dtype], piece_bytes)], entry.dtype == FP8)
        for each, parts in found.items():
            checked += 1
            done += tensors.entries[each].size
            if listed and each not in listed:
                faults.append(f"{each} has no checksum")
            elif listed and isinstance(parts, str):
                faults.append(f"{each}: {parts}")
            elif listed and listed[each]["sha256"] != parts:
                faults.append(f"{each} differs from its checksum")
        on_progress(done, total)
    missing = set(listed) - set(tensors.entries)
    faults += [f"{name} has a checksum and is missing" for name in sorted(missing)]
    return Verification(
        tensors=checked, bytes_read=tensors.bytes_read, faults=tuple(faults), checksums=bool(listed)
    )


def _digests(tensors: Tensors, pieces: list[Piece], fp8: bool) -> dict[str, list[str] | str]:
    """Name -> digests of its pieces as `convert` made them, or what kept them from being read."""
    name = pieces[0].name
    scale = name + SCALE_SUFFIX
    found: dict[str, list[str] | str] = {}
    try:
        found[name] = [digest(_stored(tensors, piece, "")) for piece in pieces]
        if fp8 and isinstance(tensors, OrbaxTensors):
            found[scale] = [digest(_stored(tensors, piece, SCALE_SUFFIX)) for piece in pieces]
        elif fp8:
            found[scale] = [digest(tensors.read_rows(scale, 0, tensors.entries[scale].shape[0]))]
    except ValueError as error:
        found[name] = str(error)
    return found


def _stored(tensors: Tensors, piece: Piece, suffix: str) -> np.ndarray:
    """The piece as it lies on disk."""
    if not isinstance(tensors, OrbaxTensors):
        return tensors.read_rows(piece.name, piece.start, piece.stop)
    leaf = piece.row.path
    if not tensors.is_fp8(leaf):
        return tensors.reader.read(leaf, piece.region)
    if suffix:
        return tensors.reader.read((*leaf, SCALES), piece.scale_region)
    return tensors.reader.read((*leaf, VALUES), piece.region)
