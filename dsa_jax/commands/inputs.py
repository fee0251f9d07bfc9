"""Checks of what a command line names: folders, token ids, tokenizers, files of numbers, sizes.

Every function raises ValueError or FileNotFoundError, one sentence, for what it cannot use.
"""

import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsa_jax.checkpoint.files import refuse_lfs_pointer

if TYPE_CHECKING:
    import numpy as np

    from dsa_jax.config import ModelConfig

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def checked_folder(folder: Path) -> Path:
    """The folder, which must exist."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: --model takes the folder of a checkpoint")
    return folder


def parse_ids(text: str, config: "ModelConfig") -> tuple[int, ...]:
    """ "1,2,3" -> (1, 2, 3), each an id of the vocabulary."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"token ids are whole numbers separated by commas, as in 1,2,3; got {text!r}")
    outside = [part for part in parts if int(part) >= config.vocab_size]
    if outside:
        raise ValueError(f"token ids must be below vocab_size={config.vocab_size}, got {outside[0]}")
    return tuple(int(part) for part in parts)


def check_tokens(tokens: "np.ndarray", config: "ModelConfig") -> None:
    """tokens: [B T] ids of the vocabulary, T at most max_seq_len."""
    if tokens.ndim != 2 or tokens.size == 0:
        raise ValueError(f"tokens must be [batch, length] with at least one token, got shape {tokens.shape}")
    if tokens.dtype.kind not in "iu":
        raise ValueError(f"token ids must be whole numbers, got an array of {tokens.dtype}")
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        raise ValueError(
            f"token ids must lie in [0, vocab_size={config.vocab_size}), got {tokens.min()} .. "
            f"{tokens.max()}: is this file of numbers from the same model?"
        )
    if tokens.shape[1] > config.max_seq_len:
        raise ValueError(
            f"a sequence must have at most max_seq_len={config.max_seq_len} tokens, got {tokens.shape[1]}"
        )


def read_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer.json, or None if there is none."""
    path = folder / "tokenizer.json"
    if (folder / "dsa_jax.json").is_file():  # `convert` carries it along
        path = folder / "hf" / "tokenizer.json"
    return open_tokenizer(path) if path.is_file() else None


def tokenizer_if_readable(folder: Path) -> Any:
    """As `read_tokenizer`, for output alone: a file that cannot be read gives None and a note on standard error."""
    try:
        return read_tokenizer(folder)
    except ValueError as error:
        print(f"note: {error}; new tokens are printed as ids", file=sys.stderr)
        return None


def open_tokenizer(path: Path) -> Any:
    """The tokenizer in this file. Raises ValueError for a file that is none, OSError for one that is not there."""
    from tokenizers import Tokenizer, __version__

    refuse_lfs_pointer(path)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises no narrower class for a file that it cannot parse
        raise ValueError(
            f"{path} is not a tokenizer that tokenizers {__version__} can read ({error}): download the file again, or "
            "install the version of tokenizers that wrote it"
        ) from error


def encode(text: str, tokenizer: Any, config: "ModelConfig") -> tuple[int, ...]:
    """Token ids of the text, with the begin-of-text token of the config in front."""
    if tokenizer is None:
        raise ValueError(
            "--prompt needs a tokenizer.json in the model's folder, which has none: use --token-ids 1,2,3"
        )
    ids = tuple(tokenizer.encode(text).ids)
    if config.bos_token_id is not None and ids[:1] != (config.bos_token_id,):
        ids = (config.bos_token_id, *ids)
    return ids


def decode(ids: Sequence[int], tokenizer: Any) -> str:
    """Text of the ids; without a tokenizer, the ids themselves."""
    if tokenizer is None:
        return " ".join(str(token) for token in ids)
    return tokenizer.decode(list(ids))


def read_vectors(path: Path) -> "dict[str, np.ndarray]":
    """The arrays of a file of numbers: those of `dsa_jax.parity.compare` and any others."""
    import numpy as np

    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: --vectors takes a .npz file")
    try:
        with path.open("rb") as stream, np.load(stream) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a complete .npz file: {error}") from error
    for name in ("input_ids", "logits"):
        if name not in arrays:
            raise ValueError(f"{path} must hold '{name}', it holds {sorted(arrays)[:8]}")
    return arrays


def parse_size(option: str, text: str) -> int:
    """ "2GiB" -> 2147483648."""
    number = text.strip().rstrip("KMGiBkmgb").strip()
    unit = text.strip()[len(number) :].strip().upper()
    try:
        size = int(float(number) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError) as error:
        raise ValueError(f"{option} takes a size such as 2GiB, 500MB or 1000000, got {text!r}") from error
    if size <= 0:
        raise ValueError(f"{option} must be positive, got {text!r}")
    return size
