"""Low-rank adapters (LoRA, arXiv 2106.09685) next to the frozen matrices."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from train.config import Lora

ATTENTION = ("wq_a", "wq_b", "wkv_a", "wkv_b", "wo")
FEED_FORWARD = ("w_gate", "w_up", "w_down")


def with_adapters(params: Any, lora: Lora, rng: jax.Array) -> Any:
    """{"params": tree} -> {"params": tree, "lora": tree}. A is random and B zero, so outputs do not change at first.

    A matrix [... X Y] (stacked over layers and experts) gets "a" [... X rank] and "b" [... rank Y].

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
        adapters[*path, "a"] = jax.random.normal(key, (*stack, x, lora.rank), leaf.dtype) * x**-0.5
        adapters[*path, "b"] = jnp.zeros((*stack, lora.rank, y), leaf.dtype)
    return {"params": params["params"], "lora": traverse_util.unflatten_dict(adapters)}


def merged(params: Any, scale: float) -> Any:
    """{"params": tree} with W + scale * A B for each adapted matrix; ``params`` itself if it has no adapters."""
    if "lora" not in params:
        return params
    flat = traverse_util.flatten_dict(params["params"])
    adapters = traverse_util.flatten_dict(params["lora"])
    for path in {path[:-1] for path in adapters}:
        product = jnp.matmul(adapters[*path, "a"], adapters[*path, "b"])
        flat[path] = flat[path] + (scale * product).astype(flat[path].dtype)
    return {"params": traverse_util.unflatten_dict(flat)}
