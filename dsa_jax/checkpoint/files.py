"""Small files that must be whole or absent, JSON that may be damaged, and disks that are full."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

_LFS_POINTER = b"version https://git-lfs"


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces the file: a reader finds the old content or the new, also after a crash."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Flushes the folder's entries: files created and removed so far survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json_object(path: Path, remedy: str = "re-download it") -> dict[str, Any]:
    """The JSON object in the file. Raises ValueError, which ends with the remedy, when it holds anything else."""
    refuse_lfs_pointer(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); {remedy}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(values).__name__}; {remedy}")
    return values


def refuse_lfs_pointer(path: Path) -> None:
    """Raises ValueError when Git LFS has left its pointer in place of the file, OSError when it cannot be read."""
    with path.open("rb") as stream:
        start = stream.read(len(_LFS_POINTER))
    if start == _LFS_POINTER:
        raise ValueError(
            f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder, or download the file "
            "again"
        )


def disk_full(error: BaseException) -> bool:
    """Whether the error means that the disk, a quota or a limit on file sizes is full.

    tensorstore has no exception of its own for this: the text of its error carries the number.
    """
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError):
        return error.errno in full
    return any(f"os_error_code='{number}'" in str(error) for number in full)
