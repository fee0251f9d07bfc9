"""Layers that share an indexer (GLM-5.2's IndexShare): stacks, caches, and that nothing is selected twice."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax.cache import init_cache
from dsa_jax.checkpoint import load_params, write_hf
from dsa_jax.checkpoint.fresh_indexer import FreshIndexer, add_indexer_keys
from dsa_jax.checkpoint.hf_config import from_hf, to_hf
from dsa_jax.checkpoint.hf_reader import HfFolder
from dsa_jax.checkpoint.names import leaf_shapes
from dsa_jax.config import ModelConfig, deepseek_v32, glm52
from dsa_jax.layers import scans, stacks
from dsa_jax.sharding.rules import axes_of_parameter
from dsa_jax.transformer import Transformer
from tests.dsa_jax.test_transformer import abstract_params
from tests.train.small import CONFIG as SMALL

F, S = "full", "shared"
T, K = 24, SMALL.index_topk
CONFIG = dataclasses.replace(
    SMALL, n_layers=6, n_dense_layers=2, indexer_types=(F, F, S, F, S, S), index_rope_interleaved=True,
    mtp_reuses_selection=True,
)  # fmt: skip
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, T)), jnp.int32)


@functools.cache
def params():
    return jax.jit(Transformer(CONFIG).init)(jax.random.key(0), TOKENS[:, :2])


@functools.cache
def run(**options):
    return jax.jit(functools.partial(Transformer(CONFIG).apply, **options))


# -- stacks


def layers_of(config: ModelConfig) -> dict[str, list[int]]:
    return {stack.name: list(stack.layers) for stack in stacks(config)}


def test_without_shared_layers_there_are_two_stacks_and_two_scans():
    assert layers_of(deepseek_v32()) == {"dense_layers": [0, 1, 2], "moe_layers": list(range(3, 61))}
    assert [len(scan) for scan in scans(deepseek_v32())] == [1, 1]


def test_all_full_is_the_same_as_no_types():
    assert scans(dataclasses.replace(CONFIG, indexer_types=(F,) * 6)) == scans(
        dataclasses.replace(CONFIG, indexer_types=None)
    )


def test_glm52_repeats_groups_of_four_in_one_scan():
    first, second, third = scans(glm52())
    assert [(stack.name, len(stack.layers)) for stack in first] == [("dense_layers_0", 2)]
    assert [(stack.name, len(stack.layers)) for stack in second] == [
        ("dense_layers_2", 1), ("moe_layers_3", 1), ("moe_layers_4", 1), ("moe_layers_5", 1)
    ]  # fmt: skip
    assert [stack.name for stack in third] == [f"moe_layers_{layer}" for layer in range(6, 10)]
    assert list(third[1].layers) == list(range(7, 78, 4))
    assert [stack.has_indexer for stack in third] == [True, False, False, False]


@pytest.mark.parametrize(
    "types", [(F, F, S, F, S, S), (F, S, F, S, F, S), (F, S, S, S, S, S), (F, F, F, S, F, F), (F,) * 6]
)
@pytest.mark.parametrize("n_dense", [0, 2, 3, 6])
def test_every_layer_is_in_one_stack_and_every_leaf_has_its_shape(types, n_dense):
    config = dataclasses.replace(CONFIG, indexer_types=types, n_dense_layers=n_dense)
    found = sorted(layer for layers in layers_of(config).values() for layer in layers)
    assert found == list(range(6))
    for stack in stacks(config):
        assert {layer >= n_dense for layer in stack.layers} == {stack.is_moe}
        assert {types[layer] == F for layer in stack.layers} == {stack.has_indexer}

    flat = jax.tree_util.tree_flatten_with_path(abstract_params(config))[0]
    ours = {tuple(key.key for key in path): leaf.shape for path, leaf in flat}
    assert ours == leaf_shapes(config)
    assert sum(leaf.size for _, leaf in flat) == config.param_count()
    for path, shape in ours.items():  # every one has a row in the table of shardings
        assert len(axes_of_parameter(f"params.{'.'.join(path)}", shape)) == len(shape)


# -- the forward pass


def test_shared_layers_read_what_the_last_full_layer_selected():
    """A shared layer with the full layer's indexer, selecting for itself, reads other keys and gives other logits."""
    captured = ("topk_indices", "index_scores", "out", "experts")
    logits, _, aux = run(capture=captured)(params(), TOKENS)
    assert aux["topk_indices"].shape == (3, 2, T, K) and aux["index_scores"].shape == (3, 2, T, T)
    assert aux["out"].shape[0] == 6 and aux["experts"].shape[0] == aux["expert_load"].shape[0] == 4

    all_full = dataclasses.replace(CONFIG, indexer_types=None)
    tree, source = {}, params()["params"]
    for stack in stacks(all_full):
        parts = []
        for layer in stack.layers:
            last = max(full for full in CONFIG.full_layers if full <= layer)
            part = dict(one_layer(source, layer))
            part["attn"] = part["attn"] | {"indexer": one_layer(source, last)["attn"]["indexer"]}
            parts.append(part)
        tree[stack.name] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    rest = {name: leaf for name, leaf in source.items() if "layers" not in name}
    own, _, found = jax.jit(
        functools.partial(Transformer(all_full).apply, capture=("topk_indices", "out"))
    )({"params": tree | rest}, TOKENS)
    np.testing.assert_array_equal(found["topk_indices"][:2], aux["topk_indices"][:2])
    np.testing.assert_allclose(found["out"][:2], aux["out"][:2], rtol=0, atol=1e-5)
    assert np.abs(found["out"][2] - aux["out"][2])[:, K:].max() > 1e-3
    np.testing.assert_allclose(own[:, :K], logits[:, :K], rtol=0, atol=1e-5)  # all keys are selected there


def one_layer(tree, layer):
    stack = next(stack for stack in stacks(CONFIG) if layer in stack.layers)
    return jax.tree.map(lambda leaf: leaf[stack.layers.index(layer)], tree[stack.name])


def occurrences(name, function, *arguments):
    """How often a primitive or a named function is called in the program, the body of a scan counted once."""

    def count(jaxpr):
        total = 0
        for equation in jaxpr.eqns:
            total += name in (equation.primitive.name, equation.params.get("name"))
            for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
                if is_jaxpr(inner):
                    total += count(getattr(inner, "jaxpr", inner))
        return total

    def is_jaxpr(x):
        return hasattr(x, "eqns") or hasattr(x, "jaxpr")

    return count(jax.make_jaxpr(function)(*arguments).jaxpr)


@pytest.mark.parametrize("remat", ["none", "layer"])
def test_scores_and_top_k_are_computed_in_full_layers_only_and_not_again_in_the_backward_pass(monkeypatch, remat):
    """The scans of this model run 1, 2 and 3 layers per step, one of them with an indexer."""
    import pallas_kernels as kernels

    calls = []
    select_topk = kernels.select_topk
    monkeypatch.setattr(kernels, "select_topk", lambda *a, **k: calls.append(1) or select_topk(*a, **k))
    config = dataclasses.replace(CONFIG, remat=remat, n_mtp_layers=0)
    tree = {"params": {name: leaf for name, leaf in params()["params"].items() if name != "mtp"}}

    def loss(params):
        return (Transformer(config).apply(params, TOKENS, return_logits=False)[2]["final_hidden"] ** 2).sum()

    text = jax.jit(jax.grad(loss)).lower(tree).compile().as_text()
    assert len(calls) >= 3
    found = occurrences("dsa_select_marker", loss, tree)
    assert found == 0 and "while" in text
