"""What a run reports: JSON lines in metrics.jsonl and eval.jsonl, and a live line on the terminal."""

import contextlib
import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from dsa_jax.checkpoint.files import write_atomically
from train.private_jax import process_allgather

METRICS_FILE = "metrics.jsonl"
EVAL_FILE = "eval.jsonl"


class JsonLines:
    """A file with one JSON object per line, each with a "step". A resumed run drops the lines of later steps.

    resume_at: the last step whose lines are kept; -1 for a new run, which keeps none. Only process 0 writes;
    the other processes hold the same lines.
    """

    def __init__(self, path: Path, resume_at: int) -> None:
        self.path = path
        lines = read_lines(path) if path.is_file() else []
        self.lines = [line for line in lines if line["step"] <= resume_at]
        self._file = None
        if jax.process_index():
            return
        content = "".join(json.dumps(line) + "\n" for line in self.lines)
        write_atomically(path, content.encode())  # without a last line that a killed process cut short
        self._file = path.open("a")

    def add(self, line: Mapping[str, Any]) -> None:
        """Appends the line. Raises OSError, also where the file is no longer the one at its path."""
        self.lines.append(dict(line))
        if not self._file:
            return
        try:
            if not os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.path)):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.path))
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            error.filename = str(self.path)
            raise

    def sync(self) -> None:
        """Flushes the lines to disk: after a crash, those of a checkpoint's steps are as safe as the checkpoint."""
        if self._file:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file:
            with contextlib.suppress(OSError):  # of a line that ``add`` could not write, and said so
                self._file.close()


def read_lines(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, without a last line that a killed process cut short.

    Raises:
      ValueError: another line is not JSON; the message names it.
    """
    found = []
    for number, line in enumerate(Path(path).read_text().splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            break
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
    return found


def as_json(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Device arrays -> numbers and lists."""
    fetched = jax.device_get(dict(metrics))
    return {name: np.asarray(value).tolist() for name, value in fetched.items()}


def memory_bytes() -> int | None:
    """The highest peak memory of any device of any process, in bytes; None if the devices do not report it."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    return int(process_allgather(np.float32(max(peaks))).max()) or None


class LiveLine:
    """On a terminal, one line that follows the run; elsewhere, a plain line per report."""

    def __init__(self, console: Console, total: int) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(), console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._progress.add_task("starting", total=total)
        self._progress.start()

    def report(self, line: Mapping[str, Any]) -> None:
        text = f"{line['stage']}  " + "  ".join(_parts(line))
        self._progress.update(self._task, completed=line["step"], description=text)
        if not self._console.is_terminal:
            self._console.print(f"step {line['step']}  {text}", soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()


def _parts(line: Mapping[str, Any]) -> list[str]:
    parts = [f"{name} {line[name]:.4f}" for name in ("ce", "mtp") if name in line]
    if "index_kl" in line:
        parts.append("KL " + " ".join(f"{kl:.3f}" for kl in line["index_kl"]))
    if line["max_load_ratio"]:
        parts.append(f"load {max(line['max_load_ratio']):.1f}x")
    if "tokens_per_s" in line:
        parts.append(f"{line['tokens_per_s']:,.0f} tok/s")
    if "ceiling_share" in line:
        parts.append(f"{line['ceiling_share']:.1%} of {line['ceiling'] / 1e12:.0f} TFLOP/s")
    if line.get("memory_bytes"):
        parts.append(f"{line['memory_bytes'] / 2**30:.1f} GiB")
    return parts
