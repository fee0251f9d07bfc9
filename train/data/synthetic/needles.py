"""Facts hidden in a long text and asked for at its end."""

from dataclasses import KW_ONLY, dataclass

import numpy as np
from jaxtyping import Int

from train.data.rows import Row, RowSource
from train.data.synthetic.task_rows import check_pairs, check_positive, generator, row_of


@dataclass(frozen=True)
class Needles:
    """Facts hidden in a long text and asked for at its end.

        text ... [marker key value] ... text ... [marker key value] ... text  [query_marker key value] ...

    haystack: rows of text (``train.data.rows.PackedRows``), concatenated where one is too short. None: random keys
    and values, so that only the marker tells a needle from its surroundings. A row is one segment even when its
    text comes from several documents, because a query must see its needle.
    Keys are ids first_key ... first_key + n_keys - 1, distinct within a row. Values are chosen in the same way but may
    repeat. The default markers are the first two reserved tokens of ``train.data.prepare``.
    depth: None puts every needle at a random position. A number from 0 (start of the text) to 1 (its end) is the
    depth of the needle asked for; the others stay random. This is for evaluation by depth.
    first_fact: None as above. An id: key and value of a needle are one token, first_fact + key n_values + value (both
    counted from 0), so that one attention layer can look a value up; queries and answers do not change.
    A guess is right 1 / n_values of the time.

    Raises:
      ValueError: sizes or ids contradict each other, or the text contains a marker or a fact.
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
    """Needles asked for, in random order; None = all of them, or the one at ``depth``."""
    text_loss: bool = False
    """Whether the text's own targets count too."""
    first_fact: int | None = None
    rows: int = 2**20

    def __post_init__(self) -> None:
        check_positive(self, "n_needles", "n_keys", "n_values", "rows")
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
            raise ValueError(
                f"with a depth one needle is asked for, so n_queries must be 1, got {self.asked}"
            )
        if self.text_loss and self.haystack is None:
            raise ValueError("text_loss needs text to learn: give a haystack, got None")
        check_pairs(self.n_needles, self.n_keys, self.asked)
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
        """Ids of facts, key and value in one token; empty without ``first_fact``."""
        first = self.first_fact or 0
        return range(first, first + (0 if self.first_fact is None else self.n_keys * self.n_values))

    @property
    def needle_tokens(self) -> int:
        """Tokens per needle, including its marker."""
        return 3 if self.first_fact is None else 2

    @property
    def asked(self) -> int:
        """Queries per row."""
        if self.n_queries is None:
            return self.n_needles if self.depth is None else 1
        return self.n_queries

    @property
    def n_text(self) -> int:
        """Tokens of text per row."""
        return self.seq_len - self.needle_tokens * self.n_needles - 3 * self.asked

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> Row:
        rng = generator(self.seed, index, self.rows)
        needle_at, chosen, keys, values = self._needles(rng)
        text, text_targets = self._text(rng, index)
        needles = np.stack([np.full(self.n_needles, self.marker), keys, values], 1)
        if self.first_fact is not None:
            fact = self.first_fact + (keys - self.first_key) * self.n_values + values - self.first_value
            needles = np.stack([needles[:, 0], fact], 1)
        queries = np.stack([np.full(self.asked, self.query_marker), keys[chosen], values[chosen]], 1)
        at = np.repeat(needle_at, self.needle_tokens)
        tokens = np.concatenate([np.insert(text, at, needles.ravel()), queries.ravel()])
        asked = np.zeros(self.seq_len, bool)
        asked[self._answer_positions()] = True
        if self.text_loss:
            # A text token has a target only if the same token still follows it: not right before a needle.
            kept = np.concatenate([np.insert(text_targets, at, -1), np.full(queries.size, -1)])
            asked |= (kept >= 0) & (kept == np.append(tokens[1:], -1))
        return row_of(tokens, asked)

    def answers(self, index: int) -> dict[str, np.ndarray]:
        """The queries of row ``index``, and how far away their answers are.

        positions [Q]: last token of each query, where ``targets`` has the answer. depths [Q]: the needle's position
        in the text, 0 ... 1. distances [Q]: tokens from the needle's value to ``positions``.
        """
        needle_at, chosen, _, _ = self._needles(generator(self.seed, index, self.rows))
        positions = self._answer_positions()
        value_at = needle_at + self.needle_tokens * (np.arange(self.n_needles) + 1) - 1
        return {
            "positions": positions,
            "depths": needle_at[chosen] / self.n_text,
            "distances": positions - value_at[chosen],
        }

    def _answer_positions(self) -> Int[np.ndarray, " Q"]:
        """[Q] positions of the queries' keys: the middle of three tokens each."""
        return self.seq_len - 3 * np.arange(self.asked, 0, -1) + 1

    def _needles(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """needle_at [M] in the text, ascending; chosen [Q], those asked for; keys [M]; values [M]."""
        needle_at = rng.integers(self.n_text + 1, size=self.n_needles)
        chosen = rng.permutation(self.n_needles)[: self.asked]
        if self.depth is not None:
            needle_at[chosen] = round(self.depth * self.n_text)
        order = np.argsort(needle_at, kind="stable")
        rank = np.argsort(order)
        keys = self.first_key + rng.choice(self.n_keys, self.n_needles, replace=False)
        return (
            needle_at[order],
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
