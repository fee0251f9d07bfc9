"""Meshes of simulated devices compute what one device computes: training steps, prefill and decode.

python -m pytest -s tests/dsa_jax/sharding/test_meshes.py -k every_combination

prints the table of docs/scaling.md: the largest difference in each step, per mesh.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax.cache import init_cache
from dsa_jax.sharding import AXES, batch_sharding, cache_shardings, make_mesh, param_shardings
from dsa_jax.transformer import Transformer
from tests.train.small import CONFIG as SMALL
from tests.train.small import T, batch_of
from train.config import indexer_warmup, sparse
from train.step import begin_stage, train_step

pytestmark = pytest.mark.devices(8, 16)

# Several blocks of queries per device, and four times as many keys as a query may select.
CONFIG = dataclasses.replace(SMALL, n_heads=4, query_block=4, index_topk=8)
B = 4
BATCH = batch_of([20, 9], [T], [5, 20], [31])
N_PREFILL = T - 4  # the others are decoded, one per step
STAGES = {
    "sparse": sparse(10, lr=1e-2, index_lr=1e-2, clip=1e9),
    "warm-up": indexer_warmup(10, index_lr=1e-2, clip=1e9),
}
CAPTURED = ("topk_indices", "experts", "out")
LIMIT = 1e-5

Axes = tuple[str, ...]
MESHES = [axes for n in range(1, 5) for axes in itertools.combinations(AXES, n)]


def sizes_of(axes: Axes) -> dict[str, int]:
    """Four devices along a single axis, else two along each."""
    return dict.fromkeys(AXES, 1) | dict.fromkeys(axes, 4 if len(axes) == 1 else 2)


def mesh_of(axes: Axes):
    """A mesh of the first devices; None without axes: one device."""
    sizes = sizes_of(axes)
    return make_mesh(**sizes, devices=jax.devices()[: math.prod(sizes.values())]) if axes else None


def under(mesh):
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


@functools.cache
def initial():
    return jax.jit(Transformer(CONFIG).init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))


def differences(got, want):
    """Per array the largest difference, relative to its largest number; of integers how many differ."""

    def difference(got, want):
        got, want = np.asarray(got), np.asarray(want)
        assert got.shape == want.shape and got.dtype == want.dtype
        if want.dtype.kind != "f":
            return np.count_nonzero(got != want)
        return np.abs(got - want).max(initial=0) / max(np.abs(want).max(initial=0), 1e-30)

    found = jax.tree.map(difference, got, want)
    return {jax.tree_util.keystr(path): float(x) for path, x in jax.tree.leaves_with_path(found)}


def assert_close(found):
    beyond = {path: difference for path, difference in found.items() if not difference <= LIMIT}
    assert not beyond


def one_step(stage, axes: Axes = ()):
    """Metrics of one step, and the first moments after it: 0.1 times the gradients, since nothing is clipped."""
    state, batch, mesh = begin_stage(jnp.int32(0), initial(), stage), BATCH, mesh_of(axes)
    where = None
    if mesh is not None:
        where = param_shardings(state, CONFIG, mesh)
        state = jax.device_put(state, where)
        batch = jax.device_put(batch, batch_sharding(CONFIG, mesh, B, T))
    step = jax.jit(
        functools.partial(train_step, config=CONFIG, stage=stage), out_shardings=where and (where, None)
    )
    with under(mesh):
        state, metrics = step(state, batch)
    return metrics, [group.inner_state[1][0].mu for group in state.opt_state.inner_states.values()]


@functools.cache
def one_step_alone(stage):
    return one_step(stage)


def prefill_and_decode(axes: Axes = ()):
    """[logits, selected keys, experts and layer outputs] of the prefill and of each decode step, and the cache."""
    model, mesh = Transformer(CONFIG), mesh_of(axes)

    @jax.jit
    def step(params, tokens, segment_ids, cache):
        logits, cache, aux = model.apply(
            params, tokens, segment_ids=segment_ids, cache=cache, capture=CAPTURED
        )
        return cache, (logits, {name: aux[name] for name in CAPTURED})

    params, tokens, cache = initial(), BATCH["tokens"], init_cache(CONFIG, B, T)
    # Some rows have padding on the left; one has another document before the one that is decoded.
    segment_ids = jnp.ones_like(tokens).at[::3, :2].set(0).at[1, :9].set(2)
    if mesh is not None:
        params = jax.device_put(params, param_shardings(params, CONFIG, mesh))
        cache = jax.device_put(cache, cache_shardings(CONFIG, mesh, B))
    outputs = []
    with under(mesh):
        for start, stop in itertools.pairwise([0, *range(N_PREFILL, T + 1)]):
            cache, output = step(params, tokens[:, start:stop], segment_ids[:, start:stop], cache)
            outputs.append(output)
    if mesh is not None:
        assert cache.latent.sharding.is_equivalent_to(cache_shardings(CONFIG, mesh, B).latent, 4)
    return outputs, cache


@functools.cache
def prefill_and_decode_alone():
    return prefill_and_decode()


@functools.cache
def differences_of_inference(axes: Axes):
    (got, got_cache), (want, want_cache) = prefill_and_decode(axes), prefill_and_decode_alone()
    return {
        "prefill": differences(got[0], want[0]),
        "decode": differences((got[1:], got_cache), (want[1:], want_cache)),
    }


def test_prefill_and_decode_are_the_same():
    for found in differences_of_inference(("expert", "context", "tensor")).values():
        assert_close(found)


# -- the table


@pytest.fixture(scope="module")
def table():
    """Lines; printed at the end."""
    lines = [
        "| mesh | devices | sparse step | warm-up step | prefill | decode | selected keys that differ |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    yield lines
    print("", *lines, sep="\n")


@pytest.mark.slow
@pytest.mark.parametrize("axes", MESHES, ids="-".join)
def test_every_combination_of_axes_computes_what_one_device_does(axes, table, request):
    sizes = sizes_of(axes)
    mesh, n_devices = ", ".join(f"{axis}={sizes[axis]}" for axis in axes), math.prod(sizes.values())
    if n_devices > jax.device_count():
        table.append(line_of_another_process(request.node.nodeid, request.config.rootpath, mesh))
        return

    found = {
        name: differences(one_step(stage, axes), one_step_alone(stage)) for name, stage in STAGES.items()
    }
    found |= differences_of_inference(axes)
    worst = [f"{np.max(list(arrays.values())):.1e}" for arrays in found.values()]
    selected = sum(n for arrays in found.values() for path, n in arrays.items() if "topk_indices" in path)
    table.append(f"| {' | '.join([f'`{mesh}`', str(n_devices), *worst, f'{selected:.0f}'])} |")
    for arrays in found.values():
        assert_close(arrays)


def line_of_another_process(test: str, folder: str, mesh: str) -> str:
    """The line of the table that this test prints with 16 simulated devices."""
    flags = os.environ.get("XLA_FLAGS", "")
    assert "device_count=16" not in flags
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-s", "-p", "no:xdist", "-p", "no:cacheprovider", test],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=16"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return next(line for line in done.stdout.splitlines() if line.startswith(f"| `{mesh}`"))


@pytest.mark.slow
def test_parameters_initialised_on_a_mesh_equal_those_of_one_device():
    mesh = mesh_of(("expert", "context", "tensor"))
    where = param_shardings(initial(), CONFIG, mesh)
    with jax.set_mesh(mesh):
        made = jax.jit(Transformer(CONFIG).init, out_shardings=where)(
            jax.random.key(0), jnp.zeros((1, 2), jnp.int32)
        )
    assert_close(differences(made, initial()))
