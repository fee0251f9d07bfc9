"""Associative recall with each key-value pair in one token."""

from dataclasses import dataclass

import numpy as np

from train.data.rows import Row
from train.data.synthetic.recall import Recall
from train.data.synthetic.task_rows import BOS, generator, row_of, scatter


@dataclass(frozen=True)
class AssociativeRecall(Recall):
    """Key-value pairs of one token each, then keys: what was the value? One attention layer is enough.

        bos  noise pair(k3, v1) noise noise pair(k0, v7) ...  query(k0) answer(v7)  query(k3) answer(v1) ...

    A row has n_pairs distinct keys with random values among noise tokens, and ends with n_queries of the keys,
    each asked for once. Ids: 0 pad, 1 bos, pairs (n_keys n_values), queries (n_keys), answers (n_values), noise
    (n_noise). A guess is right 1 / n_values of the time.
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
        rng = generator(self.seed, index, self.rows)
        keys = rng.choice(self.n_keys, self.n_pairs, replace=False)
        values = rng.integers(self.n_values, size=self.n_pairs)
        pairs = 2 + keys * self.n_values + values
        noise = (self.vocab_size - self.n_noise, self.vocab_size)
        context = scatter(rng, pairs[:, None], noise, self.seq_len - 1 - 2 * self.asked)
        chosen = rng.permutation(self.n_pairs)[: self.asked]
        queries = np.stack([self.first_query + keys[chosen], self.first_answer + values[chosen]], 1)
        tokens = np.concatenate([[BOS], context, queries.ravel()])
        return row_of(tokens, (tokens >= self.first_query) & (tokens < self.first_answer))
