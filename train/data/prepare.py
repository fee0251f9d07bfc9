"""Text into tokens on disk: `python -m train.data.prepare stdlib --out DIR`.

DIR then holds tokenizer.json and, for the splits train and validation,

    {split}.npy         [tokens] uint16 (uint32 above 65,536 ids): each document is bos, if there is one, its text, eos
    {split}_starts.npy  [documents] int64: position of each document's first token

and manifest.json: sources, licences, sizes and checksums. The same input gives the same bytes with the same version
of `tokenizers`. All documents are held in memory at once.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dsa_jax.checkpoint.files import sync_folder, sync_tree
from dsa_jax.commands.errors import run_command
from dsa_jax.commands.inputs import open_tokenizer
from dsa_jax.commands.outputs import outputs_locked
from train.data.documents import SUFFIXES, Document, read_source, split_documents, without_repeats
from train.data.tokenizer import ROLES, Ids, as_list, check_vocab_size, special_ids, train_tokenizer


def prepare(
    sources: Sequence[str],
    out: str | os.PathLike[str],
    *,
    vocab_size: int = 4096,
    tokenizer_file: str | os.PathLike[str] | None = None,
    special_tokens: Mapping[str, Sequence[str]] | None = None,
    validation_share: float = 0.02,
    tests: bool = False,
    licence: str | None = None,
) -> dict[str, Any]:
    """Writes the folder ``out``, which appears only when it is complete, and returns its manifest.

    sources: "stdlib", files or folders. tests, licence: see ``read_source``. The tokenizer is trained on the train
    split unless ``tokenizer_file`` is given. special_tokens: the texts of its "bos", "eos" and "pad" tokens, where the
    files beside it do not say which these are (``special_ids``).

    Raises:
      ValueError: input that cannot be read, naming file and line, or ``out`` is neither new nor empty.
    """
    from rich.console import Console
    from rich.progress import Progress

    out = Path(out)
    tokenizer_file = None if tokenizer_file is None else Path(tokenizer_file)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"the output folder must be new or empty, got {out}")
    if not 0 < validation_share < 1:
        raise ValueError(f"validation_share must be between 0 and 1, got {validation_share}")
    made = special = None
    if tokenizer_file is not None:
        made = open_tokenizer(tokenizer_file)
        special = special_ids(made, tokenizer_file.parent, special_tokens)
    elif special_tokens:
        raise ValueError("special tokens can be named for a tokenizer made elsewhere: give --tokenizer too")
    check_vocab_size(vocab_size)
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        read = [
            read_source(source, tests, licence) for source in progress.track(sources, description="reading")
        ]
        documents = [document for found, _ in read for document in found]
        distinct = without_repeats(documents)
        if len(distinct) < 2:
            raise ValueError(
                f"two splits need at least 2 different documents, got {len(distinct)} from {', '.join(sources)}"
            )
        splits = split_documents(distinct, validation_share)
        bar = progress.add_task("the tokenizer", total=None)
        tokenizer = made or train_tokenizer([document.text for document in splits["train"]], vocab_size)
        tokenizer.encode_special_tokens = True  # special tokens written in a text stay text
        progress.update(bar, total=1, completed=1)
        folder = out.with_name(f".{out.name}.partial")
        written = write_splits(folder, splits, tokenizer, special or special_ids(tokenizer), progress.track)
    manifest = {
        "sources": [entry for _, entry in read],
        "empty_or_repeated": len(documents) - len(distinct),
        "splits": written.pop("splits"),
        "validation_share": validation_share,
    } | written
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    licence_file = Path(sysconfig.get_path("stdlib")) / "LICENSE.txt"
    if "stdlib" in sources and licence_file.is_file():
        shutil.copyfile(licence_file, folder / "LICENSE.python.txt")
    sync_tree(folder)
    folder.rename(out)
    sync_folder(out.parent)
    return manifest


def write_splits(
    folder: Path,
    splits: dict[str, list[Document]],
    tokenizer: Any,
    special: Mapping[str, Ids],
    track: Callable[..., Iterable[Any]],
) -> dict[str, Any]:
    """Writes tokenizer.json and the arrays of all splits into a new ``folder``; what the manifest says about them."""
    from tokenizers import __version__

    n_ids = max(tokenizer.get_vocab().values()) + 1  # a tokenizer made elsewhere may have gaps
    dtype = np.dtype(np.uint16 if n_ids <= 2**16 else np.uint32)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    sizes = {}
    for split, members in splits.items():
        batches = partial(track, description=f"encoding {split}")
        sizes[split] = write_split(folder / split, members, tokenizer, special, dtype, batches)
    return {
        "splits": sizes,
        "vocab_size": n_ids,
        "special_tokens": special,
        "dtype": dtype.name,
        "tokenizer_sha256": hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest(),
        "tokenizers_version": __version__,
    }


def write_split(
    path: Path,
    documents: Sequence[Document],
    tokenizer: Any,
    special: Mapping[str, Ids],
    dtype: np.dtype,
    track: Callable[[range], Iterable[int]],
) -> dict[str, Any]:
    """Writes PATH.npy and PATH_starts.npy, bos and eos around each document; the split's entry in the manifest."""
    before, after = as_list(special.get("bos")), as_list(special["eos"])
    pieces: list[np.ndarray] = []
    n_bytes = 0
    for first in track(range(0, len(documents), 64)):
        texts = [document.text for document in documents[first : first + 64]]
        n_bytes += sum(len(text.encode()) for text in texts)
        for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            pieces.append(np.array([*before, *encoding.ids, *after], dtype))
    tokens = np.concatenate(pieces)
    np.save(tokens_file := path.with_name(f"{path.name}.npy"), tokens)
    starts = np.cumsum([0, *(len(piece) for piece in pieces[:-1])], dtype=np.int64)
    np.save(path.with_name(f"{path.name}_starts.npy"), starts)
    checksum = hashlib.sha256(tokens_file.read_bytes()).hexdigest()
    return {"documents": len(pieces), "bytes": n_bytes, "tokens": len(tokens), "sha256": checksum}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 bad input, said in one line on standard error."""
    parser = argparse.ArgumentParser(
        prog="python -m train.data.prepare", description="Turns text into tokens on disk."
    )
    parser.add_argument(
        "sources", nargs="+", metavar="SOURCE", help=f"stdlib, a folder, or a {', '.join(SUFFIXES)} file"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write; new or empty")
    parser.add_argument("--vocab-size", type=int, default=4096, help="ids of the tokenizer that is trained")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json to use instead of training one")
    for role, count, use in (("bos", "*", "begin"), ("eos", "+", "end"), ("pad", 1, "pad a row after")):
        parser.add_argument(
            f"--{role}-token",
            nargs=count,
            metavar="TOKEN",
            help=f"with --tokenizer: what is to {use} a document, instead of what the files beside it say",
        )
    parser.add_argument(
        "--validation-share", type=float, default=0.02, help="share of the documents, by a hash of the name"
    )
    parser.add_argument("--tests", action="store_true", help="stdlib: include Python's own tests")
    parser.add_argument("--licence", help="licence of the files, for the manifest")
    options = parser.parse_args(arguments)
    named = {role: getattr(options, f"{role}_token") for role in ROLES}

    def write() -> int:
        started = time.perf_counter()
        with outputs_locked(options.out):
            manifest = prepare(
                options.sources,
                options.out,
                vocab_size=options.vocab_size,
                tokenizer_file=options.tokenizer,
                special_tokens={role: tokens for role, tokens in named.items() if tokens is not None},
                validation_share=options.validation_share,
                tests=options.tests,
                licence=options.licence,
            )
        for split, size in manifest["splits"].items():
            sizes = f"{size['bytes']:,} bytes, {size['tokens']:,} tokens"
            print(f"{split}: {size['documents']:,} documents, {sizes}")
        print(f"{options.out}: {manifest['vocab_size']:,} ids, {time.perf_counter() - started:.1f} s")
        return 0

    return run_command("python -m train.data.prepare", write)


if __name__ == "__main__":
    sys.exit(main())
