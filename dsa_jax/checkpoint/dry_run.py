"""`convert --dry-run`: what a conversion would do, from the headers alone."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from dsa_jax.checkpoint.conversion import Format, make_plan
from dsa_jax.checkpoint.hf_stream import HfPlan
from dsa_jax.checkpoint.hf_writer import DEFAULT_SHARD_BYTES
from dsa_jax.checkpoint.names import SCALE_SUFFIX, TensorRow, tensor_table
from dsa_jax.checkpoint.open_checkpoint import open_checkpoint
from dsa_jax.checkpoint.pieces import Form
from dsa_jax.checkpoint.safetensors_file import TensorEntry
from dsa_jax.checkpoint.tensors import describe_fault, find_faults
from dsa_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DryRun:
    """tensors: name -> what the header says; faults: everything wrong; written_bytes: None when there are any."""

    path: Path
    config: ModelConfig
    tensors: Mapping[str, TensorEntry]
    added: frozenset[str]
    faults: Mapping[str, list[str]]
    format: Format
    targets: Mapping[str, str]
    written_bytes: int | None

    @property
    def elements(self) -> int:
        """Elements of all stored tensors, block scales included: what a model page states as its size."""
        return sum(math.prod(entry.shape) for entry in self.tensors.values())

    def lines(self) -> Iterator[str]:
        """The report: one line per tensor, counts and bytes per dtype, the faults."""
        width = max((len(name) for name in self.tensors), default=0)
        for name, entry in self.tensors.items():
            shape = "[" + ", ".join(map(str, entry.shape)) + "]"
            fresh = "  FRESH" if name in self.added else ""
            target = self.targets.get(name, "(unknown)")
            yield f"{name:{width}}  {shape:16}  {entry.dtype:8}  -> {target}{fresh}"
        yield ""
        for dtype, count in sorted(Counter(entry.dtype for entry in self.tensors.values()).items()):
            found = [entry for entry in self.tensors.values() if entry.dtype == dtype]
            elements = sum(math.prod(entry.shape) for entry in found)
            size = sum(entry.size for entry in found)
            yield f"{dtype:8} {count:>8,} tensors {elements:>19,} elements {size:>19,} bytes"
        total = sum(entry.size for entry in self.tensors.values())
        yield f"{'all':8} {len(self.tensors):>8,} tensors {self.elements:>19,} elements {total:>19,} bytes"
        yield f"parameters without block scales: {self.config.param_count():,}"
        if self.written_bytes is not None:
            yield f"to be written as {self.format}: {self.written_bytes:,} bytes of tensors"
        for kind, names in self.faults.items():
            yield "problem: " + describe_fault(kind, names)
        if not self.faults:
            yield "no problems in the headers"


def dry_run(
    path: str | Path,
    *,
    format: Format | None = None,
    dtype: Form | None = None,
    quantize: str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    add_indexer: bool = False,
    config_file: str | Path | None = None,
    ignore: Iterable[str] = (),
) -> DryRun:
    """Reads config and headers and plans the conversion; arguments as in `convert`.

    Raises ValueError for a config that cannot be read and a folder without weights; all else is in `faults`.
    """
    checkpoint = open_checkpoint(
        Path(path).resolve(),
        config_file=None if config_file is None else Path(config_file),
        ignore=ignore,
        add_indexer=add_indexer,
    )
    faults = find_faults(checkpoint.tensors, checkpoint.config, read_scales=False)
    written: Format = format or ("hf" if checkpoint.kind == "orbax" else "orbax")
    targets = _targets(tensor_table(checkpoint.config), written, None)
    written_bytes = None
    if not faults:
        plan = make_plan(checkpoint, written, dtype=dtype, quantize=quantize, max_shard_bytes=max_shard_bytes)
        written_bytes = plan.n_bytes
        if isinstance(plan, HfPlan):
            targets = _targets(tensor_table(checkpoint.config), written, plan)
    return DryRun(
        path=checkpoint.tensors.path,
        config=checkpoint.config,
        tensors=checkpoint.tensors.entries,
        added=frozenset(checkpoint.added),
        faults=faults,
        format=written,
        targets=targets,
        written_bytes=written_bytes,
    )


def _targets(table: Mapping[str, TensorRow], format: Format, plan: HfPlan | None) -> dict[str, str]:
    """Name -> path and index in the tree, or the file of the plan."""
    if format == "orbax":
        places = {
            name: "/".join(row.path) + (str(list(row.index)) if row.index else "")
            for name, row in table.items()
        }
    elif plan is None:
        places = dict.fromkeys(table, "safetensors")
    else:
        places = {
            output.name: f"{output.dtype} in {plan.file_name(i)}"
            for i, shard in enumerate(plan.shards)
            for output in shard
        }
    return places | {name + SCALE_SUFFIX: place + " (scales)" for name, place in places.items()}
