"""One writer at a time: a lock inside a folder that is filled over time, or beside a file or folder that is replaced.

The lock is `flock` on a small file that names its holder. The kernel drops it with the process, however that ends, so
none is left over after a kill; the file may stay and then means nothing. It is the file that is locked, not its name:
another spelling of a path, or a link to it, is the same lock. Network file systems pass it on to other hosts (NFS does;
Lustre when mounted with `flock`).
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from pathlib import Path
from types import TracebackType

from dsa_jax.checkpoint.files import why_not_written

_logger = logging.getLogger(__name__)
_NOT_SUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class WriteLock:
    """Held from here to `release`, or as a context manager. what: the file or folder that is to be written.

    Raises BlockingIOError, which names the process and host that hold it, and OSError where nothing can be written.
    """

    def __init__(self, file: Path, what: Path) -> None:
        self._file = file
        self._descriptor: int | None = _locked(file, what)

    def release(self) -> None:
        """Removes the file and gives the lock up. Nothing happens the second time."""
        if self._descriptor is not None:
            self._file.unlink(missing_ok=True)  # still held: nobody else can have locked it meanwhile
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> WriteLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def lock_folder(folder: Path, name: str = ".lock") -> WriteLock:
    """Locks a folder that is filled over time, and makes it if need be. Locks of other names are independent."""
    _make_folder(folder, folder)
    return WriteLock(folder / name, folder)


def lock_output(path: Path) -> WriteLock:
    """Locks a file or folder that appears, or is replaced, at the end. Makes the folder around it if need be."""
    target = path.resolve()
    _make_folder(target.parent, path)
    return WriteLock(target.parent / f".{target.name}.lock", path)


def _make_folder(folder: Path, what: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _refusal(error, what) from error


def _locked(file: Path, what: Path) -> int:
    """A descriptor of the locked file, which holds the name of this process."""
    while True:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise _refusal(error, what) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise BlockingIOError(
                f"{what} is being written by {holder}; let it finish, or choose another place"
            ) from error
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                os.close(descriptor)
                raise _refusal(error, what) from error
            _logger.warning(
                "%s cannot be locked (%s): do not write it from two processes", what, error.strerror
            )
        if _is_at(descriptor, file):
            break
        os.close(descriptor)  # its last holder removed it between our two calls
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    except OSError as error:  # a full disk has no room for the name; the lock holds without it
        _logger.info("%s is locked without a name in it: %s", file, error)
    return descriptor


def _is_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except FileNotFoundError:
        return False


def _refusal(error: OSError, what: Path) -> OSError:
    return type(error)(why_not_written(error, what) or f"{what} cannot be written: {error.strerror}")
