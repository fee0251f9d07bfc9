"""select_topk: the exact, deterministic choice of the best keys of every query."""

import jax

from pallas_kernels.dispatch import Implementations, Kernel, dispatch
from pallas_kernels.hopper.versions import HOPPER_TESTED_JAX
from pallas_kernels.select_topk import xla

_IMPLEMENTATIONS: Implementations = {
    "xla": xla.select_topk,
    "mosaic_gpu": Kernel("pallas_kernels.select_topk.mosaic_gpu", "select_topk", tested=HOPPER_TESTED_JAX),
}


def select_topk(
    scores: jax.Array,
    k: int,
    *,
    key_start: jax.Array | None = None,
    key_stop: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Indices of the ``k`` largest scores of every row, ascending, padded at the end with -1.

    Equivalent to, for one row:

        order = sorted(range(S), key=lambda s: (-scores[s], s))       # ties: the lowest index first
        chosen = [s for s in order if scores[s] > -inf and start <= s < stop][:k]
        return sorted(chosen) + [-1] * (k - len(chosen))

    Exact: no approximation, no extra keys at ties, the same on every run. -0.0 equals 0.0; ties are common, because
    ReLU makes many scores exactly 0. A NaN ranks above every number, so that a broken score is not hidden.
    Not differentiable: no gradient flows to ``scores``.

    Args:
      scores: [B T S] float32; -inf marks a key that must not be chosen.
      k: how many keys to keep, >= 1; may exceed S.
      key_start, key_stop: [B T] int32. Keys outside the interval are not chosen, and their scores may be
        uninitialised. None: only -inf marks keys that are not visible.
      implementation: see ``pallas_kernels.dispatch``.

    Returns:
      [B T K] int32.

    Raises:
      ValueError: k < 1, wrong shapes, or only one of key_start and key_stop.

    Source: DeepSeek-V3.2-Exp report, eq. (2).
    """
    if scores.ndim != 3:
        raise ValueError(f"scores must have shape [B T S], got {scores.shape}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k=}")
    if (key_start is None) != (key_stop is None):
        raise ValueError("key_start and key_stop must be given together, got only one of them")
    for name, array in (("key_start", key_start), ("key_stop", key_stop)):
        if array is not None and array.shape != scores.shape[:2]:
            raise ValueError(f"{name} must have shape {scores.shape[:2]}, got {array.shape}")
    return dispatch("select_topk", _IMPLEMENTATIONS, implementation, scores, k, key_start, key_stop)
