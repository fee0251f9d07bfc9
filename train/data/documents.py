"""Documents to prepare: the standard library, files and folders, without repeats, in two splits."""

import ast
import hashlib
import io
import json
import platform
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dsa_jax.checkpoint.files import refuse_lfs_pointer

SUFFIXES = (".txt", ".md", ".py", ".jsonl")
TEST_FOLDERS = {"test", "tests", "idle_test"}


class Document(NamedTuple):
    """A text and its name. The name decides the split and does not depend on where the source is stored."""

    name: str
    text: str


def read_source(source: str, tests: bool, licence: str | None) -> tuple[list[Document], dict[str, Any]]:
    """Documents of "stdlib", a file or a folder, and the source's entry in the manifest.

    tests: with "stdlib", whether Python's own tests are read too. licence: of files and folders, for the manifest.

    Raises:
      ValueError: no such source, or input that cannot be read; the message names file and line.
    """
    left_out: list[str] = []
    entry: dict[str, Any] = {"source": Path(source).name, "licence": licence}
    if source == "stdlib":
        documents, left_out = stdlib_documents(Path(sysconfig.get_path("stdlib")), tests)
        entry = {
            "source": f"standard library of Python {platform.python_version()}",
            "licence": "PSF-2.0 (https://docs.python.org/3/license.html)",
            "tests": tests,
        }
    elif (path := Path(source)).is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        if not files:
            raise ValueError(f"a folder must have {', '.join(SUFFIXES)} files, {source} has none")
        names = [f"{path.resolve().name}/{file.relative_to(path).as_posix()}" for file in files]
        documents = [d for file, name in zip(files, names, strict=True) for d in file_documents(file, name)]
    elif path.is_file() and path.suffix in SUFFIXES:
        documents = list(file_documents(path, path.name))
    else:
        raise ValueError(f"a source must be stdlib, a folder or a {', '.join(SUFFIXES)} file, got {source}")
    checksum = hashlib.sha256()
    for document in documents:
        checksum.update(f"{document.name}\0{document.text}\0".encode())
    return documents, entry | {
        "documents": len(documents),
        "bytes": sum(len(document.text.encode()) for document in documents),
        "sha256": checksum.hexdigest(),
        "left_out": left_out,
    }


def stdlib_documents(folder: Path, tests: bool) -> tuple[list[Document], list[str]]:
    """(documents, names of the files left out) of the standard library in ``folder``: modules and `help()` topics.

    Python's own tests are read only with ``tests``; those that are undecodable on purpose are then left out.
    Installed packages are never read, nor are files that describe the machine on which Python was built.
    """
    documents, left_out = [], []
    for file in sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).as_posix()):
        path = file.relative_to(folder)
        name, is_test = f"stdlib/{path.as_posix()}", not TEST_FOLDERS.isdisjoint(path.parts)
        installed = not {"site-packages", "dist-packages", "__pycache__"}.isdisjoint(path.parts)
        built_here = path.name.startswith("_sysconfigdata") or path.parts[0].startswith("config-")
        if installed or built_here or (is_test and not tests):
            continue
        if path.as_posix() == "pydoc_data/topics.py":
            topics = ast.parse(decoded(file, name)).body[-1]
            assert isinstance(topics, ast.Assign), "pydoc_data.topics ends with its one dictionary"
            documents += [
                Document(f"{name}:{key}", text) for key, text in ast.literal_eval(topics.value).items()
            ]
            continue
        try:
            documents.append(Document(name, decoded(file, name)))
        except ValueError:
            if not is_test:
                raise
            left_out.append(name)
    return documents, left_out


def file_documents(file: Path, name: str) -> Iterator[Document]:
    """The document of a .txt, .md or .py file; for a .jsonl file, the "text" of each line.

    Raises:
      ValueError: the file cannot be read, as "name:line: reason".
    """
    text = decoded(file, name)
    if file.suffix != ".jsonl":
        yield Document(name, text)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name}:{number}: must be JSON, {error}") from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise ValueError(
                f'{name}:{number}: must be an object with a "text" string, got {line.strip()[:60]}'
            )
        try:
            record["text"].encode()
        except UnicodeEncodeError as error:
            raise ValueError(f'{name}:{number}: "text" must be valid Unicode, {error}') from error
        yield Document(f"{name}:{number}", record["text"])


def decoded(file: Path, name: str) -> str:
    """A file's text: UTF-8, or for .py the encoding that its first lines declare.

    Raises:
      ValueError: the bytes are not in that encoding, as "name:line: reason".
    """
    refuse_lfs_pointer(file)
    data = file.read_bytes()
    encoding = "utf-8-sig"
    if file.suffix == ".py":
        try:
            encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        except SyntaxError as error:
            raise ValueError(f"{name}:1: {error}") from error
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{name}:{line}: text must be {encoding}, got byte {data[error.start]:#04x}"
        ) from error


def without_repeats(documents: Sequence[Document]) -> list[Document]:
    """The documents that are not blank, each text once, so that no validation text is also in training."""
    first: dict[bytes, Document] = {}
    for document in documents:
        if document.text.strip():
            first.setdefault(hashlib.sha256(document.text.encode()).digest(), document)
    return list(first.values())


def split_documents(documents: Sequence[Document], validation_share: float) -> dict[str, list[Document]]:
    """train and validation, by a hash of the name: adding documents never moves one to the other split.

    documents: at least 2. If no hash falls into the share, the document with the lowest hash is the validation split.

    Raises:
      ValueError: a share that leaves none to train on.
    """
    digests = [hashlib.sha256(document.name.encode()).digest() for document in documents]
    draws = [int.from_bytes(digest[:8]) for digest in digests]
    bound = max(round(validation_share * 2**64), min(draws) + 1)
    splits: dict[str, list[Document]] = {"train": [], "validation": []}
    for document, draw in zip(documents, draws, strict=True):
        splits["validation" if draw < bound else "train"].append(document)
    if not splits["train"]:
        raise ValueError(
            f"validation_share {validation_share} leaves none of {len(documents)} documents to train on"
        )
    return splits
