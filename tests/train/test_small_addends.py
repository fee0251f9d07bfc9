"""What is added in small steps is kept in float32: a sum in bfloat16 drops an addend below half its last bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from dsa_jax.rope import rotation
from tests.train.small import CONFIG, T, batch_of, initial, small_run
from train.config import Lora, dense, indexer_warmup, sparse
from train.initial import initial_params
from train.loss import cross_entropy
from train.optimizer import group_of, make_optimizer, split
from train.step import begin_stage, move_router_bias, train_step

BF16 = dataclasses.replace(CONFIG, dtype="bfloat16", param_dtype="bfloat16")
STAGES = {
    "dense": dense(2, lr=1e-5),
    "indexer_warmup": indexer_warmup(2, index_lr=1e-5),
    "sparse": sparse(2, lr=1e-5, index_lr=1e-5),
}
CASES = [(stage, lora) for stage in STAGES for lora in (None, Lora(rank=2))]
ids = [f"{stage}{', adapters' if lora else ''}" for stage, lora in CASES]
FLOAT32 = jnp.dtype(jnp.float32)


def shapes_of(stage, lora):
    run = small_run(STAGES[stage], model=BF16, lora=lora)
    return run, jax.eval_shape(lambda: initial_params(run, load=False))


def floats(tree):
    return {jax.tree_util.keystr(path): leaf.dtype for path, leaf in jax.tree.leaves_with_path(tree)
            if jnp.issubdtype(leaf.dtype, jnp.floating)}  # fmt: skip


@pytest.mark.parametrize(("name", "lora"), CASES, ids=ids)
def test_what_a_stage_trains_its_moments_and_its_metrics_are_float32(name, lora):
    """Parameters and arithmetic are in bfloat16 otherwise."""
    run, shapes = shapes_of(name, lora)
    (stage,) = run.stages
    trained, frozen = split(shapes, stage)
    assert set(floats(trained).values()) == {FLOAT32}
    if stage.trains == "indexer" or lora:
        assert jnp.bfloat16 in floats(frozen).values()  # memory is saved where nothing is added
    biases = [leaf.dtype for path, leaf in frozen.items() if group_of(path) == "router_bias"]
    assert biases and set(biases) == {FLOAT32}

    state = jax.eval_shape(lambda params: begin_stage(jnp.int32(0), params, stage), shapes)
    new_state, metrics = jax.eval_shape(lambda s, b: train_step(s, b, BF16, stage, 2.0), state, batch_of([T]))
    for tree in (new_state.opt_state, metrics):
        assert set(floats(tree).values()) == {FLOAT32}
    assert floats(new_state.params) == floats(shapes)


def test_a_run_starts_from_the_checkpoints_own_bits_where_it_trains():
    """Random parameters stand for the checkpoint: drawn in float32, not rounded to bfloat16 and widened."""
    whole = initial_params(small_run(STAGES["dense"], model=BF16))
    assert (
        np.asarray(whole["params"]["head"]) != np.asarray(whole["params"]["head"].astype(jnp.bfloat16))
    ).any()


def test_a_step_of_adamw_at_1e_5_is_in_float32_parameters_and_would_be_lost_in_bfloat16():
    stage = dense(2, lr=1e-5, weight_decay=0.0)
    optimizer = make_optimizer(stage)
    weights = 0.1 + jax.random.uniform(jax.random.key(0), (64,))
    shares = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        tree = {"params.head": weights.astype(dtype)}
        updates, _ = optimizer.update({"params.head": jnp.ones(64, dtype)}, optimizer.init(tree), tree)
        moved = np.asarray((tree["params.head"] + updates["params.head"]).astype(dtype), np.float64)
        shares[dtype] = (np.asarray(tree["params.head"], np.float64) - moved).mean() / 1e-5
    assert shares[jnp.float32] == pytest.approx(1.0, abs=0.01) and shares[jnp.bfloat16] == 0.0


def test_a_stage_refuses_to_train_parameters_in_which_its_steps_are_lost():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), initial())
    with pytest.raises(
        ValueError, match=r"trains .*, which must be float32, got bfloat16: .* param_dtype='float32'"
    ):
        begin_stage(jnp.int32(0), params, STAGES["sparse"])


def test_a_thousand_steps_of_the_router_bias_are_a_thousand_steps():
    path = "params.moe_layers.ffn.gate_bias"
    flat = {path: jnp.full((1, 8), 3.0)}
    load = jnp.asarray([[0, 0, 0, 0, 9, 9, 9, 9]])
    moved = jax.lax.fori_loop(0, 1000, lambda _, flat: move_router_bias(flat, load, 1e-3, CONFIG), flat)[path]
    np.testing.assert_allclose(moved, [[4.0] * 4 + [2.0] * 4], atol=1e-3)
    stored = traverse_util.flatten_dict(shapes_of("dense", None)[1], sep=".")
    assert stored[path].dtype == FLOAT32


def test_a_cross_entropy_is_summed_over_thousands_of_tokens_in_float32():
    hidden = jnp.zeros((1, 4096, 4), jnp.bfloat16)
    total = cross_entropy(hidden, jnp.zeros((4, 8), jnp.bfloat16), jnp.zeros((1, 4096), jnp.int32))
    assert float(total) == pytest.approx(4096 * np.log(8), rel=1e-5) and total.dtype == FLOAT32


def test_positions_are_exact_in_a_model_in_bfloat16():
    """bfloat16 has no integer between 131,072 - 512 and 131,072."""
    positions = jnp.asarray([[131_071, 130_817]])
    found, exact = rotation(positions, BF16), rotation(positions, CONFIG)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {FLOAT32}
    jax.tree.map(np.testing.assert_array_equal, found, exact)
