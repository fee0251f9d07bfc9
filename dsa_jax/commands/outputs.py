"""What commands print and write beside their result: progress, memory, files."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def outputs_locked(*paths: Path | None) -> Iterator[None]:
    """Inside, no other command writes these files; None stands for an option that was not given.

    To be entered before the work begins. Raises BlockingIOError when one of them is being written, OSError when it
    cannot be.
    """
    from dsa_jax.checkpoint.lock import lock_output

    with ExitStack() as stack:
        for path in paths:
            if path is not None:
                stack.enter_context(lock_output(path))
        yield


def write_text(path: Path, text: str) -> None:
    """Writes the file, whole or not at all, and its folder if need be."""
    from dsa_jax.checkpoint.files import write_atomically

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode())


def write_json(path: Path, content: Any, indent: int = 1) -> None:
    """As ``write_text``, in JSON."""
    write_text(path, json.dumps(content, indent=indent) + "\n")


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with bytes, rate and time left on a terminal's standard error; silent elsewhere.

    Yields a function to call with (bytes done, bytes in all).
    """
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
            # Bytes of an earlier run would spoil the rate: the bar counts only what was left to do.
            first[:1] = first[:1] or [done]
            progress.update(task, completed=done - first[0], total=total - first[0])

        yield on_progress
