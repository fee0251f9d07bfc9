"""Tasks with a known answer, as sources of rows (see `train.data.rows`): recall by one layer, by two, over a distance.

Row i follows from the task's seed and i alone. A row is one segment, and only the tokens before an answer have a
target, so cross-entropy and `accuracy` count answers and nothing else.
"""

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import jax
import numpy as np
from jaxtyping import Int, Shaped

from train.data.rows import Row, RowSource

PAD, BOS = 0, 1  # ids in AssociativeRecall and MultiQueryRecall


def accuracy(
    predictions: Shaped[np.ndarray | jax.Array, "..."], targets: Int[np.ndarray | jax.Array, "..."]
) -> float:
    """Share of the positions with a target (>= 0) that are right.

    predictions: token ids of the targets' shape, or logits with a last axis V. Raises ValueError on other shapes and
    where no position has a target.
    """
    predictions, targets = np.asarray(predictions), np.asarray(targets)
    if predictions.ndim == targets.ndim + 1:
        predictions = predictions.argmax(-1)
    if predictions.shape != targets.shape:
        raise ValueError(
            f"predictions must have the targets' shape {targets.shape}, or one axis more, got {predictions.shape}"
        )
    asked = targets >= 0
    if not asked.any():
        raise ValueError("accuracy needs a position with a target, all targets are -1")
    return float((predictions == targets)[asked].mean())


def _check_positive(task: object, *names: str) -> None:
    for name in names:
        if getattr(task, name) < 1:
            raise ValueError(f"{type(task).__name__}.{name} must be positive, got {getattr(task, name)}")


def _generator(seed: int, index: int, rows: int) -> np.random.Generator:
    """Randomness of row `index`. Raises IndexError beyond the source's rows, which ends a loop over it."""
    if not 0 <= index < rows:
        raise IndexError(f"row must be in 0 ... {rows - 1}, got {index}")
    return np.random.default_rng([seed, index])


def _scatter(
    rng: np.random.Generator, items: Int[np.ndarray, "M W"], noise: tuple[int, int], length: int
) -> Int[np.ndarray, "T"]:
    """[length] noise, drawn from ids noise[0] ... noise[1] - 1, with the items in their order at random places."""
    n_items, width = items.shape
    n_noise = length - items.size
    filler = rng.integers(*noise, n_noise)
    places = np.sort(rng.choice(n_noise + n_items, n_items, replace=False)) - np.arange(n_items)
    return np.insert(filler, np.repeat(places, width), items.ravel())


def _row(tokens: np.ndarray, asked: np.ndarray) -> Row:
    """A row of one segment with a target only where `asked`: the token that follows."""
    following = np.append(tokens[1:], -1)
    return {
        "tokens": tokens.astype(np.int32),
        "targets": np.where(asked, following, -1).astype(np.int32),
        "segment_ids": np.ones(len(tokens), np.int32),
    }


def _check_pairs(n_pairs: int, n_keys: int, asked: int) -> None:
    if n_pairs > n_keys:
        raise ValueError(
            f"the keys of a row are distinct: n_pairs must not exceed n_keys, got {n_pairs} > {n_keys}"
        )
    if not 1 <= asked <= n_pairs:
        raise ValueError(f"n_queries must be in 1 ... n_pairs = {n_pairs}, got {asked}")


@dataclass(frozen=True)
class _Recall:
    """What both forms of recall share: sizes of a row, and ``rows``, the length of the source.

    Raises ValueError where the sizes do not fit a row of seq_len.
    """

    seq_len: int
    n_keys: int
    n_values: int
    n_pairs: int
    seed: int = 0
    _: KW_ONLY
    n_queries: int | None = None
    """Keys asked; None = all n_pairs."""
    n_noise: int = 16
    rows: int = 2**20

    pair_tokens: ClassVar[int] = 1

    def __post_init__(self) -> None:
        _check_positive(self, "n_keys", "n_values", "n_pairs", "n_noise", "rows")
        _check_pairs(self.n_pairs, self.n_keys, self.asked)
        least = 1 + self.pair_tokens * self.n_pairs + 2 * self.asked
        if self.seq_len < least:
            raise ValueError(
                f"seq_len must hold bos, pairs and queries, at least {least}, got {self.seq_len}"
            )

    @property
    def asked(self) -> int:
        """Queries in a row."""
        return self.n_pairs if self.n_queries is None else self.n_queries

    def __len__(self) -> int:
        return self.rows


