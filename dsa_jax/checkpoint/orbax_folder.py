"""Orbax checkpoints on disk: zarr arrays of the leaves in one OCDBT store, and our metadata beside them.

An array is named by its path joined with dots ("params.moe_layers.attn.wq_a"); the folder's _METADATA lists
them, and Orbax restores them from there. Arrays are read and written range by range with tensorstore, the
library Orbax itself uses, so that no leaf need ever be whole in memory.
"""

from __future__ import annotations

import base64
import dataclasses
import errno
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from dsa_jax.checkpoint.files import read_json_object, write_atomically
from dsa_jax.config import Fp8Config, ModelConfig, YarnConfig
from dsa_jax.unstable import ORBAX_HANDLER

FORMAT_VERSION = 1
METADATA_FILE = "dsa_jax.json"
TENSORS_FILE = "dsa_jax_tensors.json"
CARRIED_FOLDER = "hf"
_ORBAX_METADATA = "_METADATA"
_ORBAX_CHECKPOINT_METADATA = "_CHECKPOINT_METADATA"
_MANIFEST = "manifest.ocdbt"
_DATA = "d"
Leaf = tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """Shape, dtype and chunk shape of one array of the store."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]


class OrbaxReader:
    """The arrays of an Orbax checkpoint: `shapes`, `dtypes`, `chunks` by leaf (below "params"), and `read`.

    Raises ValueError for a folder that is no Orbax checkpoint of a parameter tree.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).resolve()
        root = self.path
        # CheckpointManager puts the tree into a folder of its item's name.
        for below in ("default", "params", "state"):
            if not (root / _ORBAX_METADATA).is_file() and (root / below / _ORBAX_METADATA).is_file():
                root = root / below
        if not (root / _ORBAX_METADATA).is_file():
            raise ValueError(f"{path} holds no {_ORBAX_METADATA}: give the folder of an Orbax checkpoint")
        metadata = read_json_object(root / _ORBAX_METADATA)
        keys = [
            tuple(part["key"] for part in entry["key_metadata"])
            for entry in metadata.get("tree_metadata", {}).values()
        ]
        if metadata.get("use_zarr3") or not metadata.get("use_ocdbt", True):
            raise ValueError(
                f"{path} is not a zarr 2 checkpoint in an OCDBT store, Orbax's default; save it so"
            )
        self._prefix = _prefix(keys, self.path)
        # Zero keeps no decoded chunk: what was read is the caller's.
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
        self._root = root
        self._arrays: dict[Leaf, ts.TensorStore] = {}
        self.bytes_read = 0
        self.leaves = tuple(
            key[len(self._prefix) :] for key in keys if key[: len(self._prefix)] == self._prefix
        )

    def spec(self, leaf: Leaf) -> ArraySpec:
        """Shape, dtype and chunk shape of a leaf's array. Raises KeyError for a leaf that is not in `leaves`."""
        array = self._open(leaf)
        chunk = array.chunk_layout.read_chunk.shape or array.shape
        return ArraySpec(
            shape=tuple(array.shape),
            dtype=np.dtype(array.dtype.numpy_dtype),
            chunk=tuple(
                size if limit is None else limit for size, limit in zip(array.shape, chunk, strict=True)
            ),
        )

    def read(self, leaf: Leaf, region: tuple[slice, ...]) -> np.ndarray:
        """This region of the leaf. Raises ValueError when the store is damaged there."""
        array = self._open(leaf)[region]
        try:
            values = array.read().result()
        except (ValueError, RuntimeError, OSError) as error:
            raise ValueError(f"{self.path}: {'/'.join(leaf)} cannot be read: {_first_line(error)}") from error
        self.bytes_read += values.nbytes
        return values

    def _open(self, leaf: Leaf) -> ts.TensorStore:
        if leaf not in self._arrays:
            if leaf not in self.leaves:
                raise KeyError("/".join(leaf))
            spec = {"driver": "zarr", "kvstore": _store(self._root, (*self._prefix, *leaf))}
            try:
                self._arrays[leaf] = ts.open(spec, open=True, context=self._context).result()
            except (ValueError, RuntimeError, OSError) as error:
                raise ValueError(
                    f"{self.path}: {'/'.join(leaf)} cannot be opened: {_first_line(error)}"
                ) from error
        return self._arrays[leaf]


