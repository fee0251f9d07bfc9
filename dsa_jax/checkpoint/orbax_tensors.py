"""An Orbax checkpoint seen as released tensors: the table of names, backwards."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dsa_jax.checkpoint.checksums import read_checksums
from dsa_jax.checkpoint.files import read_json_object
from dsa_jax.checkpoint.names import SCALE_SUFFIX, TensorRow, scale_shape, tensor_table
from dsa_jax.checkpoint.orbax_folder import CARRIED_FOLDER, OrbaxReader
from dsa_jax.checkpoint.pieces import Leaf, Piece, from_leaf
from dsa_jax.checkpoint.safetensors_file import DTYPES, TensorEntry
from dsa_jax.checkpoint.tensors import FP8, Carried
from dsa_jax.config import ModelConfig
from dsa_jax.fp8.e4m3 import BLOCK

VALUES, SCALES = "values", "scales"
"""Keys below an FP8 leaf, also the fields of Fp8Weight."""
_NAME_OF_DTYPE = {dtype: name for name, dtype in DTYPES.items()}


class OrbaxTensors:
    """Tensors over the leaves of an Orbax checkpoint of this config; see `tensors.Tensors`.

    max_chunk_bytes: refuses arrays stored in larger chunks, because a chunk can only be read whole.
    """

    def __init__(
        self, reader: OrbaxReader, config: ModelConfig, *, max_chunk_bytes: int | None = None
    ) -> None:
        self.path = reader.path
        self.reader = reader
        self.entries: dict[str, TensorEntry] = {}
        self.faults: dict[str, list[str]] = {}
        self.unreadable: set[str] = set()
        self._rows: dict[str, TensorRow] = tensor_table(config)
        self._max_chunk_bytes = max_chunk_bytes
        described: dict[Leaf, bool] = {}
        for name, row in self._rows.items():
            if row.path not in described:
                described[row.path] = self._describe(row)
            if not described[row.path]:
                self.unreadable.add(name)
                continue
            if self.is_fp8(row.path):
                self.entries[name] = _entry(FP8, row.shape)
                self.entries[name + SCALE_SUFFIX] = _entry("F32", scale_shape(row.shape))
            else:
                dtype = reader.spec(row.path).dtype
                self.entries[name] = _entry(_NAME_OF_DTYPE.get(dtype, dtype.name), row.shape)
        known = {leaf for path in described for leaf in (path, (*path, VALUES), (*path, SCALES))}
        unknown = [leaf for leaf in reader.leaves if leaf not in known]
        if not config.n_mtp_layers:
            unknown = [leaf for leaf in unknown if leaf[0] != "mtp"]
        if unknown:
            self.faults["leaves unknown to this config"] = ["/".join(leaf) for leaf in unknown]

    @property
    def bytes_read(self) -> int:
        return self.reader.bytes_read

    def is_fp8(self, leaf: Leaf) -> bool:
        """Whether the leaf is stored as float8 values and scales."""
        return (*leaf, VALUES) in self.reader.leaves

    def read_rows(self, name: str, start: int, stop: int, columns: slice = slice(None)) -> np.ndarray:
        """Rows start..stop of the released tensor; see `tensors.Tensors`."""
        is_scale = name not in self._rows
        row = self._rows[name.removesuffix(SCALE_SUFFIX)]
        piece = Piece(name=name, row=row, start=start, stop=stop)
        if is_scale:
            piece = Piece(name=name, row=row, start=start * BLOCK, stop=min(stop * BLOCK, row.shape[0]))
            array = self.reader.read((*row.path, SCALES), piece.scale_region)
        else:
            leaf = (*row.path, VALUES) if self.is_fp8(row.path) else row.path
            array = self.reader.read(leaf, piece.region)
        rows = from_leaf(array, row)
        return rows[:, columns] if rows.ndim == 2 else rows

    def _describe(self, row: TensorRow) -> bool:
        """Checks the arrays of the row's leaf; False when its tensors cannot be read."""
        if self.is_fp8(row.path):
            rows, columns = (-(-size // BLOCK) for size in row.leaf_shape[-2:])
            expected = {(*row.path, VALUES): row.leaf_shape, (*row.path, SCALES): (*row.stack, rows, columns)}
        else:
            expected = {row.path: row.leaf_shape}
        good = True
        for leaf, shape in expected.items():
            if leaf not in self.reader.leaves:
                self._fault("leaves missing", "/".join(leaf))
                good = False
                continue
            spec = self.reader.spec(leaf)
            size = math.prod(spec.chunk) * spec.dtype.itemsize
            if spec.shape != shape:
                self._fault(
                    "leaves of a wrong shape", f"{'/'.join(leaf)} {list(spec.shape)}, expected {list(shape)}"
                )
                good = False
            elif self._max_chunk_bytes is not None and size > self._max_chunk_bytes:
                self._fault(
                    f"leaves in chunks over {self._max_chunk_bytes:,} bytes; allow more memory, or save them "
                    "in smaller shards",
                    f"{'/'.join(leaf)} {size:,} bytes",
                )
                good = False
        return good

    def _fault(self, kind: str, detail: str) -> None:
        self.faults.setdefault(kind, []).append(detail)


def orbax_names(reader: OrbaxReader, config: ModelConfig) -> Iterator[str]:
    """Released names of the tensors whose leaves are stored, those of an MTP layer with its own embedding included."""
    config = dataclasses.replace(config, n_mtp_layers=1, mtp_shared_embeddings=False)
    stored = set(reader.leaves)
    for name, row in tensor_table(config).items():
        if row.path in stored or (*row.path, VALUES) in stored:
            yield name


def orbax_carried(path: Path) -> Carried:
    """What the conversion that wrote the folder carried along; nothing for other checkpoints."""
    folder = path / CARRIED_FOLDER
    checksums = read_checksums(path)
    stored = {name: entry["source"] for name, entry in checksums.tensors.items()} if checksums else {}
    if not folder.is_dir():
        return Carried(stored=stored)
    config = folder / "config.json"
    return Carried(
        hf_config=read_json_object(config) if config.is_file() else None,
        files=tuple(file for file in sorted(folder.iterdir()) if file.name != "config.json"),
        stored=stored,
    )


def _entry(dtype: str, shape: tuple[int, ...]) -> TensorEntry:
    itemsize = DTYPES[dtype].itemsize if dtype in DTYPES else 0
    return TensorEntry(dtype=dtype, shape=shape, begin=0, end=math.prod(shape) * itemsize)
