"""Multi-query associative recall: a key and its value are two tokens."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from train.data.rows import Row
from train.data.synthetic.recall import Recall
from train.data.synthetic.task_rows import BOS, generator, row_of, scatter


@dataclass(frozen=True)
class MultiQueryRecall(Recall):
    """Multi-query associative recall in its usual form (arXiv 2312.04927): a key, then its value as the next token.

        bos  noise k3 v1 noise noise k0 v7 noise ...  noise k0 v7 noise k3 v1 noise ...

    The first part of a row holds the pairs among noise. In the second part n_queries of the keys return, each once
    and also among noise, followed by their values. Noise is shared evenly by both parts. The task takes two
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
        rng = generator(self.seed, index, self.rows)
        keys = 2 + rng.choice(self.n_keys, self.n_pairs, replace=False)
        values = self.first_value + rng.integers(self.n_values, size=self.n_pairs)
        pairs = np.stack([keys, values], 1)
        queries = pairs[rng.permutation(self.n_pairs)[: self.asked]]
        noise = (self.first_value + self.n_values, self.vocab_size)
        n_noise = self.seq_len - 1 - pairs.size - queries.size
        context = scatter(rng, pairs, noise, pairs.size + n_noise // 2)
        tokens = np.concatenate(
            [[BOS], context, scatter(rng, queries, noise, self.seq_len - 1 - len(context))]
        )
        is_key = (tokens >= 2) & (tokens < self.first_value)
        return row_of(tokens, is_key & (np.arange(self.seq_len) > len(context)))
