"""The indexer's choice: FP8 operands of the index scores are the numbers that they stand for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as kernels
from dsa_jax.config import tiny
from dsa_jax.indexer import Indexer, index_keys
from dsa_jax.mla import FP8_QUERIES, for_training, prefers_mha, select
from dsa_jax.rope import rotation

CONFIG = tiny(index_fp8=True, index_n_heads=4, dtype="bfloat16")


@functools.cache
def selected(config, T):
    """(topk_indices, index scores, dtype that was multiplied) for T queries over as many keys."""
    draw = lambda seed, width: jax.random.normal(jax.random.key(seed), (2, T, width)).astype(config.dtype)  # noqa: E731
    x, q_compressed = draw(0, config.d_model), draw(1, config.q_lora_rank)
    positions = jnp.broadcast_to(jnp.arange(T), (2, T))
    rope = rotation(positions, config)
    parameters = Indexer(config).init(jax.random.key(2))["params"]
    parameters = {**parameters, **{f"k_norm_{name}": x for name, x in parameters["k_norm"].items()}}
    keys = index_keys(x, rope, parameters, config)
    seen = []

    def spy(q, *args, **kwargs):
        seen.append(q.dtype)
        return index_scores(q, *args, **kwargs)

    index_scores, kernels.index_scores = kernels.index_scores, spy
    try:
        bounds = jnp.zeros_like(positions), positions + 1
        indices, scores = select(x, q_compressed, rope, bounds, keys, parameters, config, with_scores=True)
    finally:
        kernels.index_scores = index_scores
    return np.asarray(indices), np.asarray(scores), seen[0]


def test_fp8_operands_give_the_scores_of_the_values_they_stand_for(monkeypatch):
    indices, scores, dtype = selected(CONFIG, 64)
    assert dtype == jnp.float8_e4m3fn
    monkeypatch.setattr("dsa_jax.mla.FP8_QUERIES", 65)
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
        (CONFIG, FP8_QUERIES - 1),
        (dataclasses.replace(CONFIG, dtype="float32"), 64),
        (dataclasses.replace(CONFIG, index_fp8=False), 64),
    ],
)
def test_few_queries_float32_and_unquantised_indexers_are_not_multiplied_in_fp8(config, T):
    assert selected(config, T)[2] == jnp.dtype(config.dtype)


def test_the_form_is_that_of_fewer_multiplications_where_nothing_has_a_kernel(monkeypatch):
    monkeypatch.setattr("pallas_kernels.sparse_mla_has_kernel", lambda *_: False)
    config = tiny(n_heads=128, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
    config = dataclasses.replace(config, index_topk=2048, max_seq_len=65536)
    assert prefers_mha(config, 4096, 4096) and not prefers_mha(config, 32768, 32768)
    assert not prefers_mha(config, 1, 32768)


def test_with_a_kernel_inference_is_absorbed_and_training_stays(monkeypatch):
    config = tiny(n_heads=128, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
    config = dataclasses.replace(config, index_topk=2048, max_seq_len=65536)
    monkeypatch.setattr("pallas_kernels.sparse_mla_has_kernel", lambda *_: True)
    assert not prefers_mha(config, 4096, 4096)
    assert for_training(config, 4096).attention_form == "mha"
    assert for_training(config, 32768).attention_form == "mqa"
    assert for_training(dataclasses.replace(config, attention_form="mqa"), 4096).attention_form == "mqa"