class OrbaxWriter:
    """Writes arrays piece by piece; every `commit` is one atomic step of the store.

    `state` after a commit lets `restore` go back exactly there, whatever was written later and not recorded.
    Raises OSError when the disk is full.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.resolve()
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
        self._arrays: dict[Leaf, ts.TensorStore] = {}

    def create(self, specs: Mapping[Leaf, ArraySpec]) -> None:
        """Creates the arrays, or opens them when they are there."""
        with ts.Transaction(atomic=False) as transaction:
            opened = {
                leaf: ts.open(self._spec(leaf, spec), create=True, open=True, transaction=transaction,
                              context=self._context)
                for leaf, spec in specs.items()
            }  # fmt: skip
            for future in opened.values():
                future.result()
        self._arrays = {
            leaf: ts.open(self._spec(leaf, spec), open=True, context=self._context).result()
            for leaf, spec in specs.items()
        }

    def _spec(self, leaf: Leaf, spec: ArraySpec) -> dict[str, Any]:
        return {
            "driver": "zarr",
            "kvstore": _store(self._path, ("params", *leaf)),
            # Zeros are data: a chunk left out would still read as zeros, and a lost one would go unseen.
            "store_data_equal_to_fill_value": True,
            "metadata": {
                "shape": list(spec.shape),
                "chunks": list(spec.chunk),
                "dtype": spec.dtype.name if spec.dtype.name != "float32" else "<f4",
                # Trained weights do not compress; bfloat16 and FP8 mantissas are noise.
                "compressor": None,
                "fill_value": None,
                "filters": None,
                "order": "C",
                "dimension_separator": ".",
            },
        }

    def commit(self, writes: Iterable[tuple[Leaf, tuple[slice, ...], np.ndarray]]) -> ts.Future:
        """Starts one atomic commit of (leaf, region, values); call result() of what it returns."""
        transaction = ts.Transaction(atomic=False)
        # A write whose future is dropped is cancelled: they are kept until the values are in the transaction.
        writing = [
            self._arrays[leaf]
            .with_transaction(transaction)[region]
            .write(values, can_reference_source_data_indefinitely=True)
            for leaf, region, values in writes
        ]
        for future in writing:
            future.copy.result()
        return transaction.commit_async()

    def state(self, known: set[str]) -> dict[str, Any]:
        """The store's root as text and its data files that are not in `known`, which grows by them."""
        files = set(os.listdir(self._path / _DATA)) - known
        known |= files
        manifest = base64.b64encode((self._path / _MANIFEST).read_bytes()).decode()
        return {"manifest": manifest, "files": sorted(files)}

    def restore(self, states: Iterable[dict[str, Any]]) -> set[str]:
        """Goes back to the last of these states and deletes what was written after it; returns its files."""
        known: set[str] = set()
        manifest = ""
        for state in states:
            known |= set(state["files"])
            manifest = state["manifest"]
        if manifest:
            write_atomically(self._path / _MANIFEST, base64.b64decode(manifest))
        if (self._path / _DATA).is_dir():
            for name in set(os.listdir(self._path / _DATA)) - known:
                (self._path / _DATA / name).unlink()
        if not manifest:
            (self._path / _MANIFEST).unlink(missing_ok=True)
        return known

    def finish(self, specs: Mapping[Leaf, ArraySpec]) -> None:
        """Writes what Orbax reads first; before it, Orbax finds no checkpoint here."""
        tree = {
            str(("params", *leaf)): {
                "key_metadata": [{"key": key, "key_type": 2} for key in ("params", *leaf)],
                # Plain arrays: restored as NumPy without a target, on any devices with one.
                "value_metadata": {
                    "value_type": "np.ndarray",
                    "skip_deserialize": False,
                    "write_shape": list(spec.shape),
                },
            }
            for leaf, spec in specs.items()
        }
        metadata = {
            "tree_metadata": tree,
            "use_ocdbt": True,
            "use_zarr3": False,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }
        checkpoint = {
            "item_handlers": ORBAX_HANDLER,
            "metrics": {},
            "performance_metrics": {},
            "init_timestamp_nsecs": time.time_ns(),
            "commit_timestamp_nsecs": time.time_ns(),
            "custom_metadata": {},
        }
        write_atomically(self._path / _ORBAX_METADATA, json.dumps(metadata).encode())
        write_atomically(self._path / _ORBAX_CHECKPOINT_METADATA, json.dumps(checkpoint).encode())


