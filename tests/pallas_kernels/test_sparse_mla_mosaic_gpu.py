"""The Hopper kernel of sparse_mla: its pipeline in the interpreter, compilation, numbers on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels.sparse_mla import xla
from tests.pallas_kernels import sm90a

if jax.__version_info__ < (0, 11):
    pytest.skip("the kernel needs jax 0.11", allow_module_level=True)

from pallas_kernels.sparse_mla import mosaic_gpu

ON_GPU = jax.default_backend() == "gpu"
on_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a Hopper GPU")
SCALE = 576**-0.5


def make_inputs(B, T, N, S, K, seed=0):
    """Random rows without repeated keys; -1 anywhere, a row without keys and one whose only key comes last."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)  # noqa: E731
    keys = np.full((B, T, K), -1, np.int32)
    n = min(K, S)
    for row in keys.reshape(-1, K):
        row[:n] = rng.permutation(S)[:n]
    keys[rng.random(keys.shape) < 0.2] = -1
    keys[0, 0] = -1
    keys[-1, -1] = -1
    keys[-1, -1, -1] = S - 1
    if T > 2:
        keys[0, 1, : K // 2] = -1
        keys[0, 2, K // 2 :] = -1
    return normal(B, T, N, 512), normal(B, T, N, 64), normal(B, S, 512), normal(B, S, 64), jnp.asarray(keys)


def check(out, lse, inputs):
    in_float32 = [x.astype(jnp.float32) for x in inputs[:4]]
    reference, reference_lse = (np.asarray(x) for x in xla.forward(*in_float32, inputs[4], scale=SCALE))
    out, lse = np.asarray(out, np.float32), np.asarray(lse)
    has_keys = np.isfinite(reference_lse)
    np.testing.assert_array_equal(np.isneginf(lse), ~has_keys)
    assert (out[~has_keys] == 0).all()
    error = np.linalg.norm(out - reference) / np.linalg.norm(reference)
    assert error < 3e-3, error
    np.testing.assert_allclose(lse[has_keys], reference_lse[has_keys], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(ON_GPU, reason="runs on CPU")
@pytest.mark.parametrize(("B", "T", "N", "S", "K"), [(1, 3, 64, 150, 200), (2, 2, 16, 100, 70)])
def test_the_pipeline_in_the_interpreter_equals_xla(B, T, N, S, K):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    inputs = make_inputs(B, T, N, S, K)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        out, lse = mosaic_gpu.forward(*inputs, scale=SCALE, interpret=True)
    check(out, lse, inputs)


def kernel(T, n_splits, pairs):
    """The function and shapes of V3.2's attention, T queries over 32K keys, for ``sm90a``."""
    S, N, K = 32768, 128, 2048
    shape = lambda *s, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(s, dtype)  # noqa: E731
    function = mosaic_gpu._kernel(1, T, N, K, n_splits, pairs, SCALE, 132, False)
    queries = shape(T, N, 512), shape(T, N, 64)
    return function, [*queries, shape(1, S, 512), shape(1, S, 64), shape(T, K, dtype=jnp.int32)]


prefill_kernel = functools.partial(kernel, 4096, 1, 16)
decode_kernel = functools.partial(kernel, 1, 16, 1)


@pytest.mark.parametrize("name", ["prefill_kernel", "decode_kernel"])
def test_it_compiles_for_hopper_without_spills(name):
    (used,) = sm90a.resources(f"{__name__}:{name}")
    assert used == {"registers": 168, "spills": 0}


@pytest.mark.parametrize("tiles", [1, 2, 7, 64, 128, 131, 132, 133, 256, 8192])
@pytest.mark.parametrize("pairs", [1, 2, 15, 16, 17])
def test_splits_cover_the_keys_and_only_few_queries_are_split(tiles, pairs):
    n_splits, per_split = mosaic_gpu._split(tiles, pairs, 132)
    assert (n_splits - 1) * per_split < pairs <= n_splits * per_split
    assert n_splits == 1 or tiles * n_splits <= 2 * 132
    if tiles == 1:
        assert per_split == 1  # one query uses as many multiprocessors as it has pairs


def test_splits_merge_to_the_whole():
    (q_latent, q_rope, latent, k_rope, indices) = (
        x.astype(jnp.float32) for x in make_inputs(1, 4, 8, 90, 120)
    )
    indices = indices.astype(jnp.int32).at[0, 3, 40:].set(-1)  # two splits without keys
    run = functools.partial(xla.forward, q_latent, q_rope, latent, k_rope, scale=SCALE)
    parts = [run(indices[..., start : start + 40]) for start in (0, 40, 80)]
    out, lse = mosaic_gpu._merge(*(jnp.concatenate(x) for x in zip(*parts, strict=True)))
    reference, reference_lse = run(indices)
    np.testing.assert_allclose(lse, reference_lse[0], rtol=1e-6)
    np.testing.assert_allclose(out.astype(jnp.float32), reference[0], rtol=5e-3, atol=1e-6)  # bfloat16


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("B", "T", "N", "S", "K"),
    [
        (1, 40, 128, 5000, 2048),
        (2, 7, 64, 333, 200),
        (2, 5, 16, 77, 1),
        (1, 300, 128, 1000, 70),
        (3, 2, 8, 129, 129),
        (1, 3, 128, 4096, 2048),
        (2, 2, 96, 3000, 1999),
    ],
)
def test_it_equals_xla_in_float32(B, T, N, S, K):
    inputs = make_inputs(B, T, N, S, K)
    run = jax.jit(functools.partial(pk.sparse_mla, scale=SCALE, implementation="mosaic_gpu"))
    out, lse = run(*inputs)
    check(out, lse, inputs)
    for _ in range(20):  # bit for bit
        again = run(*inputs)
        assert (again[0] == out).all() and (again[1] == lse).all()


@on_gpu
@pytest.mark.gpu
def test_a_maximum_that_keeps_rising_is_followed():
    q_latent, q_rope, latent, k_rope, _ = make_inputs(1, 2, 64, 1024, 8)
    growth = jnp.linspace(0.1, 8.0, 1024, dtype=jnp.bfloat16)[None, :, None]
    keys = jnp.broadcast_to(jnp.arange(1024, dtype=jnp.int32), (1, 2, 1024))
    for indices in (keys, keys[..., ::-1]):
        inputs = (q_latent, q_rope, latent * growth, k_rope * growth, indices)
        check(*pk.sparse_mla(*inputs, scale=SCALE, implementation="mosaic_gpu"), inputs)


@pytest.mark.skipif(ON_GPU, reason="needs a machine without a Hopper GPU")
def test_elsewhere_it_refuses_and_says_why():
    inputs = make_inputs(1, 1, 64, 10, 5)
    with pytest.raises(NotImplementedError, match="run on Hopper GPUs"):
        pk.sparse_mla(*inputs, scale=SCALE, implementation="mosaic_gpu")


def test_other_widths_and_types_are_refused():
    inputs = make_inputs(1, 1, 64, 10, 5)
    run = functools.partial(pk.sparse_mla, scale=SCALE, implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match=r"must be \(512, 64\), got \(256, 64\)"):
        run(inputs[0][..., :256], inputs[1], inputs[2][..., :256], *inputs[3:])
    with pytest.raises(NotImplementedError, match="multiplies bfloat16, got float32"):
        run(*(x.astype(jnp.float32) for x in inputs[:4]), inputs[4])
