"""The commands `dsa-jax convert` and `dsa-jax verify`."""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import tyro

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert:
    """Convert a checkpoint: Hugging Face or DeepSeek's own files to Orbax, Orbax to Hugging Face.

    For example, the release into Orbax with FP8 kept, and a trained model back for PyTorch:
      dsa-jax convert DeepSeek-V3.2 v32-orbax --max-memory 8GiB
      dsa-jax convert trained-orbax V3.2-mine --format hf --quantize fp8

    What is interrupted is resumed by the same command; until it is done no reader accepts DST.
    """

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SRC")]
    """Checkpoint folder: safetensors with config.json, model{i}-mp{N}.safetensors, or Orbax."""
    destination: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")]
    """Folder to write; new, empty, or an interrupted conversion of the same kind."""
    format: Literal["orbax", "hf"] | None = None
    """What to write. Default: hf from Orbax, orbax from everything else."""
    dtype: Literal["fp8", "bfloat16", "float32"] | None = None
    """Type of the matrices. Default: as stored, FP8 with its block scales included."""
    quantize: Literal["fp8"] | None = None
    """To hf: write the released layout, e4m3 with power-of-two scales of 128 x 128 blocks."""
    max_memory: str = "4GiB"
    """Memory the process may take, as in 2GiB or 8GB; at least 1GiB."""
    max_shard: str = "5GB"
    """To hf: largest size of a .safetensors file."""
    add_indexer: bool = False
    """Source is a dense V3 or V3.1: add fresh indexer weights, the start of training sparse attention."""
    config: Path | None = None
    """config.json of the model, when the source has none or another is to be believed."""
    ignore: tuple[str, ...] = ()
    """Keys of config.json that are unknown here and do not change the model."""
    dry_run: bool = False
    """Read headers only; print all tensors, their targets, counts, bytes and every problem."""
    traceback: bool = False
    """On bad input, show where the error arose."""

    def run(self) -> int:
        if self.dry_run:
            return self._dry_run()
        from dsa_jax.checkpoint import convert

        started = time.perf_counter()
        with progress_bar("converting") as on_progress:
            outcome = convert(
                self.source,
                self.destination,
                format=self.format,
                dtype=self.dtype,
                quantize=self.quantize,
                max_memory=parse_size("--max-memory", self.max_memory),
                max_shard_bytes=parse_size("--max-shard", self.max_shard),
                add_indexer=self.add_indexer,
                config_file=self.config,
                ignore=self.ignore,
                command=self._command(),
                on_progress=on_progress,
            )
        seconds = time.perf_counter() - started
        rate = outcome.bytes_written / seconds / 1e6
        if outcome.resumed:
            print(f"resumed: {outcome.total_bytes - outcome.bytes_written:,} bytes were already there")
        if outcome.added:
            print(
                f"{len(outcome.added)} indexer tensors are FRESH (random), not from {self.source}: train the "
                "indexer before sparse attention means anything"
            )
        print(
            f"{self.destination}: {outcome.total_bytes:,} bytes of tensors, {outcome.bytes_written:,} written "
            f"in {seconds:.1f} s ({rate:.0f} MB/s), peak memory {peak_memory():,} bytes"
        )
        return 0

    def _dry_run(self) -> int:
        from dsa_jax.checkpoint.dry_run import dry_run

        report = dry_run(
            self.source,
            format=self.format,
            dtype=self.dtype,
            quantize=self.quantize,
            max_shard_bytes=parse_size("--max-shard", self.max_shard),
            add_indexer=self.add_indexer,
            config_file=self.config,
            ignore=self.ignore,
        )
        for line in report.lines():
            print(line)
        return 1 if report.faults else 0

    def _command(self) -> list[str]:
        """The command line that repeats this conversion."""
        command = ["dsa-jax", "convert", str(self.source), str(self.destination)]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("source", "destination", "traceback", "dry_run") or value == field.default:
                continue
            flag = "--" + field.name.replace("_", "-")
            command += (
                [flag] if value is True else [flag, *(value if isinstance(value, tuple) else [str(value)])]
            )
        return command


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verify:
    """Read a whole checkpoint and hold every tensor against the checksum stored with it.

    For example:
      dsa-jax verify v32-orbax

    Exits with 1 if anything is wrong. A folder that `convert` did not write has no checksums: then names,
    shapes, dtypes and block scales are checked.
    """

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """Checkpoint of any kind."""
    traceback: bool = False
    """On bad input, show where the error arose."""

    def run(self) -> int:
        from dsa_jax.checkpoint import verify

        started = time.perf_counter()
        with progress_bar("verifying") as on_progress:
            found = verify(self.folder, on_progress=on_progress)
        seconds = time.perf_counter() - started
        for fault in found.faults:
            print(fault)
        what = "match their checksums" if found.checksums else "are readable; there are no checksums to hold"
        verdict = f"{len(found.faults)} faults" if found.faults else f"{found.tensors:,} tensors {what}"
        rate = found.bytes_read / seconds / 1e6
        print(f"{self.folder}: {verdict} ({found.bytes_read:,} bytes, {rate:.0f} MB/s)")
        return 1 if found.faults else 0


def compare_weights(
    model: Path, checkpoint: Path, layers: str | None, markdown: Path | None, json: Path | None
) -> int:
    """`dsa-jax compare --checkpoint`: prints the report, writes it where asked; 1 when a value differs."""
    from dsa_jax.checkpoint.compare_tensors import compare_tensors, parse_layers

    with progress_bar("comparing tensors") as on_progress:
        report = compare_tensors(
            model, checkpoint, layers=parse_layers(layers) if layers else None, on_progress=on_progress
        )
    print(report.to_markdown(), end="")
    for path, text in ((markdown, report.to_markdown()), (json, report.to_json() + "\n")):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return 0 if report.passed else 1


def parse_size(option: str, text: str) -> int:
    """ "2GiB" -> 2147483648. Raises ValueError for anything but a number with one of the known units."""
    number = text.strip().rstrip("KMGiBkmgb").strip()
    unit = text.strip()[len(number) :].strip().upper()
    try:
        size = int(float(number) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError) as error:
        raise ValueError(f"{option} takes a size such as 2GiB, 500MB or 1000000, got {text!r}") from error
    if size <= 0:
        raise ValueError(f"{option} must be positive, got {text!r}")
    return size


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with bytes, rate and time left on a terminal's standard error; silent elsewhere."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn(label), BarColumn(), DownloadColumn(binary_units=False), TransferSpeedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, total=None)
        first: list[int] = []

        def on_progress(done: int, total: int) -> None:
            # What an earlier run wrote is no speed of this one: the bar counts what was left to do.
            first[:1] = first[:1] or [done]
            progress.update(task, completed=done - first[0], total=total - first[0])

        yield on_progress
