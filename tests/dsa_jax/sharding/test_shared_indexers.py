"""A model whose layers share indexers, on a mesh of simulated devices: what one device computes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from dsa_jax.cache import init_cache
from dsa_jax.sharding import batch_sharding, cache_shardings, param_shardings
from dsa_jax.transformer import Transformer
from tests.dsa_jax.sharding import test_meshes
from tests.dsa_jax.sharding.test_meshes import BATCH, STAGES, B, assert_close, differences, mesh_of, under
from tests.train.small import T
from train.step import begin_stage, train_step

pytestmark = pytest.mark.devices(8, 16)

CONFIG = dataclasses.replace(
    test_meshes.CONFIG, n_layers=4, n_dense_layers=0, indexer_types=("full", "shared", "full", "shared"),
    index_rope_interleaved=True, n_mtp_layers=0, remat="layer",
)  # fmt: skip
AXES = ("expert", "context", "tensor")


@functools.cache
def initial():
    return jax.jit(Transformer(CONFIG).init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))


@pytest.mark.slow
def test_a_sparse_step_is_the_same():
    def step(mesh):
        stage = STAGES["sparse"]
        state, batch, where = begin_stage(jnp.int32(0), initial(), stage), BATCH, None
        if mesh is not None:
            where = param_shardings(state, CONFIG, mesh)
            state = jax.device_put(state, where)
            batch = jax.device_put(batch, batch_sharding(CONFIG, mesh, B, T))
        run = functools.partial(train_step, config=CONFIG, stage=stage)
        with under(mesh):
            state, metrics = jax.jit(run, out_shardings=where and (where, None))(state, batch)
        return metrics, [group.inner_state[1][0].mu for group in state.opt_state.inner_states.values()]

    assert_close(differences(step(mesh_of(AXES)), step(None)))


def test_prefill_and_decode_are_the_same():
    model = Transformer(CONFIG)

    def outputs(mesh):
        params, cache = initial(), init_cache(CONFIG, B, T)
        if mesh is not None:
            params = jax.device_put(params, param_shardings(params, CONFIG, mesh))
            cache = jax.device_put(cache, cache_shardings(CONFIG, mesh, B))
        run = jax.jit(lambda p, t, c: model.apply(p, t, cache=c, capture=("topk_indices", "out")))
        found = []
        with under(mesh):
            for tokens in (BATCH["tokens"][:, : T - 2], BATCH["tokens"][:, T - 2 : T - 1]):
                logits, cache, aux = run(params, tokens, cache)
                found.append((logits, aux["topk_indices"], aux["out"]))
        return found, cache

    assert_close(differences(outputs(mesh_of(AXES)), outputs(None)))
