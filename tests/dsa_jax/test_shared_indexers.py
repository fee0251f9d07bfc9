"""Layers that share an indexer (GLM-5.2's IndexShare): stacks, caches, and that nothing is selected twice."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from dsa_jax.cache import init_cache, place
from dsa_jax.checkpoint import load_params, write_hf
from dsa_jax.checkpoint.fresh_indexer import FreshIndexer, add_indexer_keys
from dsa_jax.checkpoint.hf_config import from_hf, to_hf
from dsa_jax.checkpoint.hf_reader import HfFolder
from dsa_jax.checkpoint.names import leaf_shapes
from dsa_jax.config import ModelConfig, deepseek_v32, glm52
from dsa_jax.layers import scans, stacks
from dsa_jax.mla import attend, compress
from dsa_jax.norm import rms_norm
from dsa_jax.rope import rotation
from dsa_jax.sharding.rules import axes_of_parameter
from dsa_jax.transformer import Transformer
from tests.dsa_jax.test_transformer import abstract_params
from tests.train.small import CONFIG as SMALL

F, S = "full", "shared"
T, K = 24, SMALL.index_topk
CONFIG = dataclasses.replace(
    SMALL, n_layers=5, n_dense_layers=2, indexer_types=(F, F, S, F, S), index_rope_interleaved=True,
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
    assert scans(dataclasses.replace(CONFIG, indexer_types=(F,) * 5)) == scans(
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
    config = dataclasses.replace(CONFIG, n_layers=6, indexer_types=types, n_dense_layers=n_dense)
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
    captured = ("topk_indices", "index_scores", "input", "attn", "out", "experts")
    logits, _, aux = run(capture=captured)(params(), TOKENS)
    assert aux["topk_indices"].shape == (3, 2, T, K) and aux["index_scores"].shape == (3, 2, T, T)
    assert aux["out"].shape[0] == 5 and aux["experts"].shape[0] == aux["expert_load"].shape[0] == 3

    for layer in (2, 4):
        last = sum(full < layer for full in CONFIG.full_layers) - 1
        out = attention_of(layer, aux["input"][layer], aux["topk_indices"][last])
        np.testing.assert_allclose(aux["attn"][layer], out, rtol=0, atol=1e-5)

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
    own, _, found = jax.jit(functools.partial(Transformer(all_full).apply, capture=("topk_indices", "out")))(
        {"params": tree | rest}, TOKENS
    )
    np.testing.assert_array_equal(found["topk_indices"][:2], aux["topk_indices"][:2])
    np.testing.assert_allclose(found["out"][:2], aux["out"][:2], rtol=0, atol=1e-5)
    assert np.abs(found["out"][2] - aux["out"][2])[:, K:].max() > 1e-3
    np.testing.assert_allclose(own[:, :K], logits[:, :K], rtol=0, atol=1e-5)  # all keys are selected there


def attention_of(layer, x, selected):
    """Of the layer over these keys of each query."""
    parameters = one_layer(params()["params"], layer)
    placement, _ = place(jnp.ones_like(TOKENS), None)
    rope = rotation(placement.positions, CONFIG)
    hidden = rms_norm(x, parameters["attn_norm"], CONFIG.norm_eps)
    queries, keys = compress(hidden, rope, placement, parameters["attn"], CONFIG)
    return attend(queries, keys, selected, parameters["attn"], CONFIG)[0]


def one_layer(tree, layer):
    stack = next(stack for stack in stacks(CONFIG) if layer in stack.layers)
    return jax.tree.map(lambda leaf: leaf[stack.layers.index(layer)], tree[stack.name])


@pytest.mark.parametrize("remat", ["none", "layer"])
@pytest.mark.parametrize("learns", [False, True])
def test_top_k_is_computed_once_per_full_layer_and_not_again_in_the_backward_pass(remat, learns):
    """The model is three scans, of 1, 2 and 2 layers per step, each with one top-k in its step."""
    config = dataclasses.replace(CONFIG, remat=remat, n_mtp_layers=0, index_loss=learns)
    tree = {name: leaf for name, leaf in params()["params"].items() if name != "mtp"}

    def loss(tree):
        _, _, aux = Transformer(config).apply({"params": tree}, TOKENS, return_logits=False)
        return (aux["final_hidden"] ** 2).sum() + aux.get("index_loss", jnp.zeros(())).sum()

    program = jax.jit(jax.grad(loss)).lower(tree).as_text()
    assert len(re.findall(rf"top_k\(.*\) : tensor<2x{T}x{T}xf32>", program)) == len(scans(config)) == 3


# -- cache


@pytest.mark.parametrize("form", ["mha", "mqa"])
def test_a_cache_gives_what_one_pass_gives(form):
    """Prefill in two parts and decode, past index_topk, with padding on the left of one row."""
    model = Transformer(dataclasses.replace(CONFIG, attention_form=form))
    ids = jnp.ones_like(TOKENS).at[1, :3].set(0)
    step = jax.jit(lambda p, t, s, cache: model.apply(p, t, segment_ids=s, cache=cache)[:2])
    whole, _ = step(params(), TOKENS, ids, None)
    cache, parts, begin = init_cache(CONFIG, 2, T), [], 0
    assert cache.latent.shape[0] == 5 and cache.index_k.shape[0] == 3
    for size in (5, T - 8, 1, 1, 1):
        part, cache = step(params(), TOKENS[:, begin : begin + size], ids[:, begin : begin + size], cache)
        parts.append(part)
        begin += size
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, rtol=0, atol=2e-5)
    assert (np.abs(cache.index_k).max(axis=(1, 2, 3)) > 0).all()


# -- MTP


def mtp(config=CONFIG, **options):
    return jax.jit(functools.partial(Transformer(config).apply, method="mtp_logits", **options))


def test_a_further_draft_reads_the_keys_of_the_first():
    """Selecting for itself it reads others; given the same keys again, it computes the same without an indexer."""
    hidden = run()(params(), TOKENS)[2]["hidden"]
    cache = init_cache(CONFIG, 2, T + 2, n_layers=1)
    first, cache, aux = mtp(capture=("topk_indices",))(params(), hidden[:, :-1], TOKENS[:, 1:], cache=cache)
    selected = aux["topk_indices"][:, -1:]
    again = (params(), aux["hidden"][:, -1:], first[:, -1:].argmax(-1))

    own, _, found = mtp(capture=("topk_indices",))(*again, cache=cache)
    shared, new_cache, _ = mtp()(*again, cache=cache, selected=selected)
    same, _, _ = mtp()(*again, cache=cache, selected=found["topk_indices"])
    np.testing.assert_allclose(same, own, rtol=0, atol=1e-6)
    assert (found["topk_indices"] != selected).any() and np.abs(shared - own).max() > 1e-3
    assert (new_cache.length == cache.length + 1).all()

    no_indexer = jax.tree.map(lambda x: x, params())
    no_indexer["params"]["mtp"]["layer"]["attn"]["indexer"] = jax.tree.map(
        lambda x: x * jnp.nan, params()["params"]["mtp"]["layer"]["attn"]["indexer"]
    )
    unread, _, _ = mtp()(no_indexer, *again[1:], cache=cache, selected=selected)
    np.testing.assert_array_equal(unread, shared)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        (dict(mtp_reuses_selection=False), {}, "needs a model with mtp_reuses_selection=True.*got False"),
        (dict(index_loss=True), {}, "index_loss=False.*got True, True"),
        (dict(attention="dense"), {}, "attention='sparse', got .*'dense'"),
        ({}, dict(capture=("topk_indices",)), "nothing is computed to capture"),
        (
            {},
            dict(selected=jnp.zeros((2, 1, K), jnp.int32)),
            r"\[B T K\] with \[B T\] of the tokens \(2, 24\)",
        ),
    ],
)
def test_a_selection_is_refused_where_it_cannot_be_reused(changes, options, message):
    given = {"selected": jnp.zeros((2, T, K), jnp.int32)} | options
    model = Transformer(dataclasses.replace(CONFIG, **changes))
    with pytest.raises(ValueError, match=message):
        model.apply(params(), jnp.zeros((2, T, CONFIG.d_model)), TOKENS, method="mtp_logits", **given)


# -- checkpoints


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("glm") / "hf"
    write_hf(path, params(), CONFIG)
    return path


def rewritten(folder, path, change):
    """The folder with other tensors."""
    path.mkdir()
    stored = HfFolder(folder)
    tensors = {name: np.array(stored.read(name)) for name in stored.entries}
    change(tensors)
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text((folder / "config.json").read_text())
    return path


def test_a_missing_and_a_superfluous_indexer_tensor_are_named(folder, tmp_path):
    full, shared = (f"model.layers.{layer}.self_attn.indexer.wk.weight" for layer in (3, 4))

    def move(tensors):
        tensors[shared] = tensors.pop(full)

    with pytest.raises(ValueError) as error:
        load_params(rewritten(folder, tmp_path / "moved", move), CONFIG)
    assert f"1 tensors missing, so their leaves are unfilled: {full}" in str(error.value)
    assert f"1 tensors unknown to this config: {shared}" in str(error.value)


def test_fresh_indexers_are_added_to_full_layers_only(folder, tmp_path):
    """And its config.json says so: that of the dense model may say which layers share."""

    def without_indexers(tensors):
        for name in [name for name in tensors if ".indexer." in name]:
            del tensors[name]

    dense = HfFolder(rewritten(folder, tmp_path / "dense", without_indexers))
    config = from_hf(add_indexer_keys(json.loads((folder / "config.json").read_text())))
    assert config.full_layers == CONFIG.full_layers
    fresh = FreshIndexer(dense, config)
    assert {name.split(".")[2] for name in fresh.added} == {"0", "1", "3", "5"}  # 5: the MTP layer
    assert set(fresh.entries) == set(HfFolder(folder).entries)


def test_the_reuse_of_a_selection_survives_the_folder(folder):
    assert from_hf(json.loads((folder / "config.json").read_text())).mtp_reuses_selection
    assert to_hf(CONFIG)["index_share_for_mtp_iteration"] is True
