"""Adapters change nothing at first, train alone, and stand for W + scale A B."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from dsa_jax.sharding import batch_sharding, make_mesh, param_shardings
from tests.train.same import assert_same_bits, same_bits
from tests.train.small import CONFIG, T, batch_of, initial
from train.config import Lora, Stage
from train.lora import ATTENTION, FEED_FORWARD, merged, with_adapters
from train.lora import adapted as beside
from train.loss import loss_fn
from train.optimizer import group_of, split
from train.step import begin_stage, compiled_step

LORA = Lora(rank=4, alpha=8.0)
STAGE = Stage(name="lora", attention="sparse", trains="both", steps=3, lr=1e-2, index_lr=1e-2, bias_step=0.0)


def flat(params):
    return traverse_util.flatten_dict(params, sep=".")


def adapted(**changes):
    return with_adapters(initial(), Lora(**({"rank": 4} | changes)), jax.random.key(1))


def test_new_adapters_change_no_bit():
    params = merged(adapted(), 2.0)
    assert jax.tree.structure(params) == jax.tree.structure(initial())
    assert_same_bits(params, initial())


def test_without_adapters_merging_does_nothing():
    assert merged(initial(), 2.0) is initial()


@pytest.mark.parametrize(("experts", "names"), [(True, ATTENTION + FEED_FORWARD), (False, ATTENTION)])
def test_all_projections_get_adapters_and_no_indexer_does(experts, names):
    expected = {
        path.removeprefix("params.")
        for path in flat(initial())
        if path.rsplit(".", 1)[-1] in names and group_of(path) != "indexer"
    }
    found = flat(adapted(experts=experts)["lora"])
    assert {path.rsplit(".", 1)[0] for path in found} == expected
    assert any("mtp" in path for path in expected) and any("dense_layers" in path for path in expected)
    for path in expected:
        *stack, x, y = flat(initial())["params." + path].shape
        assert found[path + ".a"].shape == (*stack, x, 4) and found[path + ".b"].shape == (*stack, 4, y)


def test_merged_is_w_plus_scale_a_b_layer_by_layer_and_expert_by_expert():
    params = adapted()
    params["lora"] = jax.tree.map(lambda leaf: leaf + 0.1, params["lora"])
    ours, base, lora = (flat(tree) for tree in (merged(params, 0.5), initial(), params["lora"]))
    for path in {path.rsplit(".", 1)[0] for path in lora}:
        a, b = (np.asarray(lora[f"{path}.{name}"], np.float64) for name in "ab")
        expected = np.asarray(base["params." + path], np.float64)
        for index in np.ndindex(expected.shape[:-2]):
            expected[index] += 0.5 * a[index] @ b[index]
        np.testing.assert_allclose(ours["params." + path], expected, rtol=1e-5, atol=1e-6, err_msg=path)


def test_a_product_beside_the_weight_is_the_merged_weight():
    """Loss, metrics and gradients of a whole step: attention, experts, MTP and the index loss, in the MQA form too."""
    params = adapted()
    params["lora"] = jax.tree.map(lambda leaf: leaf + 0.05, params["lora"])

    def of(join, form):
        config = dataclasses.replace(CONFIG, attention_form=form)

        @jax.jit
        @functools.partial(jax.value_and_grad, has_aux=True)
        def loss(lora):
            return loss_fn(join(params | {"lora": lora}, 0.5), batch_of([20, 9], [T]), config, STAGE)

        return loss(params["lora"])

    want = of(merged, "mqa")
    chex.assert_trees_all_close(of(beside, "mqa"), want, rtol=2e-4, atol=2e-6)


def test_the_merged_weight_is_not_rounded_to_the_dtype_of_the_base():
    base = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), initial())
    params = with_adapters(base, Lora(rank=4), jax.random.key(1))
    assert {leaf.dtype for leaf in jax.tree.leaves(params["lora"])} == {jnp.dtype(jnp.float32)}
    params["lora"] = jax.tree.map(lambda leaf: leaf + 1e-5, params["lora"])
    path = "params.dense_layers.attn.wo"
    ours, w = (np.asarray(flat(tree)[path], np.float64) for tree in (merged(params, 2.0), base))
    a, b = (np.asarray(flat(params)[f"lora.dense_layers.attn.wo.{name}"], np.float64) for name in "ab")
    np.testing.assert_allclose(ours - w, 2.0 * a @ b, rtol=1e-2, atol=1e-8)


@pytest.mark.slow
@pytest.mark.devices(8, 16)
def test_adapters_on_a_mesh_compute_what_they_do_on_one_device():
    params = adapted()
    params["lora"] = jax.tree.map(lambda leaf: leaf + 0.05, params["lora"])
    batch = batch_of([20, 9], [T])

    def gradients(params, batch):
        loss_of = lambda lora: loss_fn(beside(params | {"lora": lora}, 0.5), batch, CONFIG, STAGE)[0]  # noqa: E731
        return jax.jit(jax.value_and_grad(loss_of))(params["lora"])

    mesh = make_mesh(data=1, expert=2, context=2, tensor=2)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, param_shardings(params, CONFIG, mesh))
        found = gradients(placed, jax.device_put(batch, batch_sharding(CONFIG, mesh, 2, T)))
    chex.assert_trees_all_close(found, gradients(params, batch), rtol=1e-3, atol=1e-6)


def test_only_adapters_and_indexers_learn():
    """A trains from the second step on: its first gradient is zero because B is."""
    params = jax.tree.map(jnp.copy, adapted())  # the step donates them
    state = begin_stage(jnp.int32(0), params, STAGE)
    before = {path: np.array(leaf) for path, leaf in flat(state.params).items()}
    step = compiled_step(CONFIG, STAGE, LORA.alpha / LORA.rank)
    for _ in range(2):
        state, metrics = step(state, batch_of([20, 9], [T]))
    assert metrics["finite"]
    changed = {path for path, leaf in flat(state.params).items() if not same_bits(leaf, before[path])}
    assert changed == {path for path in before if path.startswith("lora.") or group_of(path) == "indexer"}
    assert changed == set(split(state.params, STAGE)[0])


@pytest.mark.parametrize("rank", [15, 16, 64])
def test_a_rank_that_saves_nothing_is_refused(rank):
    """The smallest dimension is the experts' width, 16, so rank 15 is the largest that fits."""
    if rank < CONFIG.d_expert:
        assert adapted(rank=rank)["lora"]
        return
    with pytest.raises(ValueError, match=rf"rank must be below both dimensions of .*, got {rank} >= \("):
        adapted(rank=rank)


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"alpha": 0.0}, {"alpha": -1.0}])
def test_rank_and_alpha_must_be_positive(wrong):
    with pytest.raises(ValueError, match="rank must be at least 1 and alpha positive, got"):
        Lora(**wrong)
