"""The one writer of Hugging Face folders: any `Tensors`, shard by shard, a few pieces in memory at a time.

`save.write_hf` gives it a parameter tree, `convert_to_hf` another checkpoint. The tensors of a shard follow
the table of names, so that a layer is one range of the file.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dsa_jax.checkpoint.files import sync_folder, write_atomically
from dsa_jax.checkpoint.hf_plan import HfPlan, Output, Shard
from dsa_jax.checkpoint.hf_reader import INDEX_FILE
from dsa_jax.checkpoint.names import SCALE_SUFFIX
from dsa_jax.checkpoint.pieces import FORM_OF_DTYPE, Piece, cut, read_finite_piece
from dsa_jax.checkpoint.safetensors_file import DTYPES
from dsa_jax.checkpoint.tensors import Tensors

OnArray = Callable[[str, np.ndarray], None]
Pieces = Iterator[tuple[np.ndarray, np.ndarray | None]]


def write_shards(
    path: Path,
    tensors: Tensors,
    plan: HfPlan,
    *,
    scale_fmt: str | None,
    finished: Collection[str] = (),
    on_array: OnArray = lambda name, array: None,
) -> Iterator[str]:
    """Writes the shards of the plan into the folder; yields the name of each once it is safely on disk.

    scale_fmt: format of the scales of weights that are quantised on the way. finished: shards that are
    already there. on_array(name, part of that tensor) is called for everything written, in order of the file.
    Two pieces are in memory at a time. Raises OSError when the disk is full, and ValueError for weights that
    cannot be quantised; the shard in progress then has another name, `*.partial`.
    """
    with ThreadPoolExecutor(1) as pool:
        for file_name, shard in plan.files():
            if file_name in finished:
                continue
            partial = path / (file_name + ".partial")
            with partial.open("wb") as stream:
                stream.write(_header(shard))
                for output in shard:
                    _write_tensor(stream, output, _read_ahead(tensors, output, scale_fmt, pool), on_array)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(partial, path / file_name)
            sync_folder(path)
            yield file_name


def finish_folder(
    path: Path, plan: HfPlan, config_json: Mapping[str, Any], carried: Iterable[Path] = ()
) -> None:
    """Adds what the shards need: the index, if there are several, config.json, and copies of other files."""
    for file in carried:
        shutil.copyfile(file, path / file.name)
    if len(plan.shards) > 1:
        weight_map = {
            name: file_name
            for file_name, shard in plan.files()
            for output in shard
            for name in output.tensors
        }
        index = {"metadata": {"total_size": plan.n_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_atomically(path / INDEX_FILE, json.dumps(index, indent=2).encode() + b"\n")
    write_atomically(path / "config.json", json.dumps(config_json, indent=2).encode() + b"\n")


def _header(shard: Shard) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for output in shard:
        for name, (dtype, shape) in output.tensors.items():
            size = math.prod(shape) * DTYPES[dtype].itemsize
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
    raw = json.dumps(header, separators=(",", ":")).encode()
    # Padded with spaces so that the first tensor is aligned.
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _write_tensor(stream: BinaryIO, output: Output, pieces: Pieces, on_array: OnArray) -> None:
    """Writes the values piece by piece, then all scales."""
    all_scales = []
    for values, scales in pieces:
        _write_array(stream, values)
        on_array(output.name, values)
        if scales is not None:
            all_scales.append(scales)
    if all_scales:
        scales = np.concatenate(all_scales).astype(DTYPES[output.scale_dtype], copy=False)
        _write_array(stream, scales)
        on_array(output.name + SCALE_SUFFIX, scales)


def _read_ahead(tensors: Tensors, output: Output, scale_fmt: str | None, pool: ThreadPoolExecutor) -> Pieces:
    """The pieces in order, the next one read while the caller writes this one."""

    def read(piece: Piece) -> tuple[np.ndarray, np.ndarray | None]:
        return read_finite_piece(tensors, piece, output.dtype, scale_fmt=scale_fmt)

    pieces = cut(output.name, output.row, FORM_OF_DTYPE[output.dtype])
    future = pool.submit(read, next(pieces))
    for piece in pieces:
        ready, future = future, pool.submit(read, piece)
        yield ready.result()
    yield future.result()


def _write_array(stream: BinaryIO, array: np.ndarray) -> None:
    stream.write(memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8)))
