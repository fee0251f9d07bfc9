"""Attention as a function of a checkpoint's own subtree: what the model computes, layer by layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax import Transformer, load_config, load_params, write_hf
from dsa_jax.cache import place
from dsa_jax.indexer import index_keys, index_queries
from dsa_jax.mla import attend, compress, select_keys
from dsa_jax.norm import rms_norm
from dsa_jax.rope import rotation
from tests.dsa_jax.models import config_of, params_of, tokens_of

TOKENS = tokens_of("tiny_calm")  # 64 per row, index_topk 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(config, params) from a written folder."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    write_hf(folder, params_of("tiny_calm"), config_of("tiny_calm"))
    config = load_config(folder, dtype="float32")
    return config, load_params(folder, config)


@pytest.mark.parametrize("layer", [0, 2])
def test_attend_with_a_layer_of_a_checkpoint_gives_what_the_model_gives(checkpoint, layer):
    config, params = checkpoint
    captured = ("input", "attn", "topk_indices", "index_scores")
    _, _, aux = jax.jit(lambda p, t: Transformer(config).apply(p, t, capture=captured))(params, TOKENS)

    stack, i = ("dense_layers", layer) if layer < config.n_dense_layers else ("moe_layers", layer - 1)
    parameters = jax.tree.map(lambda x: x[i], params["params"][stack])

    @jax.jit
    def alone(x, parameters):
        placement, _ = place(jnp.ones_like(TOKENS), None)
        hidden = rms_norm(x, parameters["attn_norm"], config.norm_eps)
        rope = rotation(placement.positions, config)
        queries, keys = compress(hidden, rope, placement, parameters["attn"], config)
        selected, found = select_keys(queries, keys, parameters["attn"], config, captured)
        out, _ = attend(queries, keys, selected, parameters["attn"], config)

        indexer = parameters["attn"]["indexer"]
        q, weights = index_queries(queries, indexer, config)
        dots = jnp.einsum("BTIJ,BSJ->BTIS", q, index_keys(hidden, rope, indexer, config))
        return out, found, jnp.einsum("BTIS,BTI->BTS", jax.nn.relu(dots), weights)

    out, found, scores = alone(aux["input"][layer], parameters)
    np.testing.assert_allclose(out, aux["attn"][layer], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(found["topk_indices"], aux["topk_indices"][layer])
    seen = np.tril(np.ones((64, 64), bool))
    for ours in (scores, found["index_scores"]):
        np.testing.assert_allclose(ours[:, seen], aux["index_scores"][layer][:, seen], rtol=0, atol=1e-5)
