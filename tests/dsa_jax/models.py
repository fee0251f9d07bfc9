"""Small models with known weights, shared by the tests of this folder."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from dsa_jax.checkpoint.hf_config import from_hf
from dsa_jax.checkpoint.names import leaf_shapes, tensor_table
from dsa_jax.config import ModelConfig
from tests.vectors import weights as vectors

VECTORS = vectors.__file__.rsplit("/", 1)[0]


def numbers(name: str) -> dict[str, np.ndarray]:
    with np.load(f"{VECTORS}/{name}.npz") as file:
        return dict(file)


def config_of(preset: str, **switches: Any) -> ModelConfig:
    released = {**vectors.CONFIGS[preset], "model_type": "deepseek_v32", "bos_token_id": 0, "eos_token_id": 1}
    return from_hf(released, **{"dtype": "float32", **switches})


@functools.cache
def params_of(preset: str) -> dict[str, Any]:
    """The released tensors of a preset as the model's parameters (the table of names read forwards)."""
    config, released = config_of(preset), vectors.make_weights(preset, mtp=True)
    leaves = {path: np.zeros(shape, np.float32) for path, shape in leaf_shapes(config).items()}
    for name, row in tensor_table(config).items():
        leaves[row.path][row.index] = released[name].T if row.transpose else released[name]
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = jnp.asarray(leaf)
    return {"params": tree}


def tokens_of(preset: str, batch: int = 2, length: int = 64) -> jnp.ndarray:
    return jnp.asarray(vectors.make_tokens(preset, batch=batch, length=length), jnp.int32)
