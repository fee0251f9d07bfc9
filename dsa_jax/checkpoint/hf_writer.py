"""Parameters -> Hugging Face checkpoint folder in the released layout, through the same table of names."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from dsa_jax.checkpoint.hf_config import to_hf
from dsa_jax.checkpoint.hf_reader import INDEX_FILE, SINGLE_FILE
from dsa_jax.checkpoint.names import SCALE_SUFFIX, TensorRow, leaf_shapes, scale_shape, tensor_table
from dsa_jax.config import Fp8Config, ModelConfig
from dsa_jax.fp8.blocks import quantize_blocks
from dsa_jax.fp8.weight import Fp8Weight

DEFAULT_SHARD_BYTES = 5_000_000_000
_DTYPES = {
    "FP8": np.dtype(ml_dtypes.float8_e4m3fn),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
}


def write_hf(
    path: str | Path,
    params: Mapping[str, Any],
    config: ModelConfig,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    quantize: str | None = None,
) -> None:
    """Writes config.json and the weights; several shards and an index when they exceed max_shard_bytes.

    params: {"params": tree} as load_params returns it. quantize None stores every leaf in its own dtype;
    "fp8" stores what the release does: FP8 blocks (scales as config.fp8 says, ue8m0 by default), bfloat16 and
    float32. A tensor larger than max_shard_bytes gets a shard of its own. The folder appears when complete.
    Raises ValueError when path exists and is not an empty folder, and when params do not fit config.
    """
    path = Path(path)
    if quantize not in (None, "fp8"):
        raise ValueError(f'quantize must be None or "fp8", got {quantize!r}')
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path} exists and is not an empty folder; remove it or choose another path")
    leaves = _checked_leaves(params, config)
    fp8 = (config.fp8 or Fp8Config()) if quantize else None
    values = to_hf(dataclasses.replace(config, fp8=fp8))
    shards = _plan_shards(tensor_table(config), leaves, fp8, max_shard_bytes)

    path.parent.mkdir(parents=True, exist_ok=True)
    # A sibling: a rename is atomic only within one file system.
    partial = path.parent / f".{path.name}.partial-{uuid.uuid4().hex}"
    partial.mkdir()
    try:
        (partial / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        weight_map: dict[str, str] = {}
        total = 0
        for number, shard in enumerate(shards, start=1):
            file_name = (
                f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else SINGLE_FILE
            )
            tensors: dict[str, np.ndarray] = {}
            for name, row in shard.items():
                tensors |= _stored(name, row, leaves[row.path], fp8)
            save_file(tensors, partial / file_name, metadata={"format": "pt"})
            # safetensors writes files that only their owner can read, whatever the umask.
            shutil.copymode(partial / "config.json", partial / file_name)
            weight_map |= dict.fromkeys(tensors, file_name)
            total += sum(tensor.nbytes for tensor in tensors.values())
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (partial / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        os.rename(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _checked_leaves(params: Mapping[str, Any], config: ModelConfig) -> dict[tuple[str, ...], np.ndarray]:
    if set(params) != {"params"}:
        raise ValueError(f'params must be {{"params": tree}}, got the keys {sorted(params)}')
    leaves = _flatten(params["params"])
    expected = leaf_shapes(config)
    problems = [f"{'/'.join(leaf)} is missing" for leaf in expected if leaf not in leaves]
    problems += [f"{'/'.join(leaf)} is unknown" for leaf in leaves if leaf not in expected]
    for leaf, array in leaves.items():
        if leaf in expected and array.shape != expected[leaf]:
            problems.append(f"{'/'.join(leaf)} is {list(array.shape)}, expected {list(expected[leaf])}")
        if array.dtype not in (np.dtype(np.float32), np.dtype(np.float16), _DTYPES["BF16"]):
            problems.append(f"{'/'.join(leaf)} is {array.dtype}, expected float32, float16 or bfloat16")
    if problems:
        raise ValueError("params do not fit config:\n  " + "\n  ".join(problems))
    return leaves


def _flatten(tree: Mapping[str, Any], above: tuple[str, ...] = ()) -> dict[tuple[str, ...], np.ndarray]:
    leaves: dict[tuple[str, ...], np.ndarray] = {}
    for key, value in tree.items():
        leaf = (*above, key)
        if isinstance(value, Fp8Weight):
            raise ValueError(
                f"{'/'.join(leaf)} is kept in FP8, write_hf takes plain arrays: load without keep_fp8, or convert "
                "the checkpoint itself"
            )
        leaves |= _flatten(value, leaf) if isinstance(value, Mapping) else {leaf: np.asarray(value)}
    return leaves


def _plan_shards(
    table: Mapping[str, TensorRow],
    leaves: Mapping[tuple[str, ...], np.ndarray],
    fp8: Fp8Config | None,
    max_shard_bytes: int,
) -> list[dict[str, TensorRow]]:
    """Rows in order of the table, a new shard whenever the next tensor and its scales do not fit."""
    shards: list[dict[str, TensorRow]] = [{}]
    used = 0
    for name, row in table.items():
        dtype = _DTYPES[row.stored] if fp8 else leaves[row.path].dtype
        size = int(np.prod(row.shape)) * dtype.itemsize
        if fp8 and row.quantized:
            size += int(np.prod(scale_shape(row.shape))) * 4
        if shards[-1] and used + size > max_shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = row
        used += size
    return shards


def _stored(name: str, row: TensorRow, leaf: np.ndarray, fp8: Fp8Config | None) -> dict[str, np.ndarray]:
    weight = leaf[row.index]
    weight = np.ascontiguousarray(weight.T if row.transpose else weight)
    if fp8 is None:
        return {name: weight}
    if not row.quantized:
        return {name: weight.astype(_DTYPES[row.stored])}
    values, scales = quantize_blocks(weight, scale_fmt=fp8.scale_fmt)
    return {name: np.ascontiguousarray(values), name + SCALE_SUFFIX: scales}
