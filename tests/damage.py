"""What can happen to a file that a user hands in, as functions of its path."""

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest


def _with(content: bytes) -> Callable[[Path], None]:
    return lambda path: _replace(path, content)


def _replace(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


ANY_FILE: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink,
    "a folder": _folder,
    "a Git LFS pointer": _with(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
}
if os.geteuid():  # root may read every file
    ANY_FILE["without permission"] = lambda path: path.chmod(0)
BINARY = ANY_FILE | {
    "empty": _with(b""),
    "truncated": lambda path: _replace(path, path.read_bytes()[: path.stat().st_size * 2 // 3]),
    "zeros": lambda path: _replace(path, bytes(path.stat().st_size)),
}
JSON = BINARY | {
    "invalid UTF-8": _with(b'{"a": "\xff\xfe"}'),
    "a list": _with(b"[1, 2]"),
    "a number": _with(b"3"),
    "null": _with(b"null"),
    "an object of other keys": _with(b'{"a": {"b": [1]}}'),
    "NaN": _with(b'{"a": NaN, "b": Infinity}'),
    "nested too deeply": _with(b"[" * 100_000),
}


def damage(path: Path, kind: str) -> None:
    """Damages the file."""
    JSON[kind](path)


def cases(files: Mapping[str, tuple[Iterable[str], Mapping[str, Any]]]) -> list[tuple[str, str, str]]:
    """(file, command, kind of damage) of each; files: file -> (kinds, the commands that read it)."""
    return [
        (file, command, kind)
        for file, (kinds, commands) in files.items()
        for command in commands
        for kind in sorted(kinds)
    ]


def copied(folder: Path, to: Path) -> Path:
    """A copy of the folder to damage."""
    return Path(shutil.copytree(folder, to))


def the_one_line(capsys: pytest.CaptureFixture[str], path: Path) -> str:
    """The single line on standard error, which must name the file."""
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert str(path) in line and ": " in line and "Traceback" not in line and "Errno" not in line, line
    return line
