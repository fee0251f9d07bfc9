"""The Hopper kernel of select_topk: simulated threads on CPU, compilation, exactness on a GPU.

Pallas's interpreter cannot run this kernel, which is all inline code; ``simulated_threads`` can.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels.select_topk import mosaic_gpu_kernel
from pallas_kernels.select_topk.mosaic_gpu_kernel import (
    ONE_ROW,
    TWO_ROWS,
    Inputs,
    Plan,
    Scratch,
    Team,
    build,
    scratch_words,
)
from tests.pallas_kernels import simulated_threads, sm90a

ON_GPU = jax.default_backend() == "gpu"
on_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a Hopper GPU")


def kernel(rows, teams):
    bound = jax.ShapeDtypeStruct((rows,), jnp.int32)
    scores = jax.ShapeDtypeStruct((rows * 32768,), jnp.float32)
    return build(Plan(rows, 32768, 2048, teams, 132)), [Inputs(scores, bound, bound)]


def one_row_kernel():
    return kernel(32, ONE_ROW)


def two_row_kernel():
    return kernel(4096, TWO_ROWS)


@pytest.mark.parametrize(("name", "spills"), [("one_row_kernel", 0), ("two_row_kernel", 64)])
def test_it_compiles_for_hopper_with_few_spills(name, spills):
    (used,) = sm90a.resources(f"{__name__}:{name}")
    assert used["registers"] * 1024 <= sm90a.REGISTER_FILE and used["spills"] <= spills, used


def stable_sort(scores, k, start=None, stop=None):
    """The expected result, also for rows that contain NaN."""
    chosen = np.full((*scores.shape[:2], k), -1, np.int32)
    for row in np.ndindex(scores.shape[:2]):
        keys = np.arange(scores.shape[2])
        visible = scores[row] != -np.inf
        if start is not None:
            visible &= (start[row] <= keys) & (keys < stop[row])
        keys = keys[visible]
        values = scores[row][visible]
        is_nan = np.isnan(values)
        best = np.sort(keys[np.lexsort((keys, -np.where(is_nan, 0, values), ~is_nan))[:k]])
        chosen[row][: len(best)] = best
    return chosen


def hard_rows(S, rng):
    """Rows that break selections: plateaus, signed zeros, no keys, sorted rows, NaN, steps."""
    x = rng.standard_normal((16, S)).astype(np.float32)
    x[1] = 0.0
    x[2] = np.maximum(x[2], 0.0)
    x[3, ::2], x[3, 1::2] = -0.0, 0.0
    x[4] = -np.inf
    x[5, 5:] = -np.inf
    x[6] = rng.integers(0, 3, S)
    x[7] = -np.abs(x[7]) * 1e30
    x[8] = np.sort(x[8])
    x[9] = np.sort(x[9])[::-1]
    x[10, ::3] = np.nan
    x[11, ::7] = -np.nan
    x[12] = np.arange(S) // 3
    x[13] = np.nan
    x[14, ::2] = np.inf
    x[15] = 1e-42 * rng.integers(-3, 4, S)  # subnormal
    return x


def simulate(scores, k, start, stop, teams, n_blocks):
    plan = Plan(*scores.shape, k, teams, n_blocks)
    out = np.full((plan.rows, k), -7, np.int32)
    inputs = Inputs(np.pad(scores.reshape(-1), (0, -scores.size % 4)), start, stop)
    for block in range(n_blocks):
        simulated_threads.start_block(block, teams.count * teams.threads)
        memory = simulated_threads.SharedMemory()
        simulated_threads.MEMORY[:] = [memory]
        scratch = Scratch(*(memory.allocate(words) for words in scratch_words(plan)))
        Team(plan, inputs, out, scratch).select()
    return out


@pytest.fixture
def on_simulated_threads(monkeypatch):
    monkeypatch.setattr(mosaic_gpu_kernel, "tc", simulated_threads)
    monkeypatch.setattr(mosaic_gpu_kernel, "Word", simulated_threads.Word)


@pytest.mark.parametrize("teams", [ONE_ROW, TWO_ROWS])
@pytest.mark.parametrize(("S", "k"), [(131, 16), (131, 500), (9001, 2048), (13001, 512)])
def test_the_code_of_its_threads_equals_a_stable_sort(on_simulated_threads, teams, S, k):
    rng = np.random.default_rng(S + k)
    scores = hard_rows(S, rng)
    np.testing.assert_array_equal(simulate(scores, k, None, None, teams, 3), stable_sort(scores[None], k)[0])
    start = rng.integers(0, max(S // 2, 1), 16).astype(np.int32)
    stop = np.minimum(start + rng.integers(0, S + 1, 16), S).astype(np.int32)
    stop[0], stop[2:4], start[2:4] = start[0], S, 0
    expected = stable_sort(scores[None], k, start[None], stop[None])[0]
    scores[(np.arange(S) < start[:, None]) | (np.arange(S) >= stop[:, None])] = np.inf
    np.testing.assert_array_equal(simulate(scores, k, start, stop, teams, 3), expected)


def test_the_simulation_sees_a_missing_barrier(on_simulated_threads, monkeypatch):
    monkeypatch.setattr(simulated_threads, "named_barrier", lambda name, threads: None)
    with pytest.raises(AssertionError, match="race"):
        simulate(hard_rows(9001, np.random.default_rng(0)), 2048, None, None, TWO_ROWS, 1)


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("copies", [1, 10])  # one row per block, two rows per block
@pytest.mark.parametrize(
    ("S", "k"), [(131, 16), (131, 500), (8192, 2048), (9001, 2048), (30003, 512), (20480, 4096)]
)
def test_it_equals_a_stable_sort(S, k, copies):
    rng = np.random.default_rng(S + k)
    first = hard_rows(S, rng)[None]
    start = rng.integers(0, max(S // 2, 1), (1, 16)).astype(np.int32)
    stop = np.minimum(start + rng.integers(0, S + 1, (1, 16)), S).astype(np.int32)
    stop[:, 0], stop[:, 2:4], start[:, 2:4] = start[:, 0], S, 0
    expected = np.tile(stable_sort(first, k), (1, copies, 1))
    expected_inside = np.tile(stable_sort(first, k, start, stop), (1, copies, 1))
    scores, start, stop = (np.concatenate([x] * copies, axis=1) for x in (first, start, stop))
    run = jax.jit(lambda x: pk.select_topk(x, k, implementation="mosaic_gpu"))
    for _ in range(20):
        np.testing.assert_array_equal(run(jnp.asarray(scores)), expected)
    outside = (np.arange(S) < start[..., None]) | (np.arange(S) >= stop[..., None])
    hidden = jnp.asarray(np.where(outside, np.inf, scores))
    result = pk.select_topk(hidden, k, key_start=start, key_stop=stop, implementation="mosaic_gpu")
    np.testing.assert_array_equal(result, expected_inside)


@on_gpu
@pytest.mark.gpu
def test_rows_beyond_shared_memory():
    scores = jax.random.normal(jax.random.key(0), (1, 6, 160_001))
    result = pk.select_topk(scores, 2048, implementation="mosaic_gpu")
    np.testing.assert_array_equal(result, pk.select_topk(scores, 2048, implementation="xla"))


def test_unsupported_arguments_are_refused():
    with pytest.raises(NotImplementedError, match="at most 4096 keys"):
        pk.select_topk(jnp.zeros((1, 1, 5000)), 4097, implementation="mosaic_gpu")


@pytest.mark.skipif(ON_GPU, reason="needs a machine without a Hopper GPU")
def test_other_devices_are_refused_with_a_reason():
    with pytest.raises(NotImplementedError, match="need jax 0.11|run on Hopper GPUs"):
        pk.select_topk(jnp.zeros((1, 1, 5)), 2, implementation="mosaic_gpu")
