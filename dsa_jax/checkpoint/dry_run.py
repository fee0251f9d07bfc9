"""`convert --dry-run`: what a conversion would do, from the headers alone."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from dsa_jax.checkpoint.hf_plan import HfPlan
from dsa_jax.checkpoint.names import SCALE_SUFFIX, TensorRow, tensor_table
from dsa_jax.checkpoint.request import Format, Request
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
        """Elements of all stored tensors, block scales included: the size that model pages state."""
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


def dry_run(request: Request) -> DryRun:
    """Reads config and headers and plans the conversion.

    Raises ValueError for a config that cannot be read and a folder without weights; all else is in `faults`.
    """
    checkpoint = request.open()
    faults = find_faults(checkpoint.tensors, checkpoint.config, read_scales=False)
    plan = None if faults else request.plan(checkpoint)
    table = tensor_table(checkpoint.config)
    target = request.target(checkpoint)
    return DryRun(
        path=checkpoint.tensors.path,
        config=checkpoint.config,
        tensors=checkpoint.tensors.entries,
        added=frozenset(checkpoint.added),
        faults=faults,
        format=target,
        targets=_targets(table, target, plan if isinstance(plan, HfPlan) else None),
        written_bytes=None if plan is None else plan.n_bytes,
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
            output.name: f"{output.dtype} in {file_name}"
            for file_name, shard in plan.files()
            for output in shard
        }
    return places | {name + SCALE_SUFFIX: place + " (scales)" for name, place in places.items()}
