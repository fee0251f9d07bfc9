"""`write_hf`: a parameter tree in memory -> a Hugging Face folder, the inverse of `load_params`."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsa_jax.checkpoint.files import sync_folder, sync_tree
from dsa_jax.checkpoint.hf_config import to_hf
from dsa_jax.checkpoint.hf_plan import DEFAULT_SHARD_BYTES, HfOptions, plan_hf
from dsa_jax.checkpoint.hf_writer import finish_folder, write_shards
from dsa_jax.checkpoint.names import leaf_shapes, tensor_table
from dsa_jax.checkpoint.pieces import Leaf, Piece, from_leaf
from dsa_jax.checkpoint.safetensors_file import DTYPES, TensorEntry
from dsa_jax.checkpoint.tensors import FLOATS
from dsa_jax.config import Fp8Config, ModelConfig
from dsa_jax.fp8.weight import Fp8Weight


def write_hf(
    path: str | os.PathLike[str],
    params: Mapping[str, Any],
    config: ModelConfig,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    quantize: str | None = None,
    mtp_copies: bool = True,
    carried: Iterable[str | os.PathLike[str]] = (),
) -> None:
    """Writes config.json and the weights; several shards and an index when they exceed max_shard_bytes.

    params: {"params": tree} as load_params returns it. quantize None stores every leaf in its own dtype;
    "fp8" stores what the release does: FP8 blocks (scales as config.fp8 says, ue8m0 by default), bfloat16 and
    float32. A tensor larger than max_shard_bytes gets a shard of its own. mtp_copies: whether an MTP layer that shares
    the model's embedding and head (config.mtp_shared_embeddings) gets copies of them, as in DeepSeek's release, or
    none, as in GLM-5's. carried: other files to copy, such as the tokenizer's. The folder appears when complete.
    Raises ValueError when path exists and is not an empty folder, and when params do not fit config.
    """
    path = Path(path)
    options = HfOptions(quantize=quantize, max_shard_bytes=max_shard_bytes)
    refuse_taken(path)
    tensors = ParamsTensors(path, params, config, mtp_copies=mtp_copies)
    fp8 = (config.fp8 or Fp8Config()) if quantize else None
    config_json = to_hf(dataclasses.replace(config, fp8=fp8))
    plan = plan_hf(tensors, config, {}, options)

    path.parent.mkdir(parents=True, exist_ok=True)
    # A sibling: a rename is atomic only within one file system.
    partial = path.parent / f".{path.name}.partial-{uuid.uuid4().hex}"
    partial.mkdir()
    try:
        for _ in write_shards(partial, tensors, plan, scale_fmt=fp8.scale_fmt if fp8 else None):
            pass
        finish_folder(partial, plan, config_json, map(Path, carried))
        sync_tree(partial)
        os.rename(partial, path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_taken(path: Path) -> None:
    """Raises ValueError for a path that exists and is not an empty folder."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path} exists and is not an empty folder; remove it or choose another path")


class ParamsTensors:
    """The leaves of a parameter tree as released tensors; see `tensors.Tensors`.

    path: the folder the tree is written to. mtp_copies: as in `write_hf`. Raises ValueError, which lists every leaf
    that is missing, unknown or of a wrong shape or dtype, when params do not fit config.
    """

    def __init__(
        self, path: Path, params: Mapping[str, Any], config: ModelConfig, *, mtp_copies: bool
    ) -> None:
        self.path = path
        self.faults: dict[str, list[str]] = {}
        self.unreadable: set[str] = set()
        self.bytes_read = 0
        self._leaves = _checked_leaves(params, config)
        self._rows = tensor_table(config)
        self.entries = {}
        for name, row in self._rows.items():
            if row.duplicate and not mtp_copies:
                continue
            dtype = self._leaves[row.path].dtype
            size = math.prod(row.shape) * dtype.itemsize
            self.entries[name] = TensorEntry(dtype=_FLOATS[dtype], shape=row.shape, begin=0, end=size)

    def read_rows(self, name: str, start: int, stop: int, columns: slice = slice(None)) -> np.ndarray:
        """Rows start..stop of the released tensor; see `tensors.Tensors`."""
        row = self._rows[name]
        piece = Piece(name=name, row=row, start=start, stop=stop)
        rows = from_leaf(self._leaves[row.path][piece.region], row)
        return rows[:, columns] if rows.ndim == 2 else rows


_FLOATS = {DTYPES[name]: name for name in FLOATS}


def _checked_leaves(params: Mapping[str, Any], config: ModelConfig) -> dict[Leaf, np.ndarray]:
    if set(params) != {"params"}:
        raise ValueError(f'params must be {{"params": tree}}, got the keys {sorted(params)}')
    leaves = _flatten(params["params"])
    expected = leaf_shapes(config)
    problems = [f"{'/'.join(leaf)} is missing" for leaf in expected if leaf not in leaves]
    problems += [f"{'/'.join(leaf)} is unknown" for leaf in leaves if leaf not in expected]
    for leaf, array in leaves.items():
        if leaf in expected and array.shape != expected[leaf]:
            problems.append(f"{'/'.join(leaf)} is {list(array.shape)}, expected {list(expected[leaf])}")
        if array.dtype not in _FLOATS:
            problems.append(f"{'/'.join(leaf)} is {array.dtype}, expected float32, float16 or bfloat16")
    if problems:
        raise ValueError("params do not fit config:\n  " + "\n  ".join(problems))
    return leaves


def _flatten(tree: Mapping[str, Any], above: Leaf = ()) -> dict[Leaf, np.ndarray]:
    leaves: dict[Leaf, np.ndarray] = {}
    for key, value in tree.items():
        leaf = (*above, key)
        if isinstance(value, Fp8Weight):
            raise ValueError(
                f"{'/'.join(leaf)} is kept in FP8, write_hf takes plain arrays: load without keep_fp8, or convert "
                "the checkpoint itself"
            )
        leaves |= _flatten(value, leaf) if isinstance(value, Mapping) else {leaf: np.asarray(value)}
    return leaves
