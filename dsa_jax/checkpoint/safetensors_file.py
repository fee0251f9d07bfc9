"""Reading one .safetensors file by byte range: a checked header, then only the rows asked for.

Layout (safetensors format): 8 bytes little-endian header length, a JSON header {name: {dtype, shape,
data_offsets}}, then the tensors' bytes without gaps. The safetensors package's NumPy framework cannot read
bfloat16 or FP8, and checks nothing before the data is touched; here every header error is a ValueError that
names the file and what to do.
"""

from __future__ import annotations

import json
import math
import os
import stat
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dsa_jax.checkpoint.files import refuse_lfs_pointer

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),  # 2^(e - 127): block scales
}
_MAX_HEADER_BYTES = 100_000_000
_MAX_AXES = 8
_SHORTEST_SEGMENT = 512
"""Columns are read row by row if they have at least this many bytes per row; below it, the calls cost more than whole
rows."""


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """What the header says of one tensor; begin and end are byte offsets in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self.end - self.begin


class SafetensorsFile:
    """One open file: `entries` (name -> TensorEntry), `metadata`, `read` and `read_rows`.

    bytes_read counts what was read of the tensors. Nothing is memory-mapped: mapped pages count as
    memory of the process until it ends. Raises ValueError for a file that is truncated or not a
    well-formed safetensors file, FileNotFoundError for one that is not there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.bytes_read = 0
        self._file = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        status = os.fstat(self._file)
        if not stat.S_ISREG(status.st_mode):
            raise _malformed(self.path, "it is no file")
        refuse_lfs_pointer(self.path)
        size = status.st_size
        if size < 8:
            raise _truncated(self.path, f"it has {size} bytes, fewer than the 8 of the header length")
        header_size = int.from_bytes(os.pread(self._file, 8, 0), "little")
        if header_size > _MAX_HEADER_BYTES:
            raise _malformed(self.path, f"its header length {header_size} is over {_MAX_HEADER_BYTES} bytes")
        if 8 + header_size > size:
            raise _truncated(self.path, f"its header ends at byte {8 + header_size}, the file at {size}")
        header = _parse_json(self.path, os.pread(self._file, header_size, 8))
        self.metadata, self.entries = _check_header(self.path, header, 8 + header_size, size)

    def read(self, name: str) -> np.ndarray:
        """The tensor as a read-only array. Raises KeyError for a name that is not in `entries`."""
        entry = self.entries[name]
        array = np.empty(entry.shape, DTYPES[entry.dtype])
        self._fill(array.reshape(-1), entry.begin)
        array.flags.writeable = False
        return array

    def read_rows(self, name: str, start: int, stop: int, columns: slice = slice(None)) -> np.ndarray:
        """Rows start..stop of the first axis, of a matrix also only these columns; reads no more than that.

        Raises KeyError for an unknown name, ValueError for rows outside the tensor.
        """
        entry = self.entries[name]
        if not (entry.shape and 0 <= start <= stop <= entry.shape[0]):
            raise ValueError(f"{name} of shape {list(entry.shape)} has no rows {start}..{stop}")
        dtype, row_shape = DTYPES[entry.dtype], entry.shape[1:]
        row_size = math.prod(row_shape) * dtype.itemsize
        first = entry.begin + start * row_size
        if len(row_shape) == 1:
            left, right, _ = columns.indices(row_shape[0])
            segment = (right - left) * dtype.itemsize
            if _SHORTEST_SEGMENT <= segment < row_size:
                array = np.empty((stop - start, right - left), dtype)
                for i in range(stop - start):
                    self._fill(array[i], first + i * row_size + left * dtype.itemsize)
                return array
        array = np.empty((stop - start, *row_shape), dtype)
        self._fill(array.reshape(-1), first)
        return array[:, columns] if len(row_shape) == 1 else array

    def _fill(self, array: np.ndarray, offset: int) -> None:
        buffer = memoryview(array.view(np.uint8)) if array.nbytes else memoryview(b"")
        done = 0
        while done < len(buffer):
            count = os.preadv(self._file, [buffer[done:]], offset + done)
            if count == 0:
                raise _truncated(self.path, f"it ends at byte {offset + done} while being read")
            done += count
        self.bytes_read += done


def _parse_json(path: Path, raw: bytes) -> dict[str, Any]:
    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys: dict[str, Any] = {}
        for key, value in pairs:
            if key in keys:
                raise ValueError(f"the key {_short(key)} occurs twice")
            keys[key] = value
        return keys

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise _malformed(path, f"its header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise _malformed(path, f"its header is a JSON {type(header).__name__}, not an object")
    return header


def _check_header(
    path: Path, header: dict[str, Any], data_begin: int, file_size: int
) -> tuple[dict[str, str], dict[str, TensorEntry]]:
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _malformed(path, "its __metadata__ is not an object of strings")
    entries = {name: _check_entry(path, name, entry, data_begin) for name, entry in header.items()}
    # In file order, each tensor must begin where the previous one ends: no overlap, no gap.
    expected = data_begin
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != expected:
            fault = "overlaps the tensor before it" if entry.begin < expected else "leaves a gap before it"
            raise _malformed(
                path, f"tensor {_short(name)} {fault} (begins at {entry.begin}, expected {expected})"
            )
        expected = entry.end
    if expected > file_size:
        raise _truncated(path, f"its tensors end at byte {expected}, the file at {file_size}")
    if expected < file_size:
        raise _malformed(path, f"{file_size - expected} bytes after its last tensor belong to no tensor")
    return metadata, entries


def _check_entry(path: Path, name: str, entry: Any, data_begin: int) -> TensorEntry:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _malformed(path, f"tensor {_short(name)} needs exactly the keys dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _malformed(
            path, f"tensor {_short(name)} has the unknown dtype {_short(dtype)} (known: {', '.join(DTYPES)})"
        )
    if not _is_sizes(shape) or len(shape) > _MAX_AXES:
        raise _malformed(
            path, f"tensor {_short(name)} has a shape that is not a list of at most {_MAX_AXES} sizes"
        )
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _malformed(path, f"tensor {_short(name)} has data_offsets that are not [begin, end]")
    size, stated = math.prod(shape) * DTYPES[dtype].itemsize, offsets[1] - offsets[0]
    if size != stated:
        raise _malformed(
            path, f"tensor {_short(name)} of {dtype} {shape} takes {size} bytes, its offsets give {stated}"
        )
    return TensorEntry(
        dtype=dtype, shape=tuple(shape), begin=data_begin + offsets[0], end=data_begin + offsets[1]
    )


def _is_sizes(value: Any) -> bool:
    # Below 2^63 so that later arithmetic, NumPy's and the messages' number formatting, stays in range.
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


def _truncated(path: Path, detail: str) -> ValueError:
    return ValueError(f"{path} is truncated: {detail}; re-download it")


def _malformed(path: Path, detail: str) -> ValueError:
    return ValueError(f"{path} is not a valid safetensors file: {detail}; re-download it or write it again")