@dataclass(frozen=True)
class AssociativeRecall(_Recall):
    """Key-value pairs in one token each, then keys: what was the value? One attention layer is enough.

        bos  noise pair(k3, v1) noise noise pair(k0, v7) ...  query(k0) answer(v7)  query(k3) answer(v1) ...

    Every row has n_pairs distinct keys with random values among noise tokens, and ends with n_queries of the keys,
    each asked once. Ids: 0 pad, 1 bos, pairs (n_keys n_values), queries (n_keys), answers (n_values), noise (n_noise).
    Guessing is right 1 / n_values of the time.
    """

    @property
    def first_query(self) -> int:
        """Id of the query for key 0; pair(key, value) is 2 + key n_values + value."""
        return 2 + self.n_keys * self.n_values

    @property
    def first_answer(self) -> int:
        """Id of the answer for value 0."""
        return self.first_query + self.n_keys

    @property
    def vocab_size(self) -> int:
        """Ids used, 0 ... vocab_size - 1."""
        return self.first_answer + self.n_values + self.n_noise

    def __getitem__(self, index: int) -> Row:
        rng = _generator(self.seed, index, self.rows)
        keys = rng.choice(self.n_keys, self.n_pairs, replace=False)
        values = rng.integers(self.n_values, size=self.n_pairs)
        pairs = 2 + keys * self.n_values + values
        noise = (self.vocab_size - self.n_noise, self.vocab_size)
        context = _scatter(rng, pairs[:, None], noise, self.seq_len - 1 - 2 * self.asked)
        chosen = rng.permutation(self.n_pairs)[: self.asked]
        queries = np.stack([self.first_query + keys[chosen], self.first_answer + values[chosen]], 1)
        tokens = np.concatenate([[BOS], context, queries.ravel()])
        return _row(tokens, (tokens >= self.first_query) & (tokens < self.first_answer))


