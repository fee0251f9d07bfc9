"""What makes a conversion safe to kill at any moment: a marker, a journal and a lock.

The marker is the first file of the destination, and it is removed last; while it is there, no reader accepts the
folder. The journal has one line per finished step, appended after the step is safely on disk.
"""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from types import TracebackType
from typing import Any

from dsa_jax.checkpoint.files import read_json_object, sync_folder, sync_tree, write_atomically
from dsa_jax.checkpoint.lock import lock_folder

MARKER = "INCOMPLETE.json"
JOURNAL = "journal.jsonl"
_LOCK = "INCOMPLETE.lock"


class Job:
    """Opens or resumes the conversion into `path`; a context manager that holds the folder's lock.

    request: everything that decides the result (source, its fingerprint, dtype, ...); a resumed conversion must have
    the same. command: how to resume, for messages. steps: the journal so far. Raises ValueError when path is taken
    or holds part of another conversion, BlockingIOError when another process is writing it.
    """

    def __init__(self, path: Path, request: dict[str, Any], command: list[str]) -> None:
        self.path = path
        _refuse_taken(path)  # before anything is touched
        self._lock = lock_folder(path, _LOCK)
        try:
            _refuse_taken(path)  # another process may have finished since
            self.resumed = (path / MARKER).is_file()
            if self.resumed:
                _refuse_other_request(path, read_json_object(path / MARKER), request)
            else:
                marker = {"request": request, "command": shlex.join(command)}
                write_atomically(path / MARKER, json.dumps(marker, indent=2).encode())
            self.steps = _read_journal(path / JOURNAL)
            self._journal = (path / JOURNAL).open("a", encoding="utf-8")
        except BaseException:
            self._lock.release()
            raise

    def record(self, step: dict[str, Any]) -> None:
        """Appends a finished step; on return it survives a crash."""
        self._journal.write(json.dumps(step, separators=(",", ":")) + "\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())
        self.steps.append(step)

    def finish(self) -> None:
        """Removes the marker: from here on the folder is complete. A crash now leaves harmless files."""
        self._journal.close()
        sync_tree(self.path)
        (self.path / MARKER).unlink()
        sync_folder(self.path)
        (self.path / JOURNAL).unlink()
        self._lock.release()

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._journal.close()
        self._lock.release()


def refuse_incomplete(path: Path) -> None:
    """Raises ValueError, with the command that resumes it, when a conversion into path was interrupted."""
    if (path / MARKER).is_file():
        command = read_json_object(path / MARKER).get("command")
        raise ValueError(
            f"{path} is an unfinished conversion; rerun the same command to resume it: {command}"
        )


def _refuse_taken(path: Path) -> None:
    """A free folder is empty, or a crash came before its marker was complete."""
    if not path.exists() or (path / MARKER).is_file():
        return
    if not path.is_dir() or not {file.name for file in path.iterdir()} <= {_LOCK, MARKER + ".partial"}:
        raise ValueError(f"{path} exists and is not an unfinished conversion; remove it or choose another")


def _refuse_other_request(path: Path, marker: dict[str, Any], request: dict[str, Any]) -> None:
    begun = marker.get("request", {})
    differing = [key for key in request if begun.get(key) != request[key]]
    if differing:
        changes = "; ".join(f"{key} was {begun.get(key)!r}, now {request[key]!r}" for key in differing)
        raise ValueError(
            f"{path} is an unfinished conversion of another kind ({changes}); resume it with "
            f"{marker.get('command')!r} or remove it"
        )


def _read_journal(path: Path) -> list[dict[str, Any]]:
    """The complete lines; a last line cut short by a crash is removed from the file."""
    if not path.is_file():
        return []
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as stream:
            stream.truncate(whole)
    return [json.loads(line) for line in content[:whole].splitlines()]
