"""`convert`: one checkpoint layout into another, in little memory, resumable."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from dsa_jax.checkpoint import pieces
from dsa_jax.checkpoint.hf_stream import HfPlan, plan_hf, write_hf_folder
from dsa_jax.checkpoint.hf_writer import DEFAULT_SHARD_BYTES
from dsa_jax.checkpoint.job import Job, refuse_incomplete
from dsa_jax.checkpoint.open_checkpoint import Checkpoint, open_checkpoint
from dsa_jax.checkpoint.orbax_folder import METADATA_FILE, disk_full
from dsa_jax.checkpoint.orbax_stream import OrbaxPlan, plan_orbax, write_orbax
from dsa_jax.checkpoint.pieces import PIECE_BYTES, Form
from dsa_jax.checkpoint.tensors import check

Format = Literal["orbax", "hf"]
DEFAULT_MEMORY = 4 << 30
SMALLEST_MEMORY = 1 << 30
_PROGRAM_BYTES = 512 << 20
"""What Python with JAX and tensorstore takes before any tensor is read."""
_LARGEST_BATCH = 512 << 20
_SCRATCH_BYTES = 4 * PIECE_BYTES
"""Of a piece in the making: FP8 as read, as float32, rounded and transposed."""
_MOST_WORKERS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a conversion wrote. bytes_written counts this run alone, added the tensors that are fresh."""

    format: Format
    total_bytes: int
    bytes_written: int
    bytes_read: int
    resumed: bool
    added: tuple[str, ...]


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    format: Format | None = None,
    dtype: Form | None = None,
    quantize: str | None = None,
    max_memory: int = DEFAULT_MEMORY,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    add_indexer: bool = False,
    config_file: str | Path | None = None,
    ignore: Iterable[str] = (),
    command: list[str] | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Outcome:
    """Converts a Hugging Face or DeepSeek folder into an Orbax checkpoint, and an Orbax checkpoint into HF.

    format: what to write when that is not meant. dtype None keeps every tensor's type, FP8 with its block
    scales included; "fp8", "bfloat16", "float32" order one. quantize "fp8" (to HF) writes the released
    layout: e4m3 values and float32 scales of 128 x 128 blocks. max_memory: bytes the process may take.
    on_progress(bytes done, bytes in all). command: how to repeat this, for messages.

    An interrupted conversion is resumed by the same call; until it is done `destination` is refused by
    every reader. Raises ValueError for a bad source (all faults in one message), a taken destination or a
    resumed conversion that differs, OSError when the disk is too small or full.
    """
    source, destination = Path(source).resolve(), Path(destination).resolve()
    if max_memory < SMALLEST_MEMORY:
        raise ValueError(f"max_memory must be at least {SMALLEST_MEMORY:,} bytes (1 GiB), got {max_memory:,}")
    if destination == source or source in destination.parents:
        raise ValueError(f"the destination {destination} must not be the source or lie inside it")
    refuse_incomplete(source)
    checkpoint = open_checkpoint(
        source,
        config_file=None if config_file is None else Path(config_file),
        ignore=ignore,
        add_indexer=add_indexer,
        max_chunk_bytes=max_memory // 4,
    )
    written = format or ("hf" if checkpoint.kind == "orbax" else "orbax")
    if quantize is not None and written != "hf":
        raise ValueError(
            'quantize is for writing the Hugging Face layout; to hold FP8 in Orbax give dtype "fp8"'
        )
    check(checkpoint.tensors, checkpoint.config)
    plan = make_plan(checkpoint, written, dtype=dtype, quantize=quantize, max_shard_bytes=max_shard_bytes)
    request: dict[str, Any] = {
        "source": str(source),
        "fingerprint": _fingerprint(checkpoint),
        "format": written,
        "dtype": dtype,
        "quantize": quantize,
        "max_shard_bytes": max_shard_bytes if written == "hf" else None,
        "add_indexer": add_indexer,
        "piece_bytes": pieces.PIECE_BYTES,
    }
    repeat = command or ["dsa-jax", "convert", str(source), str(destination)]
    with Job(destination, request, repeat) as job:
        begun = _bytes_of(plan, job.steps)
        _check_space(destination, plan.n_bytes - begun)
        done = begun

        def on_bytes(count: int) -> None:
            nonlocal done
            done += count
            on_progress(done, plan.n_bytes)

        on_progress(done, plan.n_bytes)
        try:
            if isinstance(plan, OrbaxPlan):
                write_orbax(
                    job, checkpoint.tensors, checkpoint.config, plan, checkpoint.carried,
                    batch_bytes=min((max_memory - _PROGRAM_BYTES) // 4, _LARGEST_BATCH),
                    workers=_workers(max_memory), on_bytes=on_bytes,
                )  # fmt: skip
            else:
                write_hf_folder(
                    job, checkpoint.tensors, checkpoint.config, plan, checkpoint.carried, on_bytes=on_bytes
                )
        except OSError as error:
            if not disk_full(error) or "same command" in str(error):
                raise
            raise OSError(
                f"no space left on the disk of {destination}; free some and run the same command again, "
                "it resumes"
            ) from error
        job.finish()
        return Outcome(
            format=written,
            total_bytes=plan.n_bytes,
            bytes_written=plan.n_bytes - begun,
            bytes_read=checkpoint.tensors.bytes_read,
            resumed=job.resumed,
            added=checkpoint.added,
        )


def make_plan(
    checkpoint: Checkpoint,
    format: Format,
    *,
    dtype: Form | None,
    quantize: str | None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> OrbaxPlan | HfPlan:
    """What a conversion would write; reads no tensor."""
    if format == "orbax":
        return plan_orbax(checkpoint.tensors, checkpoint.config, dtype)
    return plan_hf(
        checkpoint.tensors,
        checkpoint.config,
        checkpoint.carried,
        dtype=dtype,
        quantize=quantize,
        max_shard_bytes=max_shard_bytes,
    )


def _workers(max_memory: int) -> int:
    """Threads that read and transpose: as many as there are cores and a third of the memory has room for."""
    room = (max_memory - _PROGRAM_BYTES) // 3 // _SCRATCH_BYTES
    return max(1, min(os.cpu_count() or 1, room, _MOST_WORKERS))


def _bytes_of(plan: OrbaxPlan | HfPlan, steps: list[dict[str, Any]]) -> int:
    if isinstance(plan, HfPlan):
        sizes = {
            plan.file_name(i): sum(output.n_bytes for output in shard) for i, shard in enumerate(plan.shards)
        }
        return sum(sizes[step["shard"]] for step in steps)
    finished = {(name, start) for step in steps for name, start, *_ in step["pieces"]}
    return sum(plan.piece_bytes(piece) for piece in plan.pieces() if (piece.name, piece.start) in finished)


def _fingerprint(checkpoint: Checkpoint) -> str:
    """Changes when the source's tensors, or the time its files were written, do."""
    entries = [[name, e.dtype, list(e.shape)] for name, e in sorted(checkpoint.tensors.entries.items())]
    path = checkpoint.tensors.path
    files = [*path.glob("*.safetensors"), path / METADATA_FILE, path / "config.json", path / "_METADATA"]
    times = [
        [file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(files) if file.is_file()
    ]
    return hashlib.sha256(json.dumps([entries, times]).encode()).hexdigest()[:32]


def _check_space(destination: Path, needed: int) -> None:
    free = shutil.disk_usage(destination).free
    if free < needed:
        raise OSError(
            f"the disk of {destination} has {free:,} bytes free and {needed:,} are still to be written; free "
            "some and run the same command again, or choose another disk"
        )