@dataclass(frozen=True)
class MultiQueryRecall(_Recall):
    """Multi-query associative recall in its usual form (arXiv 2312.04927): a key, then its value as the next token.

        bos  noise k3 v1 noise noise k0 v7 noise ...  noise k0 v7 noise k3 v1 noise ...

    The pairs stand among noise in the first part of the row; in the second, also among noise, n_queries of the
    keys return, each once, to be followed by their values. Noise is shared evenly by both parts. It takes two
    layers: one joins a value with the key before it, the next looks the key up. Ids: 0 pad, 1 bos,
    keys (n_keys), values (n_values), noise (n_noise).
    """

    pair_tokens: ClassVar[int] = 2

    @property
    def first_value(self) -> int:
        """Id of value 0; key 0 is 2."""
        return 2 + self.n_keys

    @property
    def vocab_size(self) -> int:
        """Ids used, 0 ... vocab_size - 1."""
        return self.first_value + self.n_values + self.n_noise

    def __getitem__(self, index: int) -> Row:
        rng = _generator(self.seed, index, self.rows)
        keys = 2 + rng.choice(self.n_keys, self.n_pairs, replace=False)
        values = self.first_value + rng.integers(self.n_values, size=self.n_pairs)
        pairs = np.stack([keys, values], 1)
        queries = pairs[rng.permutation(self.n_pairs)[: self.asked]]
        noise = (self.first_value + self.n_values, self.vocab_size)
        n_noise = self.seq_len - 1 - pairs.size - queries.size
        context = _scatter(rng, pairs, noise, pairs.size + n_noise // 2)
        tokens = np.concatenate(
            [[BOS], context, _scatter(rng, queries, noise, self.seq_len - 1 - len(context))]
        )
        is_key = (tokens >= 2) & (tokens < self.first_value)
        return _row(tokens, is_key & (np.arange(self.seq_len) > len(context)))


@dataclass(frozen=True)
class Needles:
    """Facts hidden in a long text and asked for at its end.

        text ... [marker key value] ... text ... [marker key value] ... text  [query_marker key value] ...

    haystack: rows of text (`train.data.rows.PackedRows`), concatenated where one is too short; None = random keys and
    values, so that only the marker tells a needle from its surroundings. A row is one segment even when its
    text comes from several documents: a query must be able to see its needle.
    Keys are ids first_key ... first_key + n_keys - 1, distinct in a row; values the same way, not distinct. The
    markers are by default the first two reserved tokens of `train.data.prepare`.
    depth: None puts every needle at a random place; a number from 0 (start of the text) to 1 (its end) puts the
    needle that is asked there and the others at random: for evaluation by depth.
    first_fact: None as above. An id: key and value of a needle are one token, first_fact + key n_values + value (both
    counted from 0), so that one layer of attention can look a value up; queries and answers stay as they are.
    Guessing is right 1 / n_values of the time.
    Raises ValueError where sizes or ids contradict each other, or where the text contains a marker or a fact.
    """

    haystack: RowSource | None
    seq_len: int
    n_needles: int
    first_key: int
    n_keys: int
    first_value: int
    n_values: int
    seed: int = 0
    _: KW_ONLY
    marker: int = 3
    query_marker: int = 4
    depth: float | None = None
    n_queries: int | None = None
    """Needles asked, in random order; None = all of them, or the one at `depth`."""
    text_loss: bool = False
    """Whether the text's tokens are targets too, where the haystack has them so."""
    first_fact: int | None = None
    rows: int = 2**20

    def __post_init__(self) -> None:
        _check_positive(self, "n_needles", "n_keys", "n_values", "rows")
        if min(self.first_key, self.first_value, self.marker, self.query_marker) < 0:
            raise ValueError(
                "first_key, first_value, marker and query_marker are token ids, so not negative, got "
                f"{self.first_key}, {self.first_value}, {self.marker}, {self.query_marker}"
            )
        if self.marker == self.query_marker:
            raise ValueError(f"marker and query_marker must differ, both are {self.marker}")
        for name in ("marker", "query_marker"):
            if any(getattr(self, name) in ids for ids in (self.keys, self.values, self.facts)):
                raise ValueError(
                    f"{name} must not be a key, a value or a fact, got {getattr(self, name)} in {self.keys}, "
                    f"{self.values} or {self.facts}"
                )
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise ValueError(f"depth must be in 0 ... 1, got {self.depth}")
        if self.depth is not None and self.asked != 1:
            raise ValueError(f"with a depth one needle is asked, so n_queries must be 1, got {self.asked}")
        if self.text_loss and self.haystack is None:
            raise ValueError("text_loss needs text to learn: give a haystack, got None")
        _check_pairs(self.n_needles, self.n_keys, self.asked)
        if self.n_text < 1:
            least = self.needle_tokens * self.n_needles + 3 * self.asked + 1
            raise ValueError(
                f"seq_len must hold needles, queries and text, at least {least}, got {self.seq_len}"
            )

    @property
    def keys(self) -> range:
        """Ids of the keys."""
        return range(self.first_key, self.first_key + self.n_keys)

    @property
    def values(self) -> range:
        """Ids of the values."""
        return range(self.first_value, self.first_value + self.n_values)

    @property
    def facts(self) -> range:
        """Ids of key and value in one token; none without ``first_fact``."""
        first = self.first_fact or 0
        return range(first, first + (0 if self.first_fact is None else self.n_keys * self.n_values))

    @property
    def needle_tokens(self) -> int:
        """Tokens of a needle, its marker among them."""
        return 3 if self.first_fact is None else 2

    @property
    def asked(self) -> int:
        """Queries in a row."""
        if self.n_queries is None:
            return self.n_needles if self.depth is None else 1
        return self.n_queries

    @property
    def n_text(self) -> int:
        """Tokens of text in a row."""
        return self.seq_len - self.needle_tokens * self.n_needles - 3 * self.asked

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> Row:
        rng = _generator(self.seed, index, self.rows)
        places, chosen, keys, values = self._needles(rng)
        text, text_targets = self._text(rng, index)
        needles = np.stack([np.full(self.n_needles, self.marker), keys, values], 1)
        if self.first_fact is not None:
            fact = self.first_fact + (keys - self.first_key) * self.n_values + values - self.first_value
            needles = np.stack([needles[:, 0], fact], 1)
        queries = np.stack([np.full(self.asked, self.query_marker), keys[chosen], values[chosen]], 1)
        at = np.repeat(places, self.needle_tokens)
        tokens = np.concatenate([np.insert(text, at, needles.ravel()), queries.ravel()])
        asked = np.zeros(self.seq_len, bool)
        asked[self._answer_positions()] = True
        if self.text_loss:
            # A text token counts where its own next token still follows it, so not before a needle.
            kept = np.concatenate([np.insert(text_targets, at, -1), np.full(queries.size, -1)])
            asked |= (kept >= 0) & (kept == np.append(tokens[1:], -1))
        return _row(tokens, asked)

    def answers(self, index: int) -> dict[str, np.ndarray]:
        """Where row `index` is asked, and how far away the answers lie.

        positions [Q]: of the last token of each query, where `targets` has the answer. depths [Q]: place of the
        needle in the text, 0 ... 1. distances [Q]: tokens from the needle's value to that position.
        """
        places, chosen, _, _ = self._needles(_generator(self.seed, index, self.rows))
        positions = self._answer_positions()
        value_at = places + self.needle_tokens * (np.arange(self.n_needles) + 1) - 1
        return {
            "positions": positions,
            "depths": places[chosen] / self.n_text,
            "distances": positions - value_at[chosen],
        }

    def _answer_positions(self) -> Int[np.ndarray, " Q"]:
        """[Q] positions of the queries' keys, the last but one of three tokens each."""
        return self.seq_len - 3 * np.arange(self.asked, 0, -1) + 1

    def _needles(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """places [M] in the text, ascending; chosen [Q], which of them are asked; keys [M]; values [M]."""
        places = rng.integers(self.n_text + 1, size=self.n_needles)
        chosen = rng.permutation(self.n_needles)[: self.asked]
        if self.depth is not None:
            places[chosen] = round(self.depth * self.n_text)
        order = np.argsort(places, kind="stable")
        rank = np.argsort(order)
        keys = self.first_key + rng.choice(self.n_keys, self.n_needles, replace=False)
        return (
            places[order],
            rank[chosen],
            keys,
            self.first_value + rng.integers(self.n_values, size=self.n_needles),
        )

    def _text(self, rng: np.random.Generator, index: int) -> tuple[np.ndarray, np.ndarray]:
        """tokens [n_text] and their targets in the haystack [n_text], without padding."""
        if self.haystack is None:
            return rng.choice([*self.keys, *self.values], self.n_text), np.full(self.n_text, -1)
        tokens: list[np.ndarray] = []
        targets: list[np.ndarray] = []
        n_read = n_tokens = 0
        while n_tokens < self.n_text:
            if n_read == len(self.haystack) and n_tokens == 0:
                raise ValueError(f"the haystack must have text, its {n_read} rows are empty or padding")
            row = self.haystack[(index + n_read) % len(self.haystack)]
            real = row["segment_ids"] > 0
            tokens.append(row["tokens"][real])
            targets.append(row["targets"][real])
            n_read += 1
            n_tokens += len(tokens[-1])
        text = np.concatenate(tokens)[: self.n_text]
        for name in ("marker", "query_marker"):
            if (text == getattr(self, name)).any():
                raise ValueError(
                    f"the haystack must not contain {name} {getattr(self, name)}, its row {index} does"
                )
        if ((text >= self.facts.start) & (text < self.facts.stop)).any():
            raise ValueError(f"the haystack must not contain facts {self.facts}, its row {index} does")
        return text, np.concatenate(targets)[: self.n_text]
