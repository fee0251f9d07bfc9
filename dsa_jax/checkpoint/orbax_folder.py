"""Orbax checkpoints on disk: zarr arrays of the leaves in one OCDBT store, and our metadata beside them.

An array is named by its path joined with dots ("params.moe_layers.attn.wq_a"); the folder's _METADATA lists
the arrays, and Orbax restores them from there. `OrbaxReader` reads them range by range with tensorstore, the
library that Orbax itself uses, so that no leaf need ever be whole in memory; `orbax_writer` writes them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from dsa_jax.checkpoint.files import first_line, read_json_object
from dsa_jax.checkpoint.pieces import Leaf
from dsa_jax.config import Fp8Config, ModelConfig, YarnConfig

FORMAT_VERSION = 1
METADATA_FILE = "dsa_jax.json"
CARRIED_FOLDER = "hf"
ORBAX_METADATA = "_METADATA"
MANIFEST = "manifest.ocdbt"
_ITEMS = ("default", "params", "state")
"""Folders of a step into which CheckpointManager puts a tree of parameters, after the name of its item."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """Shape, dtype and chunk shape of one array of the store."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]


class OrbaxReader:
    """The arrays of an Orbax checkpoint: `shapes`, `dtypes`, `chunks` by leaf (below "params"), and `read`.

    Raises ValueError for a folder that is no Orbax checkpoint of a parameter tree, and for one with LoRA adapters:
    without them the parameters are those of the base model.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).resolve()
        root = self.path
        for below in _ITEMS:
            if not (root / ORBAX_METADATA).is_file() and (root / below / ORBAX_METADATA).is_file():
                root = root / below
        if not (root / ORBAX_METADATA).is_file():
            raise ValueError(f"{path} holds no {ORBAX_METADATA}: give the folder of an Orbax checkpoint")
        metadata = read_json_object(root / ORBAX_METADATA)
        keys = _leaf_keys(metadata, root / ORBAX_METADATA)
        if metadata.get("use_zarr3") or not metadata.get("use_ocdbt", True):
            raise ValueError(
                f"{path} is not a zarr 2 checkpoint in an OCDBT store, Orbax's default; save it so"
            )
        self._prefix = _prefix(keys, root / ORBAX_METADATA)
        # Zero keeps no decoded chunk: what was read is the caller's.
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
        self._root = root
        self._arrays: dict[Leaf, ts.TensorStore] = {}
        self.bytes_read = 0
        self.leaves = tuple(
            key[len(self._prefix) :] for key in keys if key[: len(self._prefix)] == self._prefix
        )
        _refuse_adapters(keys, self._prefix, self.leaves, self.path)

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
            raise ValueError(f"{self.path}: {'/'.join(leaf)} cannot be read: {first_line(error)}") from error
        self.bytes_read += values.nbytes
        return values

    def _open(self, leaf: Leaf) -> ts.TensorStore:
        if leaf not in self._arrays:
            if leaf not in self.leaves:
                raise KeyError("/".join(leaf))
            spec = {"driver": "zarr", "kvstore": array_store(self._root, (*self._prefix, *leaf))}
            try:
                self._arrays[leaf] = ts.open(spec, open=True, context=self._context).result()
            except (ValueError, RuntimeError, OSError) as error:
                raise ValueError(
                    f"{self.path}: {'/'.join(leaf)} cannot be opened: {first_line(error)}"
                ) from error
        return self._arrays[leaf]


def is_orbax(path: Path) -> bool:
    """Whether the folder looks like an Orbax checkpoint."""
    names = (ORBAX_METADATA, MANIFEST, METADATA_FILE, *(f"{item}/{ORBAX_METADATA}" for item in _ITEMS))
    return any((path / name).is_file() for name in names)


def load_orbax_config(path: Path, **switches: Any) -> ModelConfig:
    """The ModelConfig a conversion put into the folder; `switches` are fields that replace what it says.

    Raises ValueError for a folder without it and for a format version this code does not know.
    """
    if not (path / METADATA_FILE).is_file():
        raise ValueError(
            f"{path} holds no {METADATA_FILE}, so its config is unknown: convert it with `dsa-jax convert {path} OUT "
            "--config config.json`, or a training run with `python -m train.export RUN OUT`"
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
    if values.get("indexer_types") is not None:
        values["indexer_types"] = tuple(values["indexer_types"])
    if values["yarn"] is not None:
        values["yarn"] = YarnConfig(**values["yarn"])
    if values["fp8"] is not None:
        values["fp8"] = Fp8Config(**(values["fp8"] | {"block": tuple(values["fp8"]["block"])}))
    return ModelConfig(**(values | switches))


def array_store(root: Path, keys: Leaf) -> dict[str, Any]:
    """tensorstore's description of where the array of these keys is stored."""
    return {"driver": "ocdbt", "base": f"file://{root}/", "path": ".".join(keys) + "/"}


def _leaf_keys(metadata: dict[str, Any], file: Path) -> list[Leaf]:
    """The path of every leaf that Orbax lists."""
    try:
        entries = [entry["key_metadata"] for entry in metadata.get("tree_metadata", {}).values()]
        return [tuple(str(part["key"]) for part in entry) for entry in entries]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} does not list leaves as Orbax does ({error!r}); save or copy it again"
        ) from error


def _prefix(keys: list[Leaf], file: Path) -> Leaf:
    """What comes before ("embed",), the one leaf every model has at its top, in the parameters' paths."""
    found = [key[:-1] for key in keys if key[-1:] == ("embed",) and "mtp" not in key]
    found = [prefix for prefix in found if (*prefix, "norm") in keys] or found
    # An optimizer's state repeats the tree below its own keys; the parameters' path is the shortest.
    found = sorted((prefix for prefix in found if "opt_state" not in prefix), key=len)
    if not found or (len(found) > 1 and len(found[0]) == len(found[1])):
        raise ValueError(
            f"{file} lists no tree of parameters (no single leaf 'embed'), its leaves are "
            f"{', '.join('.'.join(key) for key in keys[:4]) or 'none'}: give the folder of a model's checkpoint"
        )
    return found[0]


def _refuse_adapters(keys: list[Leaf], prefix: Leaf, leaves: Iterable[Leaf], path: Path) -> None:
    """Adapters are a tree beside the parameters whose leaves lie below the path of a parameter."""
    parameters, depth = set(leaves), len(prefix)
    if not depth:  # then every leaf counts as a parameter, and adapters are reported as unknown leaves
        return
    beside = [key for key in keys if key[: depth - 1] == prefix[:-1] and key[:depth] != prefix]
    if adapters := [".".join(key) for key in beside if key[depth:-1] in parameters]:
        run = next((parent.parent for parent in path.parents if parent.name == "checkpoints"), "RUN")
        raise ValueError(
            f"{path} holds the base model and, beside it, {len(adapters)} leaves of LoRA adapters such as "
            f"{adapters[0]}; merge them with `python -m train.export {run} OUT` and read OUT"
        )
