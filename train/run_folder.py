"""The folder of a run: one training at a time, its description, and what is said when it takes no more.

config.json                 the run, as ``train.config`` describes it
checkpoints/                ``train.checkpoint``
metrics.jsonl, eval.jsonl   ``train.metrics``
.lock                       only while a training runs; names its process and host
"""

import contextlib
import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsa_jax.checkpoint.files import (
    disk_full,
    free_bytes,
    read_json_object,
    why_not_written,
    write_atomically,
)
from dsa_jax.checkpoint.lock import lock_folder
from train.config import Run, from_json, to_json
from train.private_jax import process_allgather

CONFIG_FILE = "config.json"
_REMEDY = "start the run again with its folder, and training writes it anew"
_SENTENCE_BYTES = 1000


class CannotWrite(OSError):
    """The run's folder took no more; one sentence with the reason and the last good checkpoint."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder and holds its lock. With several processes, process 0 does, and all get its answer.

    Raises:
      BlockingIOError: another training writes this folder; the message names its process and host.
      OSError: nothing can be written there.
    """
    with contextlib.ExitStack() as stack:
        refusal: OSError | None = None
        if jax.process_index() == 0:
            try:
                stack.enter_context(lock_folder(folder))
            except OSError as error:
                refusal = error
        if jax.process_count() > 1:
            said = str(refusal or "").encode()[:_SENTENCE_BYTES].ljust(_SENTENCE_BYTES, b"\0")
            answer = process_allgather(np.frombuffer(said, np.uint8))[0].tobytes().rstrip(b"\0").decode()
            refusal = refusal or (OSError(answer) if answer else None)
        if refusal:
            raise refusal
        yield


def write_description(folder: Path, run: Run) -> None:
    """Writes config.json, whole or not at all."""
    write_atomically(folder / CONFIG_FILE, (json.dumps(to_json(run), indent=1) + "\n").encode())


def read_description(folder: Path) -> dict[str, Any]:
    """config.json of the run in ``folder``, as JSON.

    Raises:
      ValueError: there is none, or it is damaged; the message names it.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{folder} has no {CONFIG_FILE}: give the folder of a run of `python -m train`")
    return read_json_object(path, _REMEDY)


def described_run(folder: Path) -> Run:
    """The run that config.json in ``folder`` describes.

    Raises:
      ValueError: as in ``read_description``.
    """
    values = read_description(folder)
    try:
        return from_json(values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder / CONFIG_FILE} does not describe a run of `python -m train` "
            f"({type(error).__name__}: {error}); {_REMEDY}"
        ) from error


@contextlib.contextmanager
def write_errors_explained(
    folder: Path, kept: Callable[[], str], needed: Callable[[], int]
) -> Iterator[None]:
    """Raises CannotWrite for what the file system refuses inside, however a library dressed it up.

    kept: half a sentence about the newest checkpoint. needed: bytes of a checkpoint, 0 if not known yet.
    """
    try:
        with _libraries_silenced():
            yield
    except Exception as error:
        for cause in _causes(error):
            reason = why_not_written(cause, folder)
            if reason and _is_about(cause, folder):
                if disk_full(cause):
                    size = f"a checkpoint needs {needed():,} bytes and " if needed() else ""
                    reason += f" ({size}{free_bytes(folder):,} are free)"
                    reason += "; free some"
                else:
                    reason += "; put that right"
                raise CannotWrite(f"{reason} and run the same command again: {kept()}") from error
        raise


def _is_about(error: BaseException, folder: Path) -> bool:
    """Whether the error names the folder, or is of an open file, which has no name: a run writes nowhere else."""
    return _is_nameless(error) or any(str(path) in str(error) for path in (folder, folder.resolve()))


def _is_nameless(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.filename is None and disk_full(error)


@contextlib.contextmanager
def _libraries_silenced() -> Iterator[None]:
    """Keeps to themselves the tracebacks that Orbax, asyncio and tensorstore print of a save that fails.

    The exception reaches us too, and ends in one sentence. asyncio prints some when the process ends, so that its
    filter stays. When one of many concurrent writes fails, the others report to an event loop that is closed by then.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_no_failed_save)  # once, however often it is added
    hook = sys.unraisablehook

    def unraisable(found: Any) -> None:
        if not (isinstance(found.exc_value, RuntimeError) and str(found.exc_value) == "Event loop is closed"):
            hook(found)

    sys.unraisablehook = unraisable
    try:
        yield
    finally:
        sys.unraisablehook = hook


def _is_no_failed_save(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    return not any(".orbax-checkpoint-tmp" in str(cause) or _is_nameless(cause) for cause in _causes(error))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
