"""Gradient accumulation: a batch in parts gives the step of the whole batch."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from dsa_jax.sharding import make_mesh
from tests.train.small import CONFIG, T, batch_of, initial, small_run
from train.config import MeshSpec, contradictions, dense, indexer_warmup, sparse, to_json
from train.optimizer import make_optimizer, split
from train.placement import RunSharding
from train.step import begin_stage, compiled_step

# Rows with very different numbers of targets, so that a mean of the parts' means is not the mean.
BATCH = batch_of([T], [5, 4], [12, 20], [2])
STAGES = {
    "dense": dense(10, lr=1e-3, bias_step=0.01),
    "indexer_warmup": indexer_warmup(10, index_lr=1e-3),
    "sparse": sparse(10, lr=1e-3, index_lr=1e-3, bias_step=0.01),
}


def assert_same_step(got, want, tolerance):
    """Moments, which hold the gradients, and metrics agree; the router's bias, which moves by a sign, is equal.

    Parameters are not compared: Adam turns the rounding of a gradient near 0 into a whole step.
    """
    (state, metrics), (expected, expected_metrics) = got, want
    pairs = (state.opt_state, metrics), (expected.opt_state, expected_metrics)
    for x, y in zip(*map(jax.tree.leaves, pairs), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y)
    biases = [
        {path: leaf for path, leaf in traverse_util.flatten_dict(s.params).items() if path[-1] == "gate_bias"}
        for s in (state, expected)
    ]
    assert biases[0]
    chex.assert_trees_all_equal(*biases)


def step(stage, accumulate, mesh=None):
    start = begin_stage(jnp.int32(0), initial(), stage)
    return compiled_step(CONFIG, stage, 0.0, mesh, accumulate)(jax.tree.map(jnp.copy, start), BATCH)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("sparse", 2),
        pytest.param("dense", 4, marks=pytest.mark.slow),
        pytest.param("indexer_warmup", 2, marks=pytest.mark.slow),
    ],
)
def test_parts_give_the_step_of_the_whole_batch(name, parts):
    assert_same_step(step(STAGES[name], parts), step(STAGES[name], 1), 2e-5)


@pytest.mark.slow
@pytest.mark.devices(8)
def test_on_a_mesh():
    mesh = make_mesh(data=2, devices=jax.devices()[:2])
    stage = STAGES["sparse"]
    whole = step(stage, 1)
    with jax.set_mesh(mesh):
        assert_same_step(step(stage, 2, mesh), whole, 2e-5)


def test_what_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="batch must be a multiple of accumulate, got 6 rows in 4 parts"):
        small_run(batch=6, accumulate=4)


@pytest.mark.devices(8)
def test_parts_that_a_mesh_does_not_divide_are_refused():
    run = small_run(batch=jax.device_count() * 2, mesh=MeshSpec(), accumulate=4)
    with pytest.raises(ValueError, match="batch|rows"):
        RunSharding(run)


def test_a_run_may_be_resumed_in_more_parts():
    run = small_run(batch=4)
    assert not contradictions(to_json(run), dataclasses.replace(run, accumulate=2))
    assert contradictions(to_json(run), dataclasses.replace(run, batch=2))


def test_a_run_that_was_stored_without_a_new_field_is_not_contradicted():
    run = small_run()
    stored = to_json(run)
    del stored["accumulate"], stored["stages"][0]["first_moment"]
    assert not contradictions(stored, run)


@pytest.mark.slow
def test_the_first_moment_in_bfloat16_halves_it_and_trains_alike():
    stage = dataclasses.replace(STAGES["dense"], first_moment="bfloat16")
    state = make_optimizer(stage).init(split(initial(), stage)[0])
    sizes = {leaf.dtype: 0 for leaf in jax.tree.leaves(state)}
    for leaf in jax.tree.leaves(state):
        sizes[leaf.dtype] += leaf.size
    assert sizes[jnp.dtype(jnp.bfloat16)] > 0.49 * sum(sizes.values())
    (after, _), (expected, _) = step(stage, 1), step(STAGES["dense"], 1)
    moved = [
        jnp.concatenate(
            [(x - y).ravel() for x, y in zip(*map(jax.tree.leaves, (s.params, initial())), strict=True)]
        )
        for s in (after, expected)
    ]
    assert jnp.linalg.norm(moved[0] - moved[1]) < 5e-3 * jnp.linalg.norm(moved[1])
