"""Low-rank adapters (LoRA, arXiv 2106.09685) next to the frozen matrices.

A run trains through ``adapted``, where the product A B stays beside the matrix. ``merged`` adds it, in float32.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from dsa_jax.adapted import AdaptedWeight
from dsa_jax.fp8.weight import as_matrix
from train.config import Lora

ATTENTION = ("wq_a", "wq_b", "wkv_a", "wkv_b", "wo")
FEED_FORWARD = ("w_gate", "w_up", "w_down")


def with_adapters(params: Any, lora: Lora, rng: jax.Array) -> Any:
    """{"params": tree} -> {"params": tree, "lora": tree}. A is random and B zero, so outputs do not change at first.

    A matrix [... X Y] (stacked over layers and experts) gets "a" [... X rank] and "b" [... rank Y]. Both are float32
    whatever the dtype of the matrix: AdamW's steps are too small for bfloat16.

    Raises:
      ValueError: the rank is not below both dimensions of a matrix.
    """
    targets = ATTENTION + (FEED_FORWARD if lora.experts else ())
    adapters = {}
    for path, leaf in sorted(traverse_util.flatten_dict(params["params"]).items()):
        if path[-1] not in targets or "indexer" in path:
            continue
        *stack, x, y = leaf.shape
        if lora.rank >= min(x, y):
            raise ValueError(
                f"rank must be below both dimensions of {'/'.join(path)}, got {lora.rank} >= {(x, y)}"
            )
        rng, key = jax.random.split(rng)
        adapters[*path, "a"] = jax.random.normal(key, (*stack, x, lora.rank), jnp.float32) * x**-0.5
        adapters[*path, "b"] = jnp.zeros((*stack, lora.rank, y), jnp.float32)
    return {"params": params["params"], "lora": traverse_util.unflatten_dict(adapters)}


def adapted(params: Any, scale: float) -> Any:
    """{"params": tree} with an ``AdaptedWeight`` (W, A, scale * B) for each adapted matrix: what a run computes with.

    ``params`` itself if it has no adapters. Differentiable in the adapters.
    """
    return _beside(params, lambda w, a, b: AdaptedWeight(weight=w, a=a, b=scale * b))


def merged(params: Any, scale: float) -> Any:
    """{"params": tree} with W + scale * A B, in float32, for each adapted matrix; ``params`` itself without adapters.

    The sum is not rounded to the dtype of W, which would lose small adapters. Whoever stores it in fewer bits loses
    what is below half the last bit of W.
    """

    def summed(weight: Any, a: jax.Array, b: jax.Array) -> jax.Array:
        product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        return as_matrix(weight, jnp.dtype(jnp.float32)) + scale * product

    return _beside(params, summed)


def _beside(params: Any, join: Callable[[Any, jax.Array, jax.Array], Any]) -> Any:
    """{"params": tree} with ``join(matrix, a, b)`` in place of each adapted matrix."""
    if "lora" not in params:
        return params
    flat = traverse_util.flatten_dict(params["params"])
    adapters = traverse_util.flatten_dict(params["lora"])
    for path in {path[:-1] for path in adapters}:
        flat[path] = join(flat[path], adapters[*path, "a"], adapters[*path, "b"])
    return {"params": traverse_util.unflatten_dict(flat)}