def is_orbax(path: Path) -> bool:
    """Whether the folder looks like an Orbax checkpoint."""
    names = (_ORBAX_METADATA, _MANIFEST, METADATA_FILE, f"default/{_ORBAX_METADATA}")
    return any((path / name).is_file() for name in names)


def load_orbax_config(path: Path, **switches: Any) -> ModelConfig:
    """The ModelConfig a conversion put into the folder; `switches` are fields that replace what it says.

    Raises ValueError for a folder without it and for a format version this code does not know.
    """
    if not (path / METADATA_FILE).is_file():
        raise ValueError(
            f"{path} holds no {METADATA_FILE}, so its config is unknown; pass the config.json of the model"
        )
    metadata = read_json_object(path / METADATA_FILE)
    if metadata.get("format") != FORMAT_VERSION:
        raise ValueError(
            f"{path / METADATA_FILE}: format must be {FORMAT_VERSION}, got {metadata.get('format')!r}; "
            "read it with the version of dsa-jax that wrote it"
        )
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    if wrong := sorted(set(switches) - fields):
        raise ValueError(f"switches must be ModelConfig fields, got {', '.join(wrong)}")
    values = dict(metadata["config"])
    if wrong := sorted(set(values) - fields):
        raise ValueError(
            f"{path / METADATA_FILE}: config has unknown fields {', '.join(wrong)}; update dsa-jax"
        )
    values["eos_token_ids"] = tuple(values["eos_token_ids"])
    if values["yarn"] is not None:
        values["yarn"] = YarnConfig(**values["yarn"])
    if values["fp8"] is not None:
        values["fp8"] = Fp8Config(**(values["fp8"] | {"block": tuple(values["fp8"]["block"])}))
    return ModelConfig(**(values | switches))


def disk_full(error: BaseException) -> bool:
    """Whether the error means that the disk, a quota or a limit on file sizes is full.

    tensorstore has no exception of its own for it: its text carries the number.
    """
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError):
        return error.errno in full
    return any(f"os_error_code='{number}'" in str(error) for number in full)


def _store(root: Path, keys: Leaf) -> dict[str, Any]:
    return {"driver": "ocdbt", "base": f"file://{root}/", "path": ".".join(keys) + "/"}


def _prefix(keys: list[Leaf], path: Path) -> Leaf:
    """What comes before ("embed",), the one leaf every model has at its top, in the parameters' paths."""
    found = [key[:-1] for key in keys if key[-1:] == ("embed",) and "mtp" not in key]
    found = [prefix for prefix in found if (*prefix, "norm") in keys] or found
    # An optimizer's state repeats the tree below its own keys; the parameters' path is the shortest.
    found = sorted((prefix for prefix in found if "opt_state" not in prefix), key=len)
    if not found or (len(found) > 1 and len(found[0]) == len(found[1])):
        raise ValueError(
            f"{path} holds no tree of parameters (no single leaf 'embed'): its leaves are "
            f"{', '.join('.'.join(map(str, key)) for key in keys[:4])}"
        )
    return found[0]


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:300]
