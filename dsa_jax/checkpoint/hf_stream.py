"""Tensors -> Hugging Face folder, shard by shard."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from dsa_jax.checkpoint import pieces
from dsa_jax.checkpoint.files import sync_folder, write_atomically
from dsa_jax.checkpoint.hf_config import to_hf
from dsa_jax.checkpoint.hf_reader import INDEX_FILE, SINGLE_FILE
from dsa_jax.checkpoint.job import Job
from dsa_jax.checkpoint.names import SCALE_SUFFIX, TensorRow, scale_shape, tensor_table
from dsa_jax.checkpoint.orbax_folder import TENSORS_FILE
from dsa_jax.checkpoint.pieces import Form, Piece, cut, digest, read_piece
from dsa_jax.checkpoint.safetensors_file import DTYPES
from dsa_jax.checkpoint.tensors import FP8, Carried, Tensors
from dsa_jax.config import Fp8Config, ModelConfig

_FORMS: dict[str, Form] = {FP8: "fp8", "BF16": "bfloat16", "F16": "bfloat16", "F32": "float32"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """One released weight to write; an FP8 one is followed by its scales."""

    name: str
    row: TensorRow
    dtype: str

    @property
    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name in the file -> (dtype, shape)."""
        own = {self.name: (self.dtype, self.row.shape)}
        if self.dtype == FP8:
            own[self.name + SCALE_SUFFIX] = ("F32", scale_shape(self.row.shape))
        return own

    @property
    def n_bytes(self) -> int:
        """Bytes in the file, scales included."""
        return sum(math.prod(shape) * DTYPES[dtype].itemsize for dtype, shape in self.tensors.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class HfPlan:
    """The shards, in order."""

    shards: tuple[tuple[Output, ...], ...]

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(output.n_bytes for shard in self.shards for output in shard)

    def file_name(self, number: int) -> str:
        """Name of shard `number`, counted from 0."""
        if len(self.shards) == 1:
            return SINGLE_FILE
        return f"model-{number + 1:05d}-of-{len(self.shards):05d}.safetensors"


def plan_hf(
    tensors: Tensors,
    config: ModelConfig,
    carried: Carried,
    *,
    dtype: Form | None,
    quantize: str | None,
    max_shard_bytes: int,
) -> HfPlan:
    """Which tensor goes where and in which dtype.

    quantize "fp8" is the release: FP8 with scales, bfloat16 and float32, whatever the source. Otherwise dtype
    None keeps FP8 as it is and the rest as the first converted checkpoint had it, and "bfloat16" or
    "float32" are ordered for all but the float32 tensors of the release. A new shard begins when the next
    tensor does not fit.
    """
    if quantize not in (None, "fp8"):
        raise ValueError(f'quantize must be None or "fp8", got {quantize!r}')
    if quantize and dtype not in (None, "fp8"):
        raise ValueError(f'quantize="fp8" decides the dtypes, so dtype must be None, got {dtype!r}')
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
    shards: list[list[Output]] = [[]]
    used = 0
    for name, row in tensor_table(config).items():
        if name not in tensors.entries:
            continue
        first = carried.stored.get(name)
        if quantize or dtype == "fp8":
            chosen = FP8 if row.quantized else first if first in ("BF16", "F32") else row.stored
        elif dtype is not None:
            chosen = "F32" if dtype == "float32" or row.stored == "F32" else "BF16"
        else:
            entry = tensors.entries[name].dtype
            # A BF16 weight held as float32 goes back to BF16; an FP8 one that was dequantised stays so.
            chosen = first if first not in (None, FP8) and entry != FP8 else entry
        output = Output(name=name, row=row, dtype=str(chosen))
        if shards[-1] and used + output.n_bytes > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(output)
        used += output.n_bytes
    return HfPlan(shards=tuple(tuple(shard) for shard in shards))


def write_hf_folder(
    job: Job,
    tensors: Tensors,
    config: ModelConfig,
    plan: HfPlan,
    carried: Carried,
    *,
    on_bytes: Callable[[int], None],
) -> None:
    """Fills job.path with config.json, shards, index and the carried files, from where an earlier run stopped.

    Two pieces are in memory at a time. Raises OSError when the disk is full; the job can then be resumed.
    """
    digests: dict[str, list[str]] = {}
    finished = set()
    for step in job.steps:
        finished.add(step["shard"])
        digests |= step["sha256"]
    scale_fmt = config.fp8.scale_fmt if config.fp8 else "ue8m0"
    with ThreadPoolExecutor(1) as pool:
        for number, shard in enumerate(plan.shards):
            file_name = plan.file_name(number)
            if file_name in finished:
                continue
            partial = job.path / (file_name + ".partial")
            with partial.open("wb") as stream:
                stream.write(_header(shard))
                found: dict[str, list[str]] = {}
                for output in shard:
                    found |= _write_tensor(stream, tensors, output, scale_fmt, pool, on_bytes)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(partial, job.path / file_name)
            sync_folder(job.path)
            job.record({"shard": file_name, "sha256": found})
            digests |= found
    _write_rest(job.path, config, plan, carried, digests)


def _header(shard: tuple[Output, ...]) -> bytes:
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


def _write_tensor(
    stream: BinaryIO,
    tensors: Tensors,
    output: Output,
    scale_fmt: str | None,
    pool: ThreadPoolExecutor,
    on_bytes: Callable[[int], None],
) -> dict[str, list[str]]:
    """Writes values, then scales; returns the digests of the pieces of both."""
    found: dict[str, list[str]] = {name: [] for name in output.tensors}
    all_scales = []
    for values, scales in _read_ahead(tensors, output, scale_fmt, pool):
        _write_array(stream, values)
        found[output.name].append(digest(values))
        on_bytes(values.nbytes)
        if scales is not None:
            all_scales.append(scales)
    if all_scales:
        scales = np.concatenate(all_scales)
        _write_array(stream, scales)
        found[output.name + SCALE_SUFFIX].append(digest(scales))
        on_bytes(scales.nbytes)
    return found


def _read_ahead(
    tensors: Tensors, output: Output, scale_fmt: str | None, pool: ThreadPoolExecutor
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """The pieces in order, the next one read while the caller writes this one."""

    def read(piece: Piece) -> tuple[np.ndarray, np.ndarray | None]:
        return read_piece(tensors, piece, output.dtype, scale_fmt=scale_fmt)

    pieces = cut(output.name, output.row, _FORMS[output.dtype])
    future = pool.submit(read, next(pieces))
    for piece in pieces:
        ready, future = future, pool.submit(read, piece)
        yield ready.result()
    yield future.result()


def _write_array(stream: BinaryIO, array: np.ndarray) -> None:
    stream.write(memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8)))


