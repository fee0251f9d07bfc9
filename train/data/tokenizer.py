"""The tokenizer of a prepared folder: trained on its text, or made elsewhere, and its special tokens."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsa_jax.checkpoint.files import read_json_object

RESERVED = tuple(f"<|reserved_{i}|>" for i in range(8))  # for tasks, as in train.data.synthetic.Needles
SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>", *RESERVED)  # ids 0, 1, 2, ...
# What begins, ends and pads a document, by the names that are usual: ours, DeepSeek's, Llama's.
ROLES = {
    "bos": ("<|bos|>", "<｜begin▁of▁sentence｜>", "<s>"),
    "eos": ("<|eos|>", "<｜end▁of▁sentence｜>", "</s>"),
    "pad": ("<|pad|>", "<｜▁pad▁｜>", "<pad>"),
}
NAMING_FILES = ("tokenizer_config.json", "special_tokens_map.json")
IDS_FILE = "generation_config.json"

Ids = int | list[int]
"""The token of a role, or several that follow each other, as [gMASK] and <sop> at the beginning of GLM's texts."""


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer whose first ids are SPECIAL_TOKENS.

    It has fewer than vocab_size ids if the text offers no more merges.

    Raises:
      ValueError: as ``check_vocab_size``.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    check_vocab_size(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def check_vocab_size(vocab_size: int) -> None:
    """Raises ValueError for a size that cannot hold all bytes and the special tokens, and for one beyond int32."""
    least = len(SPECIAL_TOKENS) + 256
    if not least <= vocab_size < 2**31:
        raise ValueError(
            f"vocab_size must be below 2**31 and hold all bytes and special tokens, at least {least}, got {vocab_size}"
        )


def special_ids(
    tokenizer: Any, folder: Path | None = None, named: Mapping[str, Sequence[str]] | None = None
) -> dict[str, Ids]:
    """Ids of eos and pad, of bos if there is one, and of those reserved tokens that exist.

    folder: of a tokenizer made elsewhere. Its tokenizer_config.json, special_tokens_map.json and generation_config.json
    say which tokens these are, the first that names a role; if none names any, they are found by their usual names.
    named: role -> texts of its tokens, instead; () for none. Without pad, eos pads: padding takes part in no loss.

    Raises:
      ValueError: a token that is named is not in the vocabulary, or nothing says which one ends a document.
    """
    found = (folder and _of_files(tokenizer, folder)) or _usual(tokenizer)
    for role, tokens in (named or {}).items():
        found[role] = _ids(tokenizer, tokens, f"--{role}-token")
    if not found.get("eos"):
        raise ValueError(
            "the tokenizer must have a token that ends a document: name it, as in --eos-token '<|endoftext|>'"
        )
    found["pad"] = found.get("pad") or found["eos"][-1:]
    if len(found["pad"]) > 1:
        raise ValueError(f"pad must be one token, got {len(found['pad'])}")
    present = {role: found[role] for role in ROLES if found.get(role)}
    ids: dict[str, Ids] = {role: t[0] if len(t) == 1 else t for role, t in present.items()}
    reserved = {name.strip("<|>"): tokenizer.token_to_id(name) for name in RESERVED}
    return ids | {name: token for name, token in reserved.items() if token is not None}


def as_list(ids: Ids | None) -> list[int]:
    """The tokens of a role: none, one or several."""
    return [] if ids is None else [ids] if isinstance(ids, int) else ids


def _ids(tokenizer: Any, tokens: Iterable[str], where: str) -> list[int]:
    ids = []
    for token in tokens:
        if (found := tokenizer.token_to_id(token)) is None:
            raise ValueError(f"{where} is {token!r}, which is no token of the tokenizer")
        ids.append(found)
    return ids


def _usual(tokenizer: Any) -> dict[str, list[int]]:
    ids = {role: [tokenizer.token_to_id(name) for name in names] for role, names in ROLES.items()}
    return {role: [token for token in found if token is not None][:1] for role, found in ids.items()}


def _of_files(tokenizer: Any, folder: Path) -> dict[str, list[int]]:
    """Role -> its token by the files of the folder; a role that none of them names is absent."""
    found: dict[str, list[int]] = {}
    for file in (folder / name for name in NAMING_FILES):
        values = read_json_object(file) if file.exists() else {}
        for role in ROLES:
            value = values.get(f"{role}_token")
            token = value.get("content") if isinstance(value, dict) else value  # of an AddedToken
            if value is None:
                continue
            if not isinstance(token, str):
                raise ValueError(f"{file}: {role}_token must be the text of a token, got {value!r}")
            found.setdefault(role, _ids(tokenizer, [token], f"{role}_token of {file}"))
    file = folder / IDS_FILE
    values = read_json_object(file) if file.exists() else {}
    for role in ROLES:
        value = values.get(f"{role}_token_id")
        # Of several the first ends a document.
        token = value[0] if isinstance(value, list) and value else value
        if value is None:
            continue
        if type(token) is not int or not 0 <= token < 2**32 or tokenizer.id_to_token(token) is None:
            raise ValueError(
                f"{file}: {role}_token_id must be the id of a token of the tokenizer, got {value!r}"
            )
        found.setdefault(role, [token])
    return found
