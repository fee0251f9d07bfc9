"""What both forms of index_kl share: the indexer's arrays, and the divergence of its scores from a target."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.scipy.special import xlogy
from jaxtyping import Array, Float

from pallas_kernels.arithmetic import exponentials


class Indexer(NamedTuple):
    """The arrays that are learned, or their gradients."""

    q: Float[Array, "B T I J"]
    k: Float[Array, "B S J"]
    weights: Float[Array, "B T I"]


def weighted_sum(kl: Float[Array, "B T"], token_weights: Float[Array, "B T"]) -> Float[Array, ""]:
    """The loss. A query with weight 0 is left out, whatever its kl is, and one without keys whatever its weight."""
    return jnp.where((token_weights == 0) | (kl == 0), 0.0, token_weights * kl).sum()


def normalized(p: Float[Array, "B T X"]) -> Float[Array, "B T X"]:
    """The target: sums to 1, or is 0 where a query has no keys."""
    total = p.sum(axis=-1, keepdims=True)
    return p / jnp.where(total == 0.0, 1.0, total)


def divergence(
    scores: Float[Array, "B T X"], p: Float[Array, "B T X"]
) -> tuple[Float[Array, "B T"], Float[Array, "B T X"]]:
    """KL(p || softmax(scores)), 0 where a query has no keys, and softmax(scores).

    Scores are -inf where there is no key. X is S, or K, the length of a list of keys.
    """
    e, total, lse = exponentials(scores)
    log_softmax = scores - jnp.where(lse == -jnp.inf, 0.0, lse)[..., None]
    kl = (xlogy(p, p) - jnp.where(p > 0, p * log_softmax, 0.0)).sum(axis=-1)
    return kl, e / total
