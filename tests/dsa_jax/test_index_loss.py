"""The index loss (L_I) in the model: PyTorch's numbers, the same in both forms, gradients for the indexer alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax.transformer import Transformer
from tests.dsa_jax.models import config_of, numbers, params_of, tokens_of

CONFIG, PARAMS = config_of("tiny", index_loss=True), params_of("tiny")
TOKENS = tokens_of("tiny")


def loss_of(params, segment_ids=None, **switches):
    model = Transformer(dataclasses.replace(CONFIG, **switches))
    _, _, aux = model.apply(params, TOKENS, segment_ids=segment_ids, capture=("index_kl",))
    return aux["index_loss"].sum(), aux["index_kl"]


@functools.cache
def run(attention, form):
    switches = dict(attention=attention, attention_form=form, query_block=24)
    return jax.jit(jax.value_and_grad(lambda p: loss_of(p, **switches), has_aux=True))(PARAMS)


def indexer_of(gradient, layer):
    stack, i = ("dense_layers", 0) if layer == 0 else ("moe_layers", layer - 1)
    tensors = gradient["params"][stack]["attn"]["indexer"]
    names = {
        "wq_b.weight": tensors["wq_b"][i].T,
        "wk.weight": tensors["wk"][i].T,
        "k_norm.weight": tensors["k_norm"]["scale"][i],
        "k_norm.bias": tensors["k_norm"]["bias"][i],
        "weights_proj.weight": tensors["weights_proj"][i].T,
    }
    return {f"model.layers.{layer}.self_attn.indexer.{name}": np.asarray(x) for name, x in names.items()}


@pytest.mark.parametrize(
    ("attention", "form"),
    [
        ("dense", "mha"),
        ("sparse", "mqa"),
        pytest.param("dense", "mqa", marks=pytest.mark.slow),
        pytest.param("sparse", "mha", marks=pytest.mark.slow),
    ],
)
class TestLoss:
    def test_it_and_its_gradients_match_pytorch(self, attention, form):
        expected = numbers("tiny_index_kl_float32")
        (loss, kl), gradient = run(attention, form)
        np.testing.assert_allclose(loss, expected[f"{attention}.loss_sum"], rtol=1e-4)
        for layer in range(4):
            np.testing.assert_allclose(
                kl[layer], expected[f"{attention}.layer{layer}.kl"], rtol=1e-4, atol=1e-4
            )
            for name, ours in indexer_of(gradient, layer).items():
                theirs = expected.get(f"{attention}.grad.{name}")
                if theirs is not None:  # wq_b was kept for layer 0 only
                    assert np.linalg.norm(ours - theirs) < 1e-4 * np.linalg.norm(theirs), name

    def test_it_reaches_the_indexer_and_nothing_else(self, attention, form):
        _, gradient = run(attention, form)
        for path, leaf in jax.tree_util.tree_flatten_with_path(gradient["params"])[0]:
            keys = [key.key for key in path]
            if "indexer" in keys and "mtp" not in keys:
                assert np.abs(leaf).max() > 0, keys
            else:
                assert (leaf == 0).all(), keys


def test_padding_adds_nothing():
    ids = jnp.ones_like(TOKENS).at[1, 40:].set(0)
    compiled = jax.jit(loss_of)
    _, whole = compiled(PARAMS, jnp.ones_like(TOKENS))
    loss, kl = compiled(PARAMS, ids)
    assert (kl[:, 1, 40:] == 0).all()
    np.testing.assert_allclose(kl[:, 1, :40], whole[:, 1, :40], atol=1e-4)
    np.testing.assert_allclose(loss, kl.sum(), rtol=1e-5)


def test_the_index_loss_is_computed_only_if_config_asks_for_it():
    model = Transformer(dataclasses.replace(CONFIG, index_loss=False))
    assert "index_loss" not in jax.eval_shape(model.apply, PARAMS, TOKENS)[2]
    with pytest.raises(ValueError, match="needs index_loss=True, got False"):
        model.apply(PARAMS, TOKENS, capture=("index_kl",))
