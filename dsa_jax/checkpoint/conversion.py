"""`convert`: one checkpoint layout into another, in little memory, resumable."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dsa_jax.checkpoint.convert_to_hf import write_hf_folder
from dsa_jax.checkpoint.convert_to_orbax import write_orbax
from dsa_jax.checkpoint.files import disk_full
from dsa_jax.checkpoint.hf_plan import DEFAULT_SHARD_BYTES, HfPlan
from dsa_jax.checkpoint.job import Job, refuse_incomplete
from dsa_jax.checkpoint.open_checkpoint import Checkpoint
from dsa_jax.checkpoint.orbax_plan import OrbaxPlan
from dsa_jax.checkpoint.pieces import PIECE_BYTES, Form
from dsa_jax.checkpoint.request import Format, Request
from dsa_jax.checkpoint.tensors import check

DEFAULT_MEMORY = 4 << 30
SMALLEST_MEMORY = 1 << 30
_PROGRAM_BYTES = 512 << 20
"""What Python with JAX and tensorstore takes before any tensor is read."""
_LARGEST_BATCH = 512 << 20
_SCRATCH_BYTES = 4 * PIECE_BYTES
"""What a thread needs to make one piece: FP8 as read, as float32, rounded and transposed."""
_MOST_WORKERS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a conversion wrote. bytes_written: by this run alone. added: names of the tensors that are fresh."""

    format: Format
    total_bytes: int
    bytes_written: int
    bytes_read: int
    resumed: bool
    added: tuple[str, ...]


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    format: Format | None = None,
    dtype: Form | None = None,
    quantize: str | None = None,
    max_memory: int = DEFAULT_MEMORY,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    add_indexer: bool = False,
    config_file: str | os.PathLike[str] | None = None,
    ignore: Iterable[str] = (),
    command: list[str] | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Outcome:
    """Converts a Hugging Face or DeepSeek folder into an Orbax checkpoint, and an Orbax checkpoint into HF.

    format: what to write, when it is not that. dtype None keeps every tensor's type, FP8 with its block scales
    included; "fp8", "bfloat16" and "float32" set one. quantize "fp8" (to HF) writes the released layout: e4m3
    values and float32 scales of 128 x 128 blocks. max_memory: bytes the process may take. add_indexer: give a
    dense V3 or V3.1 fresh indexers. config_file and ignore: as in `load_config`. on_progress(bytes done, bytes
    in all). command: how to repeat this, for messages.

    An interrupted conversion is resumed by the same call; until it is complete every reader refuses
    `destination`. Raises ValueError for a bad source (all faults in one message), a taken destination or a
    resumed conversion that differs, OSError when the disk is too small or full.
    """
    request = Request(
        source=Path(source).resolve(),
        format=format,
        dtype=dtype,
        quantize=quantize,
        max_shard_bytes=max_shard_bytes,
        add_indexer=add_indexer,
        config_file=None if config_file is None else Path(config_file),
        ignore=tuple(ignore),
    )
    destination = Path(destination).resolve()
    repeat = command or ["dsa-jax", "convert", str(request.source), str(destination)]
    return _run(request, destination, max_memory, repeat, on_progress)


def _run(
    request: Request,
    destination: Path,
    max_memory: int,
    repeat: list[str],
    on_progress: Callable[[int, int], None],
) -> Outcome:
    _refuse_memory_or_place(request, destination, max_memory)
    refuse_incomplete(request.source)
    checkpoint = request.open(max_chunk_bytes=max_memory // 4)
    target = request.target(checkpoint)
    check(checkpoint.tensors, checkpoint.config)
    plan = request.plan(checkpoint)
    with Job(destination, request.identity(checkpoint), repeat) as job:
        begun = plan.recorded_bytes(job.steps)
        _check_space(destination, plan.n_bytes - begun)
        with _full_disk_explained(destination):
            _write(job, checkpoint, plan, max_memory, _counter(on_progress, begun, plan.n_bytes))
        job.finish()
        return Outcome(
            format=target,
            total_bytes=plan.n_bytes,
            bytes_written=plan.n_bytes - begun,
            bytes_read=checkpoint.tensors.bytes_read,
            resumed=job.resumed,
            added=checkpoint.added,
        )


def _write(
    job: Job,
    checkpoint: Checkpoint,
    plan: OrbaxPlan | HfPlan,
    max_memory: int,
    on_bytes: Callable[[int], None],
) -> None:
    if isinstance(plan, HfPlan):
        write_hf_folder(job, checkpoint, plan, on_bytes=on_bytes)
        return
    write_orbax(
        job,
        checkpoint,
        plan,
        batch_bytes=min((max_memory - _PROGRAM_BYTES) // 4, _LARGEST_BATCH),
        workers=_workers(max_memory),
        on_bytes=on_bytes,
    )


def _counter(on_progress: Callable[[int, int], None], done: int, total: int) -> Callable[[int], None]:
    """Reports `done` at once; returns a function that adds bytes to it and reports the sum."""

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        on_progress(done, total)

    on_bytes(0)
    return on_bytes


def _workers(max_memory: int) -> int:
    """Threads that read and transpose: as many as there are cores and a third of the memory has room for."""
    room = (max_memory - _PROGRAM_BYTES) // 3 // _SCRATCH_BYTES
    return max(1, min(os.cpu_count() or 1, room, _MOST_WORKERS))


def check_memory(max_memory: int) -> None:
    """Raises ValueError for less than a conversion needs in any case."""
    if max_memory < SMALLEST_MEMORY:
        raise ValueError(f"max_memory must be at least {SMALLEST_MEMORY:,} bytes (1 GiB), got {max_memory:,}")


def _refuse_memory_or_place(request: Request, destination: Path, max_memory: int) -> None:
    check_memory(max_memory)
    if destination == request.source or request.source in destination.parents:
        raise ValueError(f"the destination {destination} must not be the source, nor a folder inside it")


def _check_space(destination: Path, needed: int) -> None:
    free = shutil.disk_usage(destination).free
    if free < needed:
        raise OSError(
            f"the disk of {destination} has {free:,} bytes free and {needed:,} are still to be written; free "
            "some and run the same command again, or choose another disk"
        )


@contextmanager
def _full_disk_explained(destination: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        if not disk_full(error):
            raise
        raise OSError(
            f"no space left on the disk of {destination}; free some and run the same command again, it resumes"
        ) from error
