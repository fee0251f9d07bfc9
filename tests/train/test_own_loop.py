"""The loop in ``train``'s docstring: it is short, it trains, and a mesh computes what one device does."""

import dataclasses
import functools
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import train
from dsa_jax.sharding import batch_sharding, make_mesh, param_shardings
from dsa_jax.transformer import Transformer
from tests.train.same import assert_same_bits
from tests.train.small import CONFIG, TASK, T, initial
from train.data.rows import batches
from train.optimizer import decay_mask, group_of

LOOP = textwrap.dedent("\n".join(line for line in train.__doc__.splitlines() if line.startswith("    ")))
BATCH, STEPS = 8, 10
SPARSE = dataclasses.replace(CONFIG, n_layers=1, n_dense_layers=0, n_mtp_layers=0, index_loss=True)


@functools.cache
def start():
    return jax.jit(Transformer(SPARSE).init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))


def trained(source, config, mesh=None):
    """(parameters at the end, losses) of the loop on two batches in turn."""
    names: dict = {}
    exec(compile(source, "train/__init__.py", "exec"), names)
    params = start()
    stream = batches(TASK, BATCH, seed=0)
    rows = [next(stream), next(stream)] * (STEPS // 2)
    if mesh is None:
        *_, (end, _) = steps = list(names["fit"](config, params, rows))
        return end, [float(loss) for _, loss in steps]
    params = jax.device_put(params, param_shardings(params, config, mesh))
    rows = [jax.device_put(batch, batch_sharding(config, mesh, BATCH, T)) for batch in rows]
    with jax.set_mesh(mesh):
        *_, (end, _) = steps = list(names["fit"](config, params, rows))
    return end, [float(loss) for _, loss in steps]


def test_it_has_fewer_than_20_lines():
    code = [line for line in LOOP.splitlines() if line.strip() and not line.startswith(("import ", "from "))]
    assert 10 < len(code) < 20


@pytest.mark.devices(8)
def test_its_loss_falls_alike_on_one_device_and_on_a_mesh():
    _, alone = trained(LOOP, SPARSE)
    _, meshed = trained(LOOP, SPARSE, make_mesh(expert=2, tensor=2))
    assert max(alone[-2:]) < 0.9 * min(alone[:2])
    np.testing.assert_allclose(meshed, alone, rtol=1e-4)


def test_what_the_loss_does_not_reach_keeps_its_bits_under_weight_decay():
    source = LOOP.replace(' + aux["index_loss"].sum()', "").replace(
        "mask=decay_mask", 'mask=lambda params: decay_mask(params, trains="model")'
    )
    assert source.count("index_loss") == 0 and 'trains="model"' in source
    end, losses = trained(source, dataclasses.replace(SPARSE, index_loss=False))
    assert losses[-1] < losses[0]
    old, new = (traverse_util.flatten_dict(tree, sep=".") for tree in (start(), end))
    kept = [path for path in new if group_of(path) != "model"]
    assert any(".indexer." in path for path in kept) and any("gate_bias" in path for path in kept)
    for path in kept:
        assert_same_bits(new[path], old[path])


@pytest.mark.parametrize("trains", ["model", "indexer", "both"])
def test_the_mask_has_one_answer_for_the_tree_its_parts_and_the_flat_dict(trains):
    mask = decay_mask(initial(), trains)
    assert jax.tree.structure(mask) == jax.tree.structure(initial())
    flat = traverse_util.flatten_dict(mask, sep=".")
    assert flat == decay_mask(traverse_util.flatten_dict(initial(), sep="."), trains)
    assert mask["params"] == decay_mask(initial()["params"], trains)
    assert mask == decay_mask(jax.eval_shape(initial), trains)
    for path, decays in flat.items():
        is_matrix = not any(word in path.rsplit(".", 1)[-1] for word in ("norm", "bias", "scale"))
        reached = group_of(path) == trains or (trains == "both" and group_of(path) != "router_bias")
        assert decays == (is_matrix and reached), path
    assert sum(flat.values()) > 5
