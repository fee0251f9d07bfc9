"""What both forms of recall share: the sizes of a row."""

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

from train.data.synthetic.task_rows import check_pairs, check_positive


@dataclass(frozen=True)
class Recall:
    """Sizes of a row of ``seq_len`` tokens; ``rows`` is the length of the source.

    Raises:
      ValueError: the pairs and queries do not fit a row.
    """

    seq_len: int
    n_keys: int
    n_values: int
    n_pairs: int
    seed: int = 0
    _: KW_ONLY
    n_queries: int | None = None
    """Keys asked for; None = all n_pairs."""
    n_noise: int = 16
    rows: int = 2**20

    pair_tokens: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_positive(self, "n_keys", "n_values", "n_pairs", "n_noise", "rows")
        check_pairs(self.n_pairs, self.n_keys, self.asked)
        least = 1 + self.pair_tokens * self.n_pairs + 2 * self.asked
        if self.seq_len < least:
            raise ValueError(
                f"seq_len must hold bos, pairs and queries, at least {least}, got {self.seq_len}"
            )

    @property
    def asked(self) -> int:
        """Queries per row."""
        return self.n_pairs if self.n_queries is None else self.n_queries

    def __len__(self) -> int:
        return self.rows
