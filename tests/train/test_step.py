"""One step: which loss reaches which parameters, what each stage changes, router bias and optimizer."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

import dsa_jax.indexer
from pallas_kernels import blocking
from tests.train.same import assert_same_bits, same_bits
from tests.train.small import CONFIG, T, batch_of, initial
from train.config import Stage, dense, indexer_warmup, sparse
from train.loss import loss_fn
from train.optimizer import group_of, join, make_optimizer, schedule, split
from train.step import begin_stage, compiled_step, move_router_bias, train_step

BATCH = batch_of([20, 9], [T])
STAGES = {
    "dense": dense(10, lr=1e-2, bias_step=0.01),
    "indexer_warmup": indexer_warmup(10, index_lr=1e-2),
    "sparse": sparse(10, lr=1e-2, index_lr=1e-2, bias_step=0.01),
}


def flat(params):
    return traverse_util.flatten_dict(params, sep=".")


# -- which loss reaches which parameters (DeepSeek-V3.2-Exp report, section 2.1)

LOSSES = ("ce", "mtp", "balance", "index_kl")


def gradients_of(losses=LOSSES):
    """{loss: {path: gradient}} of each of these parts of the loss alone, for all parameters."""

    @jax.jit
    @jax.grad
    def gradient(params, weights):
        _, metrics = loss_fn(params, BATCH, CONFIG, STAGES["sparse"])
        return sum(weights[name] * metrics[name].sum() for name in LOSSES)

    only = {name: {other: float(other == name) for other in LOSSES} for name in losses}
    return {name: flat(gradient(initial(), weights)) for name, weights in only.items()}


@functools.cache
def matrix():
    return gradients_of()


def reached(gradient):
    return {path for path, leaf in gradient.items() if (np.asarray(leaf) != 0).any()}


def paths(*groups):
    return {path for path in flat(initial()) if group_of(path) in groups}


class TestGradientMatrix:
    def test_ce_reaches_the_trunk_and_no_indexer_no_router_bias_and_no_mtp_layer(self):
        trunk = {path for path in paths("model") if ".mtp." not in path}
        assert reached(matrix()["ce"]) == trunk

    def test_mtp_reaches_its_layer_and_the_trunk_but_the_main_head(self):
        assert reached(matrix()["mtp"]) == paths("model") - {"params.head"}

    def test_balance_reaches_the_routers_and_what_feeds_them(self):
        found = reached(matrix()["balance"])
        assert {"params.moe_layers.ffn.gate", "params.mtp.layer.ffn.gate", "params.embed"} <= found
        assert found <= paths("model") - {"params.head", "params.mtp.head", "params.mtp.norm"}

    def test_index_kl_reaches_every_indexer_and_nothing_else(self):
        assert reached(matrix()["index_kl"]) == paths("indexer")


def test_without_stop_gradient_the_index_loss_would_reach_the_trunk(monkeypatch):
    """The zeros of the gradient matrix are due to them, not to the tests."""
    monkeypatch.setattr(dsa_jax.indexer, "lax", types.SimpleNamespace(stop_gradient=lambda x: x))
    found = reached(gradients_of(("index_kl",))["index_kl"])
    assert paths("indexer") < found
    assert {"params.embed", "params.dense_layers.attn.wq_a", "params.moe_layers.attn_norm"} <= found


# -- what a stage changes


@functools.cache
def one_step(name):
    """(state before, state after, metrics) of the first step of a stage."""
    stage = STAGES[name]
    before = begin_stage(jnp.int32(4), initial(), stage)
    given = jax.tree.map(jnp.copy, before)  # the step donates its state
    after, metrics = compiled_step(CONFIG, stage, 0.0)(given, BATCH)
    return before, after, metrics


CHANGES = {
    "dense": ("model", "router_bias"),
    "indexer_warmup": ("indexer",),
    "sparse": ("model", "indexer", "router_bias"),
}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_changes_no_bit_of_what_it_does_not_train(name):
    before, after, metrics = one_step(name)
    old, new = flat(before.params), flat(after.params)
    changed = {path for path in old if not same_bits(old[path], new[path])}
    assert changed == paths(*CHANGES[name])  # the warm-up also leaves router bias and MTP layer alone
    assert metrics["finite"] and after.step == 5


@pytest.mark.parametrize(("name", "groups"), CHANGES.items())
def test_a_stage_reports_the_norms_of_what_it_trains(name, groups):
    metrics = one_step(name)[2]
    assert ("grad_norm" in metrics) == ("model" in groups)
    assert ("index_grad_norm" in metrics) == ("indexer" in groups)
    stage = STAGES[name]
    assert (metrics["lr"], metrics["index_lr"]) == (np.float32(stage.lr), np.float32(stage.index_lr))
    assert metrics["max_load_ratio"].shape == (2,) and (metrics["max_load_ratio"] >= 1).all()


def test_the_reported_norms_are_those_of_the_gradient_matrix():
    gradients, metrics = matrix(), one_step("sparse")[2]
    stage = STAGES["sparse"]
    model = sum(
        weight * np.concatenate([np.ravel(gradients[name][path]) for path in sorted(paths("model"))])
        for name, weight in (("ce", 1), ("mtp", stage.mtp_weight), ("balance", stage.balance_weight))
    )
    indexer = [np.ravel(gradients["index_kl"][path]) for path in sorted(paths("indexer"))]
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(model), rtol=1e-4)
    np.testing.assert_allclose(metrics["index_grad_norm"], np.linalg.norm(np.concatenate(indexer)), rtol=1e-4)


@pytest.mark.parametrize("name", STAGES)
def test_a_step_that_is_not_finite_changes_only_the_step_count(name):
    stage = STAGES[name]
    params = jax.tree.map(jnp.copy, initial())
    params["params"]["embed"] = params["params"]["embed"].at[BATCH["tokens"][0, 3]].set(jnp.inf)
    state = begin_stage(jnp.int32(4), params, stage)
    after, metrics = compiled_step(CONFIG, stage, 0.0)(jax.tree.map(jnp.copy, state), BATCH)
    assert not metrics["finite"] and not np.isfinite(metrics["loss"])
    assert after.step == 5
    assert_same_bits(after.params, state.params)
    assert_same_bits(after.opt_state, state.opt_state)


# -- the router's bias


def test_the_bias_falls_for_busy_experts_and_rises_for_idle_ones():
    flat = {
        "params.moe_layers.ffn.gate_bias": jnp.asarray([[0.5, 0.5, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0]]),
        "params.mtp.layer.ffn.gate_bias": jnp.zeros((4,)),
        "params.embed": jnp.ones(3),
    }
    load = jnp.asarray(
        [[8, 0, 4, 4], [1, 2, 3, 10], [0, 0, 0, 16]]
    )  # mean 4 in every layer; the MTP layer last
    moved = move_router_bias(flat, load, 0.01, dataclasses.replace(CONFIG, n_layers=3))
    main = [[0.49, 0.51, 0.5, 0.5], [0.01, 0.01, 0.01, -0.01]]
    np.testing.assert_allclose(moved["params.moe_layers.ffn.gate_bias"], main, rtol=1e-6)
    np.testing.assert_allclose(moved["params.mtp.layer.ffn.gate_bias"], [0.01, 0.01, 0.01, -0.01], rtol=1e-6)
    assert moved["params.embed"] is flat["params.embed"]


def test_the_step_moves_each_bias_by_the_rule():
    before, after, _ = one_step("dense")
    load = jax.jit(loss_fn, static_argnums=(2, 3))(before.params, BATCH, CONFIG, STAGES["dense"])[1][
        "expert_load"
    ]
    expected = move_router_bias(flat(before.params), load, 0.01, CONFIG)
    for path in paths("router_bias"):
        assert same_bits(flat(after.params)[path], expected[path]), path
        assert set(np.abs(np.asarray(expected[path])).ravel().tolist()) <= {0.0, np.float32(0.01)}


# -- the optimizer


def vectors(stage, value):
    """The parameters that a stage trains, by their real paths, each a vector of three."""
    return {path: jnp.full(3, value) for path in split(initial(), stage)[0]}


def updates_after(stage, *gradients):
    """The updates of the last of several steps."""
    params = vectors(stage, 2.0)
    optimizer = make_optimizer(stage)
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
    return updates


def random_gradient(stage, seed, index_scale=1.0):
    rng = np.random.default_rng(seed)
    scales = {path: index_scale if group_of(path) == "indexer" else 1.0 for path in vectors(stage, 0.0)}
    return {path: jnp.asarray(scale * rng.standard_normal(3), jnp.float32) for path, scale in scales.items()}


def test_the_index_loss_never_changes_the_models_update():
    stage = STAGES["sparse"]
    usual = updates_after(stage, random_gradient(stage, 0), random_gradient(stage, 1))
    scaled = updates_after(stage, random_gradient(stage, 0, 1000.0), random_gradient(stage, 1))
    unchanged = {path for path in usual if same_bits(usual[path], scaled[path])}
    assert unchanged >= paths("model") and unchanged != set(usual)


def test_each_group_is_clipped_by_its_own_norm():
    stage = dataclasses.replace(STAGES["sparse"], clip=1.0)
    params, optimizer = vectors(stage, 2.0), make_optimizer(stage)
    _, state = optimizer.update(random_gradient(stage, 0), optimizer.init(params), params)
    for group in ("model", "indexer"):
        moments = optax.tree_utils.tree_get(state.inner_states[group], "mu")
        np.testing.assert_allclose(optax.tree.norm(moments), 0.1 * stage.clip, rtol=1e-4)  # (1 - b1) g


def test_the_update_is_that_of_adamw_with_deepseeks_numbers():
    """Gradients of about eps, so that it counts; the second differs from the first, so that both betas do."""
    stage, lr = dataclasses.replace(STAGES["dense"], weight_decay=0.1, clip=1e9), STAGES["dense"].lr
    gradients = [random_gradient(stage, seed) for seed in (0, 1)]
    for gradient in gradients:
        gradient.update({path: 1e-8 * g for path, g in gradient.items()})
    updates = updates_after(stage, *gradients)
    for path in ("params.embed", "params.norm"):
        first, second = (np.asarray(gradient[path], np.float64) for gradient in gradients)
        m = (0.9 * 0.1 * first + 0.1 * second) / (1 - 0.9**2)
        v = (0.95 * 0.05 * first**2 + 0.05 * second**2) / (1 - 0.95**2)
        decay = 0.1 * 2.0 if path == "params.embed" else 0.0
        expected = -lr * (m / (np.sqrt(v) + 1e-8) + decay)
        np.testing.assert_allclose(updates[path], expected, rtol=1e-4, err_msg=path)


def test_matrices_decay_and_norms_and_biases_do_not():
    stage = STAGES["sparse"]
    updates = updates_after(stage, vectors(stage, 0.0))
    kept = {path for path, update in updates.items() if (update == 0).all()}
    assert kept == {path for path in updates if "norm" in path}
    assert {"params.moe_layers.attn.indexer.k_norm.bias", "params.mtp.norm"} < kept
    for path in set(updates) - kept:
        np.testing.assert_allclose(
            updates[path], -stage.lr * stage.weight_decay * 2.0, rtol=1e-5, err_msg=path
        )


@pytest.mark.parametrize("trains", ["model", "indexer", "both"])
def test_splitting_and_joining_gives_the_tree_back(trains):
    stage = Stage(name="x", attention="dense", trains=trains, steps=1, lr=1.0, index_lr=1.0)
    trained, rest = split(initial(), stage)
    joined = join(trained, rest)
    assert jax.tree.structure(joined) == jax.tree.structure(initial())
    assert all(a is b for a, b in zip(jax.tree.leaves(joined), jax.tree.leaves(initial()), strict=True))


def test_the_rate_rises_in_a_line_and_falls_along_a_cosine():
    stage = dense(12, lr=1.0, lr_warmup=4, lr_end=0.2)
    rate = [float(schedule(3.0, stage)(step)) for step in range(13)]
    np.testing.assert_allclose(rate[:5], [0.75, 1.5, 2.25, 3.0, 3.0], rtol=1e-6)
    np.testing.assert_allclose(rate[8], 3.0 * (0.2 + 0.8 / 2), rtol=1e-6)  # halfway down
    np.testing.assert_allclose(rate[6], 3.0 * (0.2 + 0.8 * (1 + np.cos(np.pi / 4)) / 2), rtol=1e-6)
    np.testing.assert_allclose(rate[12], 0.6, rtol=1e-6)


@pytest.mark.parametrize(
    ("warmup", "expected"), [(0, [2.0, 2.0, 2.0]), (1, [2.0, 2.0, 2.0]), (2, [1.0, 2.0, 2.0])]
)
def test_without_an_end_the_rate_stays(warmup, expected):
    assert [float(schedule(2.0, dense(3, lr=1.0, lr_warmup=warmup))(step)) for step in range(3)] == expected


def test_no_mask_of_all_queries_and_keys_is_made(monkeypatch):
    """JAX hoists what the iterations of a loop share; the masks that all layers share must not be hoisted."""
    length = 512
    monkeypatch.setattr(blocking, "WORKSPACE_BYTES", 2**16)
    config = dataclasses.replace(CONFIG, max_seq_len=length, query_block=32)
    batch = {name: jnp.ones((1, length), jnp.int32) for name in ("tokens", "targets", "segment_ids")}
    for stage in (indexer_warmup(1), sparse(1, lr=1e-3, index_lr=1e-3), dense(1, lr=1e-3)):
        state = jax.eval_shape(lambda p, stage=stage: begin_stage(jnp.int32(0), p, stage), initial())
        step = functools.partial(train_step, config=config, stage=stage)
        sizes = [
            aval.size for aval in _results(jax.make_jaxpr(step)(state, batch).jaxpr) if aval.dtype == bool
        ]
        assert 0 < max(sizes) < length * length, stage.name


def _results(jaxpr):
    for equation in jaxpr.eqns:
        yield from (variable.aval for variable in equation.outvars if hasattr(variable.aval, "dtype"))
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _results(inner)
