"""Operations in NumPy float64, written from the equations one query or one row at a time."""

import numpy as np


def index_scores(q, k, weights, key_start, key_stop, k_scale=None):
    """I[t, s] = k_scale[s] sum_i w[t, i] relu(q[t, i] . k[s]); -inf outside [key_start, key_stop)."""
    q, k, weights = (np.asarray(x, np.float64) for x in (q, k, weights))
    key_start, key_stop = np.asarray(key_start), np.asarray(key_stop)
    B, T = q.shape[:2]
    S = k.shape[1]
    scale = np.ones((B, S)) if k_scale is None else np.asarray(k_scale, np.float64)
    scores = np.full((B, T, S), -np.inf)
    for b in range(B):
        for t in range(T):
            seen = slice(max(key_start[b, t], 0), max(min(key_stop[b, t], S), 0))
            dots = q[b, t] @ k[b, seen].T  # [I, seen]
            scores[b, t, seen] = scale[b, seen] * (weights[b, t] @ np.maximum(dots, 0.0))
    return scores


def select_topk(scores, k, key_start=None, key_stop=None):
    """Stable order by falling score; ascending indices; -1 behind them."""
    scores = np.asarray(scores, np.float64)
    key_start, key_stop = (None if x is None else np.asarray(x) for x in (key_start, key_stop))
    B, T, S = scores.shape
    indices = np.full((B, T, k), -1, np.int32)
    for b in range(B):
        for t in range(T):
            first = 0 if key_start is None else key_start[b, t]
            last = S if key_stop is None else key_stop[b, t]
            visible = [s for s in range(S) if first <= s < last and scores[b, t, s] > -np.inf]
            chosen = sorted(sorted(visible, key=lambda s: (-scores[b, t, s], s))[:k])
            indices[b, t, : len(chosen)] = chosen
    return indices


def sparse_mla(q_latent, q_rope, latent, k_rope, topk_indices, scale):
    """Softmax over the listed keys; the latent is key and value. (out, lse); (0, -inf) without keys."""
    q_latent, q_rope, latent, k_rope = (np.asarray(x, np.float64) for x in (q_latent, q_rope, latent, k_rope))
    topk_indices = np.asarray(topk_indices)
    B, T, N, _ = q_latent.shape
    out = np.zeros(q_latent.shape)
    lse = np.full((B, T, N), -np.inf)
    for b in range(B):
        for t in range(T):
            chosen = [i for i in topk_indices[b, t] if i >= 0]
            if not chosen:
                continue
            c, r = latent[b, chosen], k_rope[b, chosen]
            logits = scale * (q_latent[b, t] @ c.T + q_rope[b, t] @ r.T)
            highest = logits.max(axis=1, keepdims=True)
            p = np.exp(logits - highest)
            lse[b, t] = (np.log(p.sum(axis=1, keepdims=True)) + highest)[:, 0]
            out[b, t] = p / p.sum(axis=1, keepdims=True) @ c
    return out, lse


def grouped_matmul(rows, weights, group_sizes, weight_scales=None):
    """rows[i] @ weights[group of row i]; the scale of weight [x, y] is that of its 128 x 128 block."""
    rows, weights = np.asarray(rows, np.float64), np.asarray(weights, np.float64)
    if weight_scales is not None:
        x, y = np.arange(weights.shape[1]) // 128, np.arange(weights.shape[2]) // 128
        weights = weights * np.asarray(weight_scales, np.float64)[:, x[:, None], y]
    groups = np.repeat(np.arange(len(group_sizes)), group_sizes)
    return np.stack([row @ weights[group] for row, group in zip(rows, groups, strict=False)])
