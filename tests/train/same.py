"""Trees compared to the last bit, with the path of what differs."""

from typing import Any

import chex
import jax
import numpy as np


def same_bits(a: Any, b: Any) -> bool:
    """Whether two arrays have the same dtype, shape and bytes (unlike ==, which takes 0.0 and -0.0 for equal)."""
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def assert_same_bits(got: Any, want: Any) -> None:
    """Fails with the path of the first leaf of two trees whose structure, shape, dtype or bytes differ."""
    got, want = (jax.tree.map(np.asarray, tree) for tree in (got, want))
    chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
    bytes_of = lambda x: np.frombuffer(x.tobytes(), np.uint8)  # noqa: E731
    chex.assert_trees_all_equal(jax.tree.map(bytes_of, got), jax.tree.map(bytes_of, want))
