"""Small files that must be whole or absent, JSON that may be damaged, and disks that take no more."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
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


def sync_tree(path: Path) -> None:
    """Flushes every file below the folder, and the folders: all of it survives a power failure."""
    for folder, _, files in os.walk(path):
        for name in files:
            sync_folder(Path(folder, name))
        sync_folder(Path(folder))


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


_FULL = {errno.ENOSPC: "no space left on its disk", errno.EDQUOT: "its disk quota is used up",
         errno.EFBIG: "the limit on the size of a file is reached"}  # fmt: skip
_FAULTS = _FULL | {
    errno.EROFS: "its file system is read-only",
    errno.EACCES: "this user may not write there",
    errno.EPERM: "this user may not write there",
    errno.ENOENT: "the folder was removed or moved away",
    errno.ESTALE: "the folder was removed or moved away",
    errno.ENOTDIR: "a part of its path is a file, not a folder",
    errno.EEXIST: "it is a file, not a folder",
    errno.ENAMETOOLONG: "its name is too long",
    errno.EIO: "its disk reports an input/output error",
}


def disk_full(error: BaseException) -> bool:
    """Whether the error means that the disk, a quota or a limit on file sizes is full."""
    return _error_number(error) in _FULL


def why_not_written(error: BaseException, path: Path) -> str | None:
    """Half a sentence, "PATH cannot be written: ...", about an error of the file system; None for any other error."""
    number = _error_number(error)
    if number not in _FAULTS:
        return None
    return f"{path} cannot be written: {_FAULTS[number]}"


def free_bytes(path: Path) -> int:
    """Free space for this user on the disk of the path, or of the nearest folder above it that exists."""
    return shutil.disk_usage(next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())).free


def first_line(error: BaseException) -> str:
    """What an error of a library says, without the lines that follow; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _error_number(error: BaseException) -> int | None:
    """tensorstore has no exceptions of its own for these: the text of its errors carries the number."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os_error_code='(\d+)'", str(error))
    return int(found[1]) if found else None
