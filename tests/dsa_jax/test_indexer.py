"""The indexer: FP8 operands give the scores of the values that they stand for, and only where they are asked for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as kernels
from dsa_jax.cache import Queries
from dsa_jax.config import tiny
from dsa_jax.indexer import MIN_QUERIES_FOR_FP8, Indexer, index_keys, select
from dsa_jax.rope import rotation

CONFIG = tiny(index_fp8=True, index_n_heads=4, dtype="bfloat16")


@functools.cache
def selected(config, T):
    """(topk_indices, index scores, dtype of the operands) for T queries over T keys."""
    draw = lambda seed, width: jax.random.normal(jax.random.key(seed), (2, T, width)).astype(config.dtype)  # noqa: E731
    hidden, q_compressed = draw(0, config.d_model), draw(1, config.q_lora_rank)
    positions = jnp.broadcast_to(jnp.arange(T), (2, T))
    rope = rotation(positions, config)
    parameters = Indexer(config).init(jax.random.key(2))["params"]
    keys = index_keys(hidden, rope, parameters, config)
    queries = Queries(hidden, q_compressed, rope, jnp.zeros_like(positions), positions + 1)
    seen = []

    def spy(q, *args, **kwargs):
        seen.append(q.dtype)
        return index_scores(q, *args, **kwargs)

    index_scores, kernels.index_scores = kernels.index_scores, spy
    try:
        indices, scores = select(queries, keys, parameters, config, with_scores=True)
    finally:
        kernels.index_scores = index_scores
    return np.asarray(indices), np.asarray(scores), seen[0]


def test_fp8_operands_give_the_scores_of_the_values_they_stand_for(monkeypatch):
    indices, scores, dtype = selected(CONFIG, 64)
    assert dtype == jnp.float8_e4m3fn
    monkeypatch.setattr("dsa_jax.indexer.MIN_QUERIES_FOR_FP8", 65)
    simulated_indices, simulated, dtype = selected.__wrapped__(CONFIG, 64)
    assert dtype == jnp.bfloat16
    if jax.default_backend() == "gpu":  # whose tensor cores add FP8 products in fewer bits
        seen = np.isfinite(simulated)
        np.testing.assert_array_equal(seen, np.isfinite(scores))
        assert np.abs(scores[seen] - simulated[seen]).max() < 1e-3 * np.abs(simulated[seen]).max()
    else:
        np.testing.assert_array_equal(scores, simulated)
        np.testing.assert_array_equal(indices, simulated_indices)


@pytest.mark.parametrize(
    ("config", "T"),
    [
        (CONFIG, MIN_QUERIES_FOR_FP8 - 1),
        (dataclasses.replace(CONFIG, dtype="float32"), 64),
        (dataclasses.replace(CONFIG, index_fp8=False), 64),
    ],
)
def test_few_queries_float32_and_unquantised_indexers_are_not_multiplied_in_fp8(config, T):
    assert selected(config, T)[2] == jnp.dtype(config.dtype)
