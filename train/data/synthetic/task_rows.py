"""What the tasks share: randomness per row, items placed among noise, the finished row, and checks of sizes."""

import numpy as np
from jaxtyping import Int

from train.data.rows import Row

PAD, BOS = 0, 1  # ids in AssociativeRecall and MultiQueryRecall


def check_positive(task: object, *names: str) -> None:
    """Raises ValueError for a field of ``task`` below 1."""
    for name in names:
        if getattr(task, name) < 1:
            raise ValueError(f"{type(task).__name__}.{name} must be positive, got {getattr(task, name)}")


def check_pairs(n_pairs: int, n_keys: int, asked: int) -> None:
    """Raises ValueError unless a row can have ``n_pairs`` distinct keys and ask for ``asked`` of them."""
    if n_pairs > n_keys:
        raise ValueError(
            f"the keys of a row are distinct: n_pairs must not exceed n_keys, got {n_pairs} > {n_keys}"
        )
    if not 1 <= asked <= n_pairs:
        raise ValueError(f"n_queries must be in 1 ... n_pairs = {n_pairs}, got {asked}")


def generator(seed: int, index: int, rows: int) -> np.random.Generator:
    """Randomness of row ``index``. Raises IndexError outside the source's rows, which ends a loop over it."""
    if not 0 <= index < rows:
        raise IndexError(f"row must be in 0 ... {rows - 1}, got {index}")
    return np.random.default_rng([seed, index])


def scatter(
    rng: np.random.Generator, items: Int[np.ndarray, "M W"], noise: tuple[int, int], length: int
) -> Int[np.ndarray, "T"]:
    """[length] ids: the items, in order, at random positions among noise from noise[0] ... noise[1] - 1."""
    n_items, width = items.shape
    n_noise = length - items.size
    filler = rng.integers(*noise, n_noise)
    positions = np.sort(rng.choice(n_noise + n_items, n_items, replace=False)) - np.arange(n_items)
    return np.insert(filler, np.repeat(positions, width), items.ravel())


def row_of(tokens: np.ndarray, asked: np.ndarray) -> Row:
    """A row of one segment. Where ``asked``, the target is the next token; elsewhere there is none."""
    following = np.append(tokens[1:], -1)
    return {
        "tokens": tokens.astype(np.int32),
        "targets": np.where(asked, following, -1).astype(np.int32),
        "segment_ids": np.ones(len(tokens), np.int32),
    }
