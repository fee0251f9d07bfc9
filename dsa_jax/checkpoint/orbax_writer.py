"""Writes the arrays of an Orbax checkpoint piece by piece, in commits that can be undone."""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from dsa_jax.checkpoint.files import write_atomically
from dsa_jax.checkpoint.orbax_folder import MANIFEST, ORBAX_METADATA, ArraySpec, array_store
from dsa_jax.checkpoint.pieces import Leaf
from dsa_jax.unstable import ORBAX_HANDLER

_CHECKPOINT_METADATA = "_CHECKPOINT_METADATA"
_DATA = "d"


class OrbaxWriter:
    """Writes arrays piece by piece; every `commit` is one atomic step of the store.

    `restore` goes back to the `state` after any commit, whatever was written later and not recorded.
    When the disk is full, `files.disk_full` is true of the exception raised.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.resolve()
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
        self._arrays: dict[Leaf, ts.TensorStore] = {}

    def create(self, specs: Mapping[Leaf, ArraySpec]) -> None:
        """Creates the arrays, or opens those that exist."""
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
            "kvstore": array_store(self._path, ("params", *leaf)),
            # Chunks of zeros are stored: otherwise a lost chunk would read as zeros, unnoticed.
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
        # tensorstore cancels a write whose future is dropped: kept until the values are in the transaction.
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
        manifest = base64.b64encode((self._path / MANIFEST).read_bytes()).decode()
        return {"manifest": manifest, "files": sorted(files)}

    def restore(self, states: Iterable[dict[str, Any]]) -> set[str]:
        """Goes back to the last of these states and deletes what was written after it; returns its files."""
        known: set[str] = set()
        manifest = ""
        for state in states:
            known |= set(state["files"])
            manifest = state["manifest"]
        if manifest:
            write_atomically(self._path / MANIFEST, base64.b64decode(manifest))
        if (self._path / _DATA).is_dir():
            for name in set(os.listdir(self._path / _DATA)) - known:
                (self._path / _DATA / name).unlink()
        if not manifest:
            (self._path / MANIFEST).unlink(missing_ok=True)
        return known

    def finish(self, specs: Mapping[Leaf, ArraySpec]) -> None:
        """Writes the metadata by which Orbax recognises a checkpoint."""
        tree = {
            str(("params", *leaf)): {
                "key_metadata": [{"key": key, "key_type": 2} for key in ("params", *leaf)],
                # Plain arrays: Orbax restores them as NumPy, or on the devices of a target if it is given one.
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
        write_atomically(self._path / ORBAX_METADATA, json.dumps(metadata).encode())
        write_atomically(self._path / _CHECKPOINT_METADATA, json.dumps(checkpoint).encode())
