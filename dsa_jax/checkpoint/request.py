"""What a conversion is asked to do, as one value: the source, and what is made of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from dsa_jax.checkpoint import pieces
from dsa_jax.checkpoint.hf_plan import DEFAULT_SHARD_BYTES, HfOptions, HfPlan, plan_hf
from dsa_jax.checkpoint.open_checkpoint import Checkpoint, open_checkpoint
from dsa_jax.checkpoint.orbax_folder import METADATA_FILE, ORBAX_METADATA
from dsa_jax.checkpoint.orbax_plan import OrbaxPlan, plan_orbax
from dsa_jax.checkpoint.pieces import Form

Format = Literal["orbax", "hf"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """Fields as the arguments of `conversion.convert`. Equal requests of one source give the same bits."""

    source: Path
    format: Format | None = None
    dtype: Form | None = None
    quantize: str | None = None
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    add_indexer: bool = False
    config_file: Path | None = None
    ignore: tuple[str, ...] = ()

    def open(self, *, max_chunk_bytes: int | None = None) -> Checkpoint:
        """The source. Raises ValueError or FileNotFoundError for what is no checkpoint."""
        return open_checkpoint(
            self.source,
            config_file=self.config_file,
            ignore=self.ignore,
            add_indexer=self.add_indexer,
            max_chunk_bytes=max_chunk_bytes,
        )

    def target(self, checkpoint: Checkpoint) -> Format:
        """What is written: by default Hugging Face from Orbax, and Orbax from everything else.

        Raises ValueError for quantize with Orbax.
        """
        format = self.format or ("hf" if checkpoint.kind == "orbax" else "orbax")
        if self.quantize is not None and format != "hf":
            raise ValueError(
                'quantize is for writing the Hugging Face layout; to store FP8 in Orbax give dtype "fp8"'
            )
        return format

    def plan(self, checkpoint: Checkpoint) -> OrbaxPlan | HfPlan:
        """What would be written; reads no tensor. The checkpoint must have passed `tensors.check`."""
        if self.target(checkpoint) == "orbax":
            return plan_orbax(checkpoint.tensors, checkpoint.config, self.dtype)
        options = HfOptions(dtype=self.dtype, quantize=self.quantize, max_shard_bytes=self.max_shard_bytes)
        return plan_hf(checkpoint.tensors, checkpoint.config, checkpoint.carried.stored, options)

    def identity(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Everything that decides the bits written: a conversion is resumed only by one with the same identity."""
        format = self.target(checkpoint)
        return {
            "source": str(self.source),
            "fingerprint": _fingerprint(checkpoint),
            "format": format,
            "dtype": self.dtype,
            "quantize": self.quantize,
            "max_shard_bytes": self.max_shard_bytes if format == "hf" else None,
            "add_indexer": self.add_indexer,
            "piece_bytes": pieces.PIECE_BYTES,
        }


def _fingerprint(checkpoint: Checkpoint) -> str:
    """Changes when the source's tensors change, or the time its files were written."""
    entries = [[name, e.dtype, list(e.shape)] for name, e in sorted(checkpoint.tensors.entries.items())]
    path = checkpoint.tensors.path
    files = [*path.glob("*.safetensors"), path / METADATA_FILE, path / "config.json", path / ORBAX_METADATA]
    times = [
        [file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(files) if file.is_file()
    ]
    return hashlib.sha256(json.dumps([entries, times]).encode()).hexdigest()[:32]
