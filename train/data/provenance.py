"""Where the tokens of a run come from: what was recorded when they were made, compared where they are read."""

import dataclasses
import functools
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from dsa_jax.checkpoint.open_checkpoint import files_to_carry
from dsa_jax.commands.inputs import open_tokenizer
from train.config import Run, Source

TOKENIZER = "tokenizer.json"
DECIDES_IDS = ("model", "normalizer", "pre_tokenizer", "added_tokens")
"""The parts of tokenizer.json that turn text into ids. Others pad, cut, add special tokens or turn ids into text."""

_logger = logging.getLogger(__name__)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest.json of a prepared folder.

    Raises:
      ValueError: there is none, or it is not one that `python -m train.data.prepare` wrote.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} has no manifest.json: make it with `python -m train.data.prepare SOURCE --out {folder}`"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        manifest["splits"], manifest["vocab_size"], manifest["special_tokens"]["pad"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} lacks what `python -m train.data.prepare` writes ({error!r}): {again(folder)}"
        ) from error
    return manifest


def check_file(file: Path, sha256: str | None, what: str) -> None:
    """Raises ValueError unless the file still has the SHA-256 that the manifest of its folder has for it, if any.

    A file that did not change since is read once per process.
    """
    if sha256 is None:
        return
    if not file.is_file():
        raise ValueError(f"{file}, {what}, is missing: {again(file.parent)}")
    stat = file.stat()
    if (found := _sha256(file, stat.st_mtime_ns, stat.st_size)) != sha256:
        raise ValueError(
            f"{file} is no longer {what}: its SHA-256 is {found[:12]}..., {file.parent / 'manifest.json'} has "
            f"{sha256[:12]}...; {again(file.parent)}"
        )


@functools.lru_cache(maxsize=64)
def _sha256(file: Path, mtime_ns: int, size: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def again(folder: Path) -> str:
    """What to do about a folder whose files do not belong together."""
    return (
        "prepare the data again, `python -m train.data.prepare SOURCE --out FOLDER`, into a folder other than "
        f"{folder}"
    )


def with_data_recorded(run: Run) -> Run:
    """The run with the identity of its data in each source that has a folder (``Source.data_sha256``).

    A run stores it with its description and its checkpoints, so that resuming with other data is refused.

    Raises:
      ValueError: a folder is not a prepared one.
    """
    sources = tuple(
        dataclasses.replace(source, data_sha256=_identity(Path(source.folder))) if source.folder else source
        for source in run.data
    )
    return dataclasses.replace(run, data=sources)


def _identity(folder: Path) -> str:
    """SHA-256 of what the manifest says about tokens and tokenizer; the same data prepared again have the same."""
    manifest = read_manifest(folder)
    about = {
        name: manifest.get(name) for name in ("splits", "vocab_size", "special_tokens", "tokenizer_sha256")
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def check_tokenizers(run: Run) -> None:
    """Raises ValueError if a text of the run has other token ids than the checkpoint that the run starts from.

    Compared is what decides ids (``DECIDES_IDS``), since `train.data.prepare` writes the file anew. A checkpoint
    without a tokenizer.json is reported in the log. ``run.any_tokenizer`` switches the check off.
    """
    if run.init_from is None or run.any_tokenizer or not Path(run.init_from).is_dir():
        return
    folders = [Path(source.folder) for source in run.data if source.folder]
    theirs = next((file for file in files_to_carry(Path(run.init_from)) if file.name == TOKENIZER), None)
    if folders and theirs is None:
        _logger.warning(
            "%s has no %s, so nothing says whether its token ids are those of %s",
            run.init_from, TOKENIZER, ", ".join(map(str, folders)),
        )  # fmt: skip
    for folder in folders:
        if theirs is None or _same_tokenizer(folder, theirs):
            continue
        raise ValueError(
            f"{folder} was made with another tokenizer than that of the checkpoint {run.init_from}, so its ids "
            f"mean other tokens there. Prepare the text again: `python -m train.data.prepare SOURCE --out FOLDER "
            f"--tokenizer {theirs}`; or give --run.any-tokenizer if they may differ"
        )


def _same_tokenizer(folder: Path, theirs: Path) -> bool:
    recorded = read_manifest(folder).get("tokenizer_sha256")
    if recorded == hashlib.sha256(theirs.read_bytes()).hexdigest():
        return True
    ours = folder / TOKENIZER
    check_file(ours, recorded, "the tokenizer that the tokens were made with")
    return ours.is_file() and _deciding(ours) == _deciding(theirs)


def tokenizer_of(source: Source) -> Path | None:
    """The tokenizer.json of the data that a run was trained on, None if their folder has none.

    Raises:
      ValueError: the folder now holds other data, or another tokenizer than that of its tokens.
    """
    folder = Path(source.folder or "")
    if source.folder is None or not (folder / TOKENIZER).is_file():
        return None
    if source.data_sha256 is not None:
        if _identity(folder) != source.data_sha256:
            raise ValueError(
                f"{folder} no longer holds the data that the run was trained on, so its {TOKENIZER} may be another; "
                "put them back"
            )
        recorded = read_manifest(folder).get("tokenizer_sha256")
        check_file(folder / TOKENIZER, recorded, "the tokenizer that the tokens were made with")
    return folder / TOKENIZER


def _deciding(file: Path) -> dict[str, Any]:
    """The parts of the tokenizer that decide ids, in the spelling of the installed library."""
    whole = json.loads(open_tokenizer(file).to_str())
    return {name: whole.get(name) for name in DECIDES_IDS}
