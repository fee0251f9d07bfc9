"""Text into tokens on disk: `python -m train.data.prepare stdlib --out DIR`.

DIR then holds tokenizer.json and, for the splits train and validation,

    {split}.npy         [tokens] uint16 (uint32 above 65,536 ids): every document is bos, its text, eos
    {split}_starts.npy  [documents] int64: where each document's bos is

and manifest.json: where the text is from, its licence, sizes and checksums. The same input gives the same bytes with
the same version of `tokenizers`. All documents are held in memory at once.
"""

import argparse
import ast
import hashlib
import io
import json
import platform
import shutil
import sys
import sysconfig
import time
import tokenize
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SUFFIXES = (".txt", ".md", ".py", ".jsonl")
RESERVED = tuple(f"<|reserved_{i}|>" for i in range(8))  # for tasks, as in train.data.synthetic.Needles
SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>", *RESERVED)  # ids 0, 1, 2, ...
# What begins, ends and pads a document in a tokenizer made elsewhere: ours, DeepSeek's, Llama's.
ROLES = {
    "bos": ("<|bos|>", "<｜begin▁of▁sentence｜>", "<s>"),
    "eos": ("<|eos|>", "<｜end▁of▁sentence｜>", "</s>"),
    "pad": ("<|pad|>", "<｜▁pad▁｜>", "<pad>"),
}
TEST_FOLDERS = {"test", "tests", "idle_test"}


class Document(NamedTuple):
    """A text and the name that decides its split; the name does not depend on where the source lies."""

    name: str
    text: str


def decoded(file: Path, name: str) -> str:
    """Text of a file: UTF-8, or for .py what its first lines declare. ValueError names the undecodable line."""
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


def stdlib_documents(folder: Path, tests: bool) -> tuple[list[Document], list[str]]:
    """Modules of the standard library in `folder` and the topics of its `help()`; names of the files left out.

    Without `tests`, Python's own tests are not read. With them, those are left out that are undecodable on purpose.
    Installed packages, and files that describe the machine Python was built on, never belong to it.
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
    """The document of a .txt, .md or .py file; of a .jsonl file one per line, its "text". ValueError: file:line."""
    text = decoded(file, name)
    if file.suffix != ".jsonl":
        yield Document(name, text)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
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


def read_source(source: str, tests: bool, licence: str | None) -> tuple[list[Document], dict[str, Any]]:
    """Documents of "stdlib", a file or a folder, and the source's entry in the manifest."""
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


def without_repeats(documents: Sequence[Document]) -> list[Document]:
    """The documents with text in them, each text once: validation text must not be in training."""
    first: dict[bytes, Document] = {}
    for document in documents:
        if document.text.strip():
            first.setdefault(hashlib.sha256(document.text.encode()).digest(), document)
    return list(first.values())