def _write_rest(
    path: Path, config: ModelConfig, plan: HfPlan, carried: Carried, digests: Mapping[str, list[str]]
) -> None:
    for file in carried.files:
        shutil.copyfile(file, path / file.name)
    listed = {}
    weight_map = {}
    for number, shard in enumerate(plan.shards):
        for output in shard:
            for name, (dtype, _) in output.tensors.items():
                listed[name] = {"source": dtype, "sha256": digests[name]}
                weight_map[name] = plan.file_name(number)
    write_atomically(
        path / TENSORS_FILE,
        json.dumps({"piece_bytes": pieces.PIECE_BYTES, "tensors": listed}, indent=0).encode(),
    )
    if len(plan.shards) > 1:
        index = {"metadata": {"total_size": plan.n_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_atomically(path / INDEX_FILE, json.dumps(index, indent=2).encode() + b"\n")
    config_json = _config_json(config, plan, carried)
    write_atomically(path / "config.json", json.dumps(config_json, indent=2).encode() + b"\n")


def _config_json(config: ModelConfig, plan: HfPlan, carried: Carried) -> dict[str, Any]:
    dtypes = {output.dtype for shard in plan.shards for output in shard if output.row.quantized}
    fp8 = (config.fp8 or Fp8Config()) if FP8 in dtypes else None
    param_dtype: Literal["bfloat16", "float32"] = "float32" if dtypes == {"F32"} else "bfloat16"
    made = to_hf(dataclasses.replace(config, fp8=fp8, param_dtype=param_dtype))
    if carried.hf_config is None:
        return made
    values = dict(carried.hf_config)
    if fp8 is None:
        values.pop("quantization_config", None)
        values |= {key: param_dtype for key in ("torch_dtype", "dtype") if key in values}
    elif not values.get("quantization_config"):
        values["quantization_config"] = made["quantization_config"]
    return values
