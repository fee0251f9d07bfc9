"""The share of a task's answers that a model predicts."""

import jax
import numpy as np
from jaxtyping import Int, Shaped


def accuracy(
    predictions: Shaped[np.ndarray | jax.Array, "..."], targets: Int[np.ndarray | jax.Array, "..."]
) -> float:
    """Share of the positions with a target (>= 0) that are predicted.

    predictions: token ids in the shape of ``targets``, or logits with a last axis V.

    Raises:
      ValueError: the shapes do not match, or no position has a target.
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
