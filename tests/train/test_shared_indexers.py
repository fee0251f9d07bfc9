"""Training a model whose layers share indexers: L_I of full layers only, adapters, router bias, counts and reports."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from dsa_jax.cache import place
from dsa_jax.layers import stacks
from dsa_jax.transformer import Transformer
from tests.train.same import assert_same_bits, same_bits
from tests.train.small import CONFIG as SMALL
from tests.train.small import T, batch_of, small_run
from train.aot.job import read_job
from train.aot.options import Options
from train.config import Lora, contradictions, from_json, indexer_warmup, sparse, to_json
from train.lora import merged, with_adapters
from train.loss import loss_fn
from train.measure.evaluate import indexer_quality
from train.measure.flops import forward_flops, training_flops
from train.optimizer import group_of, split
from train.reports.record import Record
from train.step import begin_stage, compiled_step

F, S = "full", "shared"
CONFIG = dataclasses.replace(
    SMALL, n_layers=4, n_dense_layers=0, indexer_types=(F, S, F, S), index_rope_interleaved=True
)
BATCH = batch_of([20, 9], [T])
STAGES = {
    "sparse": sparse(10, lr=1e-2, index_lr=1e-2, bias_step=0.01),
    "warm-up": indexer_warmup(10, index_lr=1e-2),
}
FULL = ("moe_layers_0", "mtp.layer")  # stacks with an indexer: layers 0 and 2, the MTP layer
SHARED = "moe_layers_1"  # layers 1 and 3


def flat(params):
    return traverse_util.flatten_dict(params, sep=".")


@functools.cache
def initial():
    return jax.jit(Transformer(CONFIG).init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))


@functools.cache
def one_step(name):
    before = begin_stage(jnp.int32(0), initial(), STAGES[name])
    given = jax.tree.map(jnp.copy, before)  # the step donates its state
    after, metrics = compiled_step(CONFIG, STAGES[name], 0.0)(given, BATCH)
    return before, after, metrics


def test_only_full_layers_have_an_indexer_to_train():
    assert {stack.name: list(stack.layers) for stack in stacks(CONFIG)} == {FULL[0]: [0, 2], SHARED: [1, 3]}
    indexers = {path.split(".attn.")[0] for path in flat(initial()) if group_of(path) == "indexer"}
    assert indexers == {f"params.{stack}" for stack in FULL}


@pytest.mark.parametrize(("name", "groups"), [("sparse", 3), ("warm-up", 1)])
def test_a_step_trains_every_indexer_there_is(name, groups):
    before, after, metrics = one_step(name)
    old, new = flat(before.params), flat(after.params)
    changed = {path for path in old if not same_bits(old[path], new[path])}
    everything = {path for path in old if groups == 3 or group_of(path) == "indexer"}
    assert changed == everything and metrics["finite"]
    assert metrics["index_kl"].shape == (3,) and (metrics["index_kl"] > 0).all()
    assert metrics["max_load_ratio"].shape == (5,)


@pytest.mark.parametrize("name", STAGES)
def test_the_index_loss_is_that_of_the_full_layers(name):
    """It reaches their indexers only; and that of layer 2 is what it is in a model of this layer alone."""
    stage = STAGES[name]

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def index_loss(params):
        _, metrics = loss_fn(params, BATCH, CONFIG, stage)
        return metrics["index_kl"].sum(), metrics["index_kl"]

    (total, per_layer), gradient = index_loss(initial())
    np.testing.assert_allclose(per_layer, one_step(name)[2]["index_kl"], rtol=1e-5)
    np.testing.assert_allclose(total, np.sum(per_layer), rtol=1e-6)
    reached = {path for path, leaf in flat(gradient).items() if (np.asarray(leaf) != 0).any()}
    assert reached == {path for path in reached if group_of(path) == "indexer"}
    assert {path.split(".attn.")[0] for path in reached} == {f"params.{stack}" for stack in FULL}

    # Layer 2 alone: an embedding that gives each token the input that the layer has in the whole model.
    ids, tree = BATCH["segment_ids"], initial()["params"]
    whole = dataclasses.replace(CONFIG, attention=stage.attention)
    run = jax.jit(functools.partial(Transformer(whole).apply, capture=("input",)))
    x = run(initial(), BATCH["tokens"], segment_ids=ids)[2]["input"][2].reshape(-1, CONFIG.d_model)
    config = dataclasses.replace(
        whole, n_layers=1, n_mtp_layers=0, indexer_types=None, index_loss=True, vocab_size=len(x)
    )
    layer = jax.tree.map(lambda leaf: leaf[1:], tree[FULL[0]])
    alone = {"embed": x, "norm": tree["norm"], "head": x.T, "moe_layers": layer}
    numbers = jnp.arange(len(x), dtype=jnp.int32).reshape(ids.shape)
    run = jax.jit(functools.partial(Transformer(config).apply, return_logits=False))
    _, _, aux = run({"params": alone}, numbers, segment_ids=ids)
    np.testing.assert_allclose(aux["index_loss"][0] / (ids != 0).sum(), per_layer[1], rtol=1e-4)


def test_no_loss_but_the_index_loss_reaches_an_indexer():
    def others(params):
        _, metrics = loss_fn(params, BATCH, CONFIG, STAGES["sparse"])
        return metrics["ce"] + metrics["mtp"] + metrics["balance"]

    gradient = flat(jax.jit(jax.grad(others))(initial()))
    assert all((leaf == 0).all() for path, leaf in gradient.items() if group_of(path) == "indexer")
    assert (np.asarray(gradient[f"params.{SHARED}.attn.wkv_b"]) != 0).any()  # while its attention learns


def test_the_router_bias_of_each_layer_follows_its_own_load():
    before, after, _ = one_step("sparse")
    load = jax.jit(loss_fn, static_argnums=(2, 3))(before.params, BATCH, CONFIG, STAGES["sparse"])[1][
        "expert_load"
    ]
    load = np.asarray(load)
    for layer in range(4):
        path = f"params.{(FULL[0], SHARED)[layer % 2]}.ffn.gate_bias"
        moved = np.asarray(flat(after.params)[path] - flat(before.params)[path])[layer // 2]
        np.testing.assert_allclose(moved, 0.01 * np.sign(load[layer].mean() - load[layer]), atol=1e-7)
    first, second = (np.sign(load[layer].mean() - load[layer]) for layer in (1, 2))
    assert (
        first != second
    ).any()  # in the order of the stacks, not of the layers, the rows would be exchanged


def test_adapters_stand_beside_missing_indexers():
    params = with_adapters(initial(), Lora(rank=4), jax.random.key(1))
    assert_same_bits(merged(params, 2.0), initial())
    stage = STAGES["sparse"]
    trained, _ = split(params, stage)
    whole = {path for path in trained if not path.startswith("lora.")}
    assert whole == {path for path in flat(initial()) if group_of(path) == "indexer"}
    for stack in (FULL[0], SHARED):
        adapter = params["lora"][stack]["attn"]["wo"]
        adapter["b"] = adapter["b"] + 1.0
        change = np.asarray(
            merged(params, 2.0)["params"][stack]["attn"]["wo"] - initial()["params"][stack]["attn"]["wo"]
        )
        product = 2.0 * np.asarray(adapter["a"], np.float64) @ np.asarray(adapter["b"], np.float64)
        np.testing.assert_allclose(change, product, rtol=0, atol=1e-5)


def test_a_run_remembers_the_types_and_runs_of_older_versions_go_on():
    run = small_run(model=CONFIG)
    assert from_json(to_json(run)) == run and contradictions(to_json(run), run) == []
    older = to_json(small_run())
    for field in ("indexer_types", "mtp_reuses_selection"):
        del older["model"][field]
    assert contradictions(older, small_run()) == []
    assert contradictions(older, small_run(model=dataclasses.replace(SMALL, indexer_types=(F, S)))) != []


def test_the_quality_of_an_indexer_is_reported_under_the_number_of_its_layer():
    """And its KL is the index loss of the layer, over the queries that see more than index_topk keys."""
    config = dataclasses.replace(CONFIG, attention="dense")
    quality = indexer_quality(initial(), config, BATCH)
    assert [entry["layer"] for entry in quality] == [0, 2, 4]
    ids, learns = BATCH["segment_ids"], dataclasses.replace(config, index_loss=True)
    run = jax.jit(functools.partial(Transformer(learns).apply, capture=("index_kl",)))
    kl = np.asarray(run(initial(), BATCH["tokens"], segment_ids=ids)[2]["index_kl"])
    counted = np.asarray(place(ids, None)[0].positions) >= CONFIG.index_topk
    for entry, of_queries in zip(quality, kl, strict=False):
        np.testing.assert_allclose(entry["kl"], of_queries[counted].mean(), rtol=1e-3, atol=1e-5)

    record = Record(
        name="", config={"model": to_json(small_run(model=CONFIG))["model"]}, metrics=[], evaluations=[]
    )
    assert [record.indexer_layer(index) for index in range(3)] == [0, 2, 4]


def test_operations_are_counted_for_full_layers_only():
    all_full = dataclasses.replace(CONFIG, indexer_types=None)
    shared, full = forward_flops(CONFIG, T), forward_flops(all_full, T)
    assert shared["indexer"] == full["indexer"] / 2 > 0
    assert shared | {"indexer": 0.0} == full | {"indexer": 0.0}
    shared, full = training_flops(CONFIG, T), training_flops(all_full, T)
    for part in ("indexer", "index_kl"):
        assert shared[part] == full[part] / 2 > 0
    assert shared["mtp"] == full["mtp"]


def test_the_first_layers_of_glm52_are_planned():
    options = Options(config="glm-5.2", topology="h200:8", mode="train", seq_len=4096, batch=8, layers=4)
    assert read_job(options).config.indexer_types == (F, F, F, S)