def split_documents(documents: Sequence[Document], validation_share: float) -> dict[str, list[Document]]:
    """train and validation, by a hash of the name: more documents never move one to the other split.

    Should no hash fall into the share, the document with the lowest is validation. ValueError below 2 documents.
    """
    if len(documents) < 2:
        raise ValueError(f"two splits need at least 2 different documents, got {len(documents)}")
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


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer with SPECIAL_TOKENS first; fewer than vocab_size ids if the text has no more."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    least = len(SPECIAL_TOKENS) + len(alphabet)
    if vocab_size < least:
        raise ValueError(
            f"vocab_size must hold all bytes and special tokens, at least {least}, got {vocab_size}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def special_ids(tokenizer: Any) -> dict[str, int]:
    """Ids of bos, eos, pad and of the reserved tokens there are. ValueError where one of the first three is missing."""
    ids = {}
    for role, names in ROLES.items():
        found = [tokenizer.token_to_id(name) for name in names if tokenizer.token_to_id(name) is not None]
        if not found:
            raise ValueError(
                f"the tokenizer must have a token for {role}, one of {', '.join(names)}; it has none"
            )
        ids[role] = found[0]
    reserved = {name.strip("<|>"): tokenizer.token_to_id(name) for name in RESERVED}
    return ids | {name: token for name, token in reserved.items() if token is not None}


def write_split(
    path: Path,
    documents: Sequence[Document],
    tokenizer: Any,
    special: dict[str, int],
    dtype: np.dtype,
    track: Callable[[range], Iterable[int]],
) -> dict[str, Any]:
    """Writes PATH.npy and PATH_starts.npy, bos and eos around every document; the split's entry in the manifest."""
    pieces: list[np.ndarray] = []
    n_bytes = 0
    for first in track(range(0, len(documents), 64)):
        texts = [document.text for document in documents[first : first + 64]]
        n_bytes += sum(len(text.encode()) for text in texts)
        for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            pieces.append(np.array([special["bos"], *encoding.ids, special["eos"]], dtype))
    tokens = np.concatenate(pieces)
    np.save(tokens_file := path.with_name(f"{path.name}.npy"), tokens)
    starts = np.cumsum([0, *(len(piece) for piece in pieces[:-1])], dtype=np.int64)
    np.save(path.with_name(f"{path.name}_starts.npy"), starts)
    checksum = hashlib.sha256(tokens_file.read_bytes()).hexdigest()
    return {"documents": len(pieces), "bytes": n_bytes, "tokens": len(tokens), "sha256": checksum}


def prepare(
    sources: Sequence[str],
    out: Path,
    *,
    vocab_size: int = 4096,
    tokenizer_file: Path | None = None,
    validation_share: float = 0.02,
    tests: bool = False,
    licence: str | None = None,
) -> dict[str, Any]:
    """Writes the folder `out`, all at once when everything is done, and returns its manifest.

    sources: "stdlib", files or folders. The tokenizer is trained on the train split unless `tokenizer_file` is
    given. licence: of the files and folders, as a word for the manifest.
    Raises ValueError on input that cannot be read, naming file and line, and where `out` is not new or empty.
    """
    from rich.console import Console
    from rich.progress import Progress
    from tokenizers import Tokenizer, __version__

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"the output folder must be new or empty, got {out}")
    if not 0 < validation_share < 1:
        raise ValueError(f"validation_share must be between 0 and 1, got {validation_share}")
    if tokenizer_file is not None and not tokenizer_file.is_file():
        raise ValueError(f"tokenizer_file must be a tokenizer.json, got {tokenizer_file}")
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        read = [
            read_source(source, tests, licence) for source in progress.track(sources, description="reading")
        ]
        documents = [document for found, _ in read for document in found]
        splits = split_documents(distinct := without_repeats(documents), validation_share)
        if tokenizer_file is None:
            bar = progress.add_task("training the tokenizer", total=None)
            tokenizer = train_tokenizer([document.text for document in splits["train"]], vocab_size)
            progress.update(bar, total=1, completed=1)
        else:
            tokenizer = Tokenizer.from_file(str(tokenizer_file))
        # "<|bos|>" written in a text is text.
        tokenizer.encode_special_tokens = True
        special = special_ids(tokenizer)
        n_ids = max(tokenizer.get_vocab().values()) + 1  # a foreign tokenizer may have gaps
        dtype = np.dtype(np.uint16 if n_ids <= 2**16 else np.uint32)

        folder = out.with_name(f".{out.name}.partial")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        tokenizer.save(str(folder / "tokenizer.json"))
        sizes = {}
        for split, members in splits.items():
            track = partial(progress.track, description=f"encoding {split}")
            sizes[split] = write_split(folder / split, members, tokenizer, special, dtype, track)
    manifest = {
        "sources": [entry for _, entry in read],
        "empty_or_repeated": len(documents) - len(distinct),
        "splits": sizes,
        "validation_share": validation_share,
        "vocab_size": n_ids,
        "special_tokens": special,
        "dtype": dtype.name,
        "tokenizer_sha256": hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest(),
        "tokenizers_version": __version__,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    licence_file = Path(sysconfig.get_path("stdlib")) / "LICENSE.txt"
    if "stdlib" in sources and licence_file.is_file():
        shutil.copyfile(licence_file, folder / "LICENSE.python.txt")
    folder.rename(out)
    return manifest


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; exit code 2 and one line on standard error for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m train.data.prepare", description="Turns text into tokens on disk."
    )
    parser.add_argument(
        "sources", nargs="+", metavar="SOURCE", help=f"stdlib, a folder, or a {', '.join(SUFFIXES)} file"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write; new or empty")
    parser.add_argument("--vocab-size", type=int, default=4096, help="ids of the tokenizer that is trained")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json to use instead of training one")
    parser.add_argument(
        "--validation-share", type=float, default=0.02, help="of the documents, by a hash of the name"
    )
    parser.add_argument("--tests", action="store_true", help="stdlib: with Python's own tests")
    parser.add_argument("--licence", help="licence of the files, for the manifest")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    try:
        manifest = prepare(
            options.sources,
            options.out,
            vocab_size=options.vocab_size,
            tokenizer_file=options.tokenizer,
            validation_share=options.validation_share,
            tests=options.tests,
            licence=options.licence,
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for split, size in manifest["splits"].items():
        print(f"{split}: {size['documents']:,} documents, {size['bytes']:,} bytes, {size['tokens']:,} tokens")
    print(f"{options.out}: {manifest['vocab_size']:,} ids, {time.perf_counter() - started:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
