"""How far two arrays of two runs are apart: differences, sets, distributions. Plain NumPy, no model."""

import math

import numpy as np

NO_SCORE = -1e30
"""An index score at or below this is a mask, whether written as -inf or as the lowest finite number."""


def unmasked(scores: np.ndarray) -> np.ndarray:
    """Where a score is no mask. A NaN is none: it counts as a score, which nothing equals."""
    return ~(scores <= NO_SCORE)


def max_difference(ours: np.ndarray, reference: np.ndarray) -> float:
    """Largest absolute difference; NaN in either array gives NaN."""
    with np.errstate(invalid="ignore"):  # inf - inf
        differences = np.abs(ours.astype(np.float32) - reference.astype(np.float32))
    return float(np.max(differences, initial=0.0))


def membership(indices: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """topk [B T K] -> [B T S] bool, true where a visible key was selected; -1 selects nothing."""
    n_keys = visible.shape[-1]
    if indices.size and not (-1 <= indices.min() and indices.max() < n_keys):
        raise ValueError(
            f"top-k indices lie in [{indices.min()}, {indices.max()}] but there are {n_keys} keys: "
            "use 0 .. keys-1, or -1 for no key"
        )
    selected = np.zeros((*visible.shape[:-1], n_keys + 1), dtype=bool)  # the last column catches -1
    np.put_along_axis(selected, indices.astype(np.int64), True, axis=-1)
    return selected[..., :-1] & visible


def topk_row(ours: np.ndarray, reference: np.ndarray, scores: np.ndarray | None) -> dict[str, float | None]:
    """Compares selected sets.

    ours, reference: [B T K] key indices. scores: [B T S] index scores of the reference, or None: then query
    t sees the keys 0 .. t. `topk_gap` is the score gap between the lowest selected and the highest rejected key
    of the reference, the largest over the rows whose sets differ: about 1e-7 is a rounding tie, much more is a
    wrong selection.
    """
    if scores is None:
        n_tokens = ours.shape[1]
        visible = np.broadcast_to(
            np.tril(np.ones((n_tokens, n_tokens), bool)), (ours.shape[0], n_tokens, n_tokens)
        )
    else:
        visible = unmasked(scores)
    mine, theirs = membership(ours, visible), membership(reference, visible)
    size = theirs.sum(-1)
    overlap = np.where(
        size > 0, (mine & theirs).sum(-1) / np.maximum(size, 1), (mine.sum(-1) == 0).astype(float)
    )
    equal = (mine == theirs).all(-1)
    gap = None
    if scores is not None and not equal.all():
        row_scores, row_selected, row_visible = scores[~equal], theirs[~equal], visible[~equal]
        lowest_selected = np.min(row_scores, axis=-1, where=row_selected, initial=np.inf)
        highest_rejected = np.max(row_scores, axis=-1, where=row_visible & ~row_selected, initial=-np.inf)
        gap = float(np.max(lowest_selected - highest_rejected))
    return {"topk_overlap": float(overlap.mean()), "topk_equal": float(equal.mean()), "topk_gap": gap}


def expert_row(
    our_ids: np.ndarray, our_weights: np.ndarray, ids: np.ndarray, weights: np.ndarray
) -> dict[str, float | None]:
    """Compares selected experts as sets, [tokens A] each, and the weights where the sets agree."""
    width = ids.shape[-1]
    our_order, order = (np.argsort(x.reshape(-1, width), axis=-1) for x in (our_ids, ids))
    equal = (
        np.take_along_axis(our_ids.reshape(-1, width), our_order, -1)
        == np.take_along_axis(ids.reshape(-1, width), order, -1)
    ).all(-1)
    our_sorted = np.take_along_axis(our_weights.reshape(-1, width), our_order, -1)
    sorted_weights = np.take_along_axis(weights.reshape(-1, width), order, -1)
    return {
        "experts_equal": float(equal.mean()),
        "expert_weights": max_difference(our_sorted[equal], sorted_weights[equal]),
    }


def score_difference(ours: np.ndarray, reference: np.ndarray) -> float:
    """Largest difference over the keys that are visible in the reference; inf if ours masks other keys."""
    visible = unmasked(reference)
    if not np.array_equal(unmasked(ours), visible):
        return math.inf
    return max_difference(ours[visible], reference[visible])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, in float64."""
    with np.errstate(invalid="ignore"):  # an infinite logit gives NaN
        shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def mean_kl(ours: np.ndarray, reference: np.ndarray) -> float:
    """Mean KL(reference || ours) over the tokens of [B T V] logits, one sequence at a time."""
    total = 0.0
    for row, reference_row in zip(ours, reference, strict=True):
        log_p = log_softmax(reference_row)
        total += float((np.exp(log_p) * (log_p - log_softmax(row))).sum())
    return total / (ours.shape[0] * ours.shape[1])
