"""Load-balanced context parallelism: the same keys are selected, and every device scores as many."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax import mla
from dsa_jax.cache import Keys, Queries
from dsa_jax.config import tiny
from dsa_jax.indexer import Indexer, index_keys, select
from dsa_jax.rope import rotation
from dsa_jax.sharding import make_mesh, query_axes, shard_map
from dsa_jax.sharding.zigzag import swap_halves
from pallas_kernels import dispatch, index_scores_has_kernel

pytestmark = pytest.mark.devices(8)

MESHES = [
    {"context": 2},
    {"context": 4},
    {"context": 8},
    {"context": 2, "tensor": 2},
    {"context": 4, "tensor": 2},
]
B, T = 4, 64
CACHED = 16  # keys before the first query
PER_QUERY = ("batch", "queries", None)

# Eight times as many keys as a query may select, and several blocks of queries per device, the last one not full.
CONFIG = tiny(d_model=64, q_lora_rank=32, index_n_heads=2, index_topk=8, query_block=6, dtype="float32")
IN_FP8 = dataclasses.replace(CONFIG, index_fp8=True, dtype="bfloat16")


def bounds():
    """(key_start, key_stop) [B T]: one document, three documents, padding at both ends, a filled cache."""
    t = np.arange(T)
    begins = np.select([t >= 2 * T // 3, t >= T // 4], [2 * T // 3, T // 4], 0)
    padding = (t < 5) | (t >= T - 7)
    start = np.stack([0 * t, begins, np.where(padding, 0, 5), 0 * t])
    stop = np.stack([t + 1, t + 1, np.where(padding, 0, t + 1), t + 1 + CACHED])
    return jnp.asarray(start, jnp.int32), jnp.asarray(stop, jnp.int32)


@functools.cache
def problem(config):
    """Arguments of ``select`` but the config."""

    @jax.jit
    def draw():
        def normal(seed, *shape):
            return jax.random.normal(jax.random.key(seed), (B, *shape)).astype(config.dtype)

        S = T + CACHED
        rope = rotation(jnp.broadcast_to(jnp.arange(S), (B, S)), config)
        indexer = Indexer(config).init(jax.random.key(0))["params"]
        keys = index_keys(normal(1, S, config.d_model), rope, indexer, config)
        hidden, q_compressed = normal(2, T, config.d_model), normal(3, T, config.q_lora_rank)
        queries = Queries(hidden, q_compressed, jax.tree.map(lambda x: x[:, :T], rope), *bounds())
        return queries, keys, indexer

    return draw()


def selection(config, n_queries=T, **switches):
    """``select`` on the mesh in use, as ``select_keys`` calls it."""
    return shard_map(
        functools.partial(select, config=config, split_over=query_axes(n_queries), **switches),
        in_axes=(Queries.axes("queries"), ("batch", None, None), ()),
        out_axes=(PER_QUERY, PER_QUERY),
    )


def traced(function, *arguments):
    """(number of exchanges, results)."""
    program = jax.jit(lambda *arguments: function(*arguments)).trace(*arguments)
    return str(program.jaxpr).count("ppermute"), program.lower().compile()(*arguments)


@functools.cache
def chosen_alone(config):
    return np.asarray(jax.jit(functools.partial(select, config=config))(*problem(config))[0])


@pytest.mark.parametrize("mesh", [*MESHES, {"context": 4, "in_fp8": True}], ids=str)
def test_the_same_keys_are_chosen(mesh):
    config = IN_FP8 if "in_fp8" in mesh else CONFIG
    with jax.set_mesh(make_mesh(**{axis: n for axis, n in mesh.items() if axis != "in_fp8"})):
        n_even, (even, _) = traced(selection(config, balance=True), *problem(config))
        n_plain, (plain, _) = traced(selection(config, balance=False), *problem(config))
    assert (n_even, n_plain) == (5, 0)  # q, weights, key_start, key_stop; indices
    np.testing.assert_array_equal(even, plain)
    np.testing.assert_array_equal(even, chosen_alone(config))


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_every_device_scores_the_same_number_of_keys(mesh):
    n = math.prod(mesh.values())
    per_query = PER_QUERY[:2]

    with jax.set_mesh(make_mesh(**mesh, devices=jax.devices()[:n])):
        axes = query_axes(T)

        def keys_to_score(key_start, key_stop):
            keys = key_stop - key_start
            return tuple(x.sum(axis=1, keepdims=True) for x in (keys, swap_halves(keys, axes)))

        of_devices = shard_map(keys_to_score, (per_query, per_query), (per_query, per_query))
        counts = jax.jit(of_devices)(*(x[np.array([0, 3])] for x in bounds()))  # rows of one document
    before, after = map(np.asarray, counts)
    assert before.shape == (2, n)
    assert (np.diff(before, axis=1) == (T // n) ** 2).all()
    assert (after == before.mean(axis=1, keepdims=True)).all()


def test_with_an_odd_number_of_devices_the_middle_one_keeps_its_queries():
    x = jnp.arange(12).reshape(1, 12)
    with jax.set_mesh(make_mesh(context=3, devices=jax.devices()[:3])):
        axes = query_axes(12)
        swapped = jax.jit(shard_map(lambda x: swap_halves(x, axes), (PER_QUERY[:2],), PER_QUERY[:2]))
        np.testing.assert_array_equal(swapped(x)[0], [0, 1, 10, 11, 4, 5, 6, 7, 8, 9, 2, 3])
        np.testing.assert_array_equal(swapped(swapped(x)), x)


def test_nothing_is_exchanged_where_it_cannot_be_or_does_not_pay():
    queries, keys, indexer = problem(CONFIG)

    def exchanged(mesh, n, **switches):
        few = jax.tree.map(lambda x: x[:, :n], queries)
        with jax.set_mesh(make_mesh(**mesh)):
            function = selection(CONFIG, n, **switches)
            return str(jax.make_jaxpr(function)(few, keys, indexer)).count("ppermute")

    assert exchanged({"context": 8}, 48, balance=True) == 5
    assert exchanged({"context": 8}, 40, balance=True) == 0  # 5 queries per device
    assert exchanged({"context": 8}, 41, balance=True) == 0  # every device has all of them
    assert exchanged({"data": 4, "expert": 2}, 48, balance=True) == 0
    assert exchanged({"context": 8}, 48, balance=True, with_scores=True) == 0
    assert exchanged({"context": 8}, 48) == 0  # XLA multiplies every key


def test_balancing_pays_where_a_kernel_scores(monkeypatch):
    sizes = (64, 128, jnp.dtype(jnp.bfloat16))
    assert not index_scores_has_kernel(*sizes)
    monkeypatch.setenv(dispatch.ANY_JAX_VERSION, "1")
    monkeypatch.setitem(dispatch.PREFERRED, jax.default_backend(), ("mosaic_gpu",))
    assert not index_scores_has_kernel(*sizes)  # it refuses: this is no GPU
    monkeypatch.setattr("pallas_kernels.hopper.device.require_hopper", lambda: None)
    assert index_scores_has_kernel(*sizes)
    assert not index_scores_has_kernel(*sizes, "xla")
    assert not index_scores_has_kernel(64, 128, jnp.dtype(jnp.float32))


def test_attention_is_the_same_and_no_gradient_is_exchanged(monkeypatch):
    """As the model calls it, with the gradients of everything that only the selection depends on."""
    config = dataclasses.replace(CONFIG, attention_form="mha", n_heads=2, query_block=T)
    queries, index_k, indexer = problem(config)
    heads = jax.jit(mla.Mla(config).init)(jax.random.key(4))["params"]
    latent, k_rope = (
        jnp.asarray(np.random.default_rng(5).normal(size=(B, T + CACHED, n)), jnp.float32)
        for n in (config.kv_lora_rank, config.qk_rope_head_dim)
    )

    def loss(hidden, index_k, indexer):
        given = dataclasses.replace(queries, hidden=hidden)
        keys, parameters = Keys(latent, k_rope, index_k), heads | {"indexer": indexer}
        selected, _ = mla.select_keys(given, keys, parameters, config)
        out, _ = mla.attend(given, keys, selected, parameters, config)
        return (out**2).sum(), (out, selected)

    gradient = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    with jax.set_mesh(make_mesh(context=4)):
        n_plain, (plain, _) = traced(gradient, queries.hidden, index_k, indexer)
        monkeypatch.setattr("pallas_kernels.index_scores_has_kernel", lambda *_: True)
        n_even, (even, gradients) = traced(gradient, queries.hidden, index_k, indexer)
    assert (n_even, n_plain) == (5, 0)
    jax.tree.map(np.testing.assert_array_equal, even, plain)
    assert not any(np.any(d) for d in jax.tree.leaves(gradients))
