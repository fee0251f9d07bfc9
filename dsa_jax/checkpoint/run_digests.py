"""The digests in the training steps of a run, and `verify` of these steps, without the run's code or devices.

A step is a folder RUN/checkpoints/N of `train.checkpoint`. Its item "digests" has, for each array of the items "params"
and "opt_state", a digest that does not depend on the mesh (`leaf_digest`), and one for each of the JSON items.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorstore as ts

from dsa_jax.checkpoint.files import first_line, read_json_object
from dsa_jax.checkpoint.leaf_digest import PartialDigest
from dsa_jax.checkpoint.orbax_folder import ORBAX_METADATA, array_store

DIGESTS = "digests"
ARRAYS, JSONS = ("params", "opt_state"), ("data", "run")
FORMAT = 1
_CHECKPOINTS = "checkpoints"
_JSON_FILE = "metadata"


def json_digest(value: Any) -> str:
    """Of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def differing(stored: Mapping[str, Any], item: str, found: Mapping[str, str] | str) -> list[str]:
    """What of this item differs from the stored digests. found: its digests, by the name of the array or in all.

    Raises ValueError for digests that another version wrote, and for damaged ones.
    """
    if stored.get("format") != FORMAT:
        raise ValueError(f"its digests must have format {FORMAT}, got {stored.get('format')!r}")
    listed = stored.get(item)
    if item in JSONS:
        return [] if listed == found else [item]
    if not isinstance(listed, dict) or not isinstance(found, Mapping):
        raise ValueError(f"its digests lack {item}")
    return [_label(stored, item, name) for name in {**listed, **found} if listed.get(name) != found.get(name)]


def steps_of_run(path: Path) -> list[Path]:
    """The folders of the steps of a run, by its folder or that of one step; none if it is neither."""
    if path.name.isdecimal() and (path / ARRAYS[0] / ORBAX_METADATA).is_file():
        return [path]
    if not (path / _CHECKPOINTS).is_dir():
        return []
    steps = [step for step in (path / _CHECKPOINTS).iterdir() if step.name.isdecimal()]
    if not steps:
        raise ValueError(f"{path / _CHECKPOINTS} holds no checkpoint yet")
    return sorted(steps, key=lambda step: int(step.name))


class StepVerification:
    """Reads every array of the steps. faults: one sentence each; checked: whether every step has digests."""

    def __init__(self, steps: list[Path], on_progress: Callable[[int, int], None]) -> None:
        self.tensors = self.bytes_read = 0
        self.checked = True
        self.faults: list[str] = []
        self._on_progress = on_progress
        self._unreadable: set[tuple[Path, str]] = set()
        opened = [(step, *self._open(step)) for step in steps]
        self._total = sum(_n_bytes(array) for *_, arrays in opened for array in arrays.values())
        for step, stored, arrays in opened:
            self._verify(step, stored, arrays)

    def _open(self, step: Path) -> tuple[dict[str, Any] | None, dict[tuple[str, str], ts.TensorStore]]:
        """The stored digests, None if there are none, and the arrays that can be opened."""
        stored, arrays = None, {}
        try:
            if (step / DIGESTS).is_dir():
                stored = _read_json(step, DIGESTS)
        except (ValueError, OSError) as error:
            self._cannot_read(step, DIGESTS, error)
        for item in ARRAYS:
            try:
                names = _array_names(step / item)
            except (ValueError, OSError) as error:
                self._cannot_read(step, item, error)
                continue
            for name in names:
                try:
                    spec = {"driver": "zarr", "kvstore": array_store((step / item).resolve(), (name,))}
                    arrays[item, name] = ts.open(spec, open=True, context=_context()).result()
                except (ValueError, RuntimeError, OSError) as error:
                    self._cannot_read(step, _label(stored, item, name), error)
        return stored, arrays

    def _verify(
        self, step: Path, stored: dict[str, Any] | None, arrays: dict[tuple[str, str], ts.TensorStore]
    ) -> None:
        found: dict[str, Any] = {item: {} for item in ARRAYS if (step, item) not in self._unreadable}
        for (item, name), array in arrays.items():
            try:
                found[item][name] = self._digest(array)
            except (ValueError, RuntimeError, OSError, NotImplementedError) as error:
                self._cannot_read(step, _label(stored, item, name), error)
            self.tensors += 1
        if stored is None:
            self.checked = False
            return
        for item in JSONS:
            try:
                found[item] = json_digest(_read_json(step, item))
            except (ValueError, OSError) as error:
                self._cannot_read(step, item, error)
        for item, digests in found.items():
            try:
                wrong = differing(stored, item, digests)
            except ValueError as error:
                self._cannot_read(step, DIGESTS, error)
                return
            self.faults += [
                f"checkpoint of step {step.name}: {name} differs from its digest"
                for name in wrong
                if (step, name) not in self._unreadable
            ]

    def _digest(self, array: ts.TensorStore) -> str:
        partial = PartialDigest(array.shape, array.dtype.numpy_dtype)
        for start, region in _chunks(array):
            values = array[region].read().result()
            partial.add(values, start)
            self.bytes_read += values.nbytes
            self._on_progress(self.bytes_read, self._total)
        return partial.text()

    def _cannot_read(self, step: Path, what: str, error: Exception) -> None:
        self._unreadable.add((step, what))
        self.faults.append(f"checkpoint of step {step.name}: {what} cannot be read ({first_line(error)})")


