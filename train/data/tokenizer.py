"""The tokenizer of a prepared folder: trained on its text, or made elsewhere, and its special tokens."""

from collections.abc import Sequence
from typing import Any

RESERVED = tuple(f"<|reserved_{i}|>" for i in range(8))  # for tasks, as in train.data.synthetic.Needles
SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>", *RESERVED)  # ids 0, 1, 2, ...
# Names of bos, eos and pad in a tokenizer made elsewhere: ours, DeepSeek's, Llama's.
ROLES = {
    "bos": ("<|bos|>", "<｜begin▁of▁sentence｜>", "<s>"),
    "eos": ("<|eos|>", "<｜end▁of▁sentence｜>", "</s>"),
    "pad": ("<|pad|>", "<｜▁pad▁｜>", "<pad>"),
}


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer whose first ids are SPECIAL_TOKENS.

    It has fewer than vocab_size ids if the text offers no more merges.

    Raises:
      ValueError: vocab_size cannot hold all bytes and the special tokens.
    """
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
    """Ids of bos, eos and pad, and of those reserved tokens that exist.

    Raises:
      ValueError: bos, eos or pad is missing.
    """
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
