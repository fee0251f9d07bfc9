"""`dsa-jax convert`."""

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from dsa_jax.commands.inputs import parse_size
from dsa_jax.commands.outputs import peak_memory, progress_bar


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert:
    """Convert a checkpoint: Hugging Face or DeepSeek's own files to Orbax, Orbax to Hugging Face.

    For example, the release into Orbax with FP8 kept, and a trained model back for PyTorch:
      dsa-jax convert DeepSeek-V3.2 v32-orbax --max-memory 8GiB
      dsa-jax convert trained-orbax V3.2-mine --format hf --quantize fp8

    Rerun the same command to resume an interrupted conversion; until it is complete, every reader refuses DST.
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
    """config.json of the model, when the source has none, or to override the source's own."""
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
                max_memory=parse_size("--max-memory", self.max_memory),
                command=self._command(),
                on_progress=on_progress,
                **self._choices(),
            )
        seconds = time.perf_counter() - started
        rate = outcome.bytes_written / seconds / 1e6
        if outcome.resumed:
            print(f"resumed: {outcome.total_bytes - outcome.bytes_written:,} bytes were already there")
        if outcome.added:
            print(
                f"{len(outcome.added)} indexer tensors are FRESH (random), not from {self.source}: train the "
                "indexer before you use sparse attention"
            )
        print(
            f"{self.destination}: {outcome.total_bytes:,} bytes of tensors, {outcome.bytes_written:,} written "
            f"in {seconds:.1f} s ({rate:.0f} MB/s), peak memory {peak_memory():,} bytes"
        )
        return 0

    def _dry_run(self) -> int:
        from dsa_jax.checkpoint.conversion import check_memory
        from dsa_jax.checkpoint.dry_run import dry_run
        from dsa_jax.checkpoint.request import Request

        check_memory(parse_size("--max-memory", self.max_memory))
        report = dry_run(Request(source=self.source.resolve(), **self._choices()))
        for line in report.lines():
            print(line)
        return 1 if report.faults else 0

    def _choices(self) -> dict[str, Any]:
        """What `convert` and a dry run have in common."""
        return {
            "format": self.format,
            "dtype": self.dtype,
            "quantize": self.quantize,
            "max_shard_bytes": parse_size("--max-shard", self.max_shard),
            "add_indexer": self.add_indexer,
            "config_file": self.config,
            "ignore": self.ignore,
        }

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