def _read_json(step: Path, item: str) -> dict[str, Any]:
    return read_json_object(step / item / _JSON_FILE, "the step is damaged")


def _label(stored: Mapping[str, Any] | None, item: str, name: str) -> str:
    """The path of a leaf. Moments are stored under numbers, and the digests say what these stand for."""
    names = (stored or {}).get(f"{item}_names")
    if isinstance(names, dict) and name in names:
        return f"{item}.{names[name]}"
    return name if item == "params" else f"{item}.{name}"


def _array_names(item: Path) -> list[str]:
    """From Orbax's list, which restoring reads too. Raises ValueError where its files contradict each other."""
    metadata = read_json_object(item / ORBAX_METADATA, "the step is damaged")
    try:
        entries = list(metadata["tree_metadata"].values())
        keys = [part for entry in entries for part in entry["key_metadata"]]
        names = [".".join(part["key"] for part in entry["key_metadata"]) for entry in entries]
        tables = [entries, keys, [entry["value_metadata"] for entry in entries]]
        for file in (item / "array_metadatas").iterdir():
            described = [*read_json_object(file, "the step is damaged")["array_metadatas"]]
            tables += [described, described := [entry["array_metadata"] for entry in described]]
            if unknown := {entry["param_name"] for entry in described} - set(names):
                raise ValueError(f"{file} describes {unknown.pop()}, which is not in {item / ORBAX_METADATA}")
        # Orbax writes tables of equal rows: one with other keys is damaged.
        for table in filter(None, tables):
            kinds: list[set[Any]] = [
                {(key, type(value).__name__) for key, value in row.items()} for row in table
            ]
            if odd := set.union(*kinds) - set.intersection(*kinds):
                raise ValueError(f"its metadata are damaged at {sorted(odd)[0]}")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its metadata are damaged: {type(error).__name__} {error}") from error
    return names


def _chunks(array: ts.TensorStore) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """(first position, region) of each stored chunk: reading a part of a chunk decodes all of it."""
    sizes = array.chunk_layout.read_chunk.shape or array.shape
    starts = [range(0, length, size or length or 1) for length, size in zip(array.shape, sizes, strict=True)]
    for start in itertools.product(*starts):
        ends = (min(s + (n or m), m) for s, n, m in zip(start, sizes, array.shape, strict=True))
        yield start, tuple(map(slice, start, ends))


def _n_bytes(array: ts.TensorStore) -> int:
    return math.prod(array.shape) * array.dtype.numpy_dtype.itemsize


def _context() -> ts.Context:
    return ts.Context({"cache_pool": {"total_bytes_limit": 0}})
