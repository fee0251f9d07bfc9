"""A dense checkpoint (V3, V3.1) with indexers added, from which to train DeepSeek Sparse Attention."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dsa_jax.checkpoint.names import tensor_table
from dsa_jax.checkpoint.safetensors_file import DTYPES, TensorEntry
from dsa_jax.checkpoint.tensors import Tensors
from dsa_jax.config import ModelConfig

V32_INDEXER: dict[str, Any] = {"index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048}
"""config.json keys of an indexer, with the sizes of V3.2."""


def add_indexer_keys(values: dict[str, Any]) -> dict[str, Any]:
    """config.json of a dense model -> that of the same model with an indexer in every layer.

    Indexer keys that it already has are kept. Of the model type glm_moe_dsa, they may say that layers share one.
    """
    if values.get("model_type") == "glm_moe_dsa":
        return V32_INDEXER | values
    return V32_INDEXER | values | {
        "model_type": "deepseek_v32",
        "architectures": ["DeepseekV32ForCausalLM"],
    }  # fmt: skip


class FreshIndexer:
    """The tensors of another checkpoint, and fresh ones for its missing indexers; see `tensors.Tensors`.

    Weights are normal with config.init_std, drawn from the seed and their name; k_norm starts as the
    identity. `added` lists their names. Raises ValueError when the checkpoint has any indexer tensor.
    """

    def __init__(self, tensors: Tensors, config: ModelConfig, *, seed: int = 0) -> None:
        self._tensors = tensors
        self._config = config
        self._seed = seed
        self._drawn: tuple[str, np.ndarray] | None = None
        expected = {name: row for name, row in tensor_table(config).items() if ".indexer." in name}
        present = [name for name in tensors.entries if ".indexer." in name]
        if present:
            raise ValueError(
                f"{tensors.path} already has {len(present)} indexer tensors ({present[0]}, ...); convert it "
                "without --add-indexer"
            )
        self.added = tuple(expected)
        self.entries = dict(tensors.entries)
        for name, row in expected.items():
            dtype = "F32" if row.stored == "F32" else "BF16"
            size = int(np.prod(row.shape)) * DTYPES[dtype].itemsize
            self.entries[name] = TensorEntry(dtype=dtype, shape=row.shape, begin=0, end=size)

    @property
    def path(self) -> Path:
        return self._tensors.path

    @property
    def faults(self) -> dict[str, list[str]]:
        return self._tensors.faults

    @property
    def unreadable(self) -> set[str]:
        return self._tensors.unreadable

    @property
    def bytes_read(self) -> int:
        return self._tensors.bytes_read

    def read_rows(self, name: str, start: int, stop: int, columns: slice = slice(None)) -> np.ndarray:
        """Rows start..stop of a stored or a fresh tensor."""
        if name in self._tensors.entries:
            return self._tensors.read_rows(name, start, stop, columns)
        drawn = self._drawn
        if drawn is None or drawn[0] != name:
            drawn = self._drawn = (name, self._draw(name))
        rows = drawn[1][start:stop]
        return rows[:, columns] if rows.ndim == 2 else rows

    def _draw(self, name: str) -> np.ndarray:
        entry = self.entries[name]
        if name.endswith("k_norm.weight"):
            return np.ones(entry.shape, np.float32)
        if name.endswith("k_norm.bias"):
            return np.zeros(entry.shape, np.float32)
        key = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()[:8]
        generator = np.random.Generator(np.random.PCG64(int.from_bytes(key, "little")))
        normal = generator.standard_normal(entry.shape, np.float32)
        return (normal * np.float32(self._config.init_std)).astype(ml_dtypes.bfloat16)
