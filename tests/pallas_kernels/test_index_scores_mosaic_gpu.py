"""The Hopper kernel of index_scores: the interpreted pipeline, compilation, accuracy on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels.index_scores import mosaic_gpu, xla
from tests.pallas_kernels import sm90a

ON_GPU = jax.default_backend() == "gpu"
on_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a Hopper GPU")
TOLERANCE = {jnp.dtype(jnp.bfloat16): 2e-6, jnp.dtype(jnp.float8_e4m3fn): 2e-4}


def make_inputs(B, T, S, I, dtype, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    start = rng.integers(0, max(S // 2, 1), (B, T))
    stop = np.minimum(start + rng.integers(0, S + 1, (B, T)), S)
    stop[:, 0] = start[:, 0]  # no key at all
    scale = jnp.exp2(jnp.asarray(rng.integers(-6, 3, (B, S)), jnp.float32))
    bounds = (jnp.asarray(start, jnp.int32), jnp.asarray(stop, jnp.int32))
    return (
        normal(B, T, I, 128).astype(dtype),
        normal(B, S, 128).astype(dtype),
        normal(B, T, I),
        *bounds,
        scale,
    )


def same(scores, inputs):
    q, k, *rest = inputs
    reference = np.asarray(xla.index_scores(q.astype(jnp.float32), k.astype(jnp.float32), *rest))
    scores, visible = np.asarray(scores), np.isfinite(reference)
    np.testing.assert_array_equal(np.isneginf(scores), ~visible)
    error = np.linalg.norm(scores[visible] - reference[visible]) / np.linalg.norm(reference[visible])
    assert error < TOLERANCE[q.dtype], error


@pytest.mark.skipif(ON_GPU, reason="runs on CPU")
@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the Mosaic GPU interpreter needs jax 0.11")
def test_the_pipeline_in_the_interpreter_equals_xla():
    from jax.experimental.pallas import mosaic_gpu as plgpu

    inputs = make_inputs(1, 6, 200, 64, jnp.bfloat16)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        scores = mosaic_gpu.run(*inputs, n_blocks=2, chunk=1, interpret=True)
    same(scores, inputs)


def shapes(dtype, has_scale):
    B, T, S, I = 1, 4096, 32768, 64
    shape = lambda *s, dtype=jnp.float32: jax.ShapeDtypeStruct(s, dtype)  # noqa: E731
    bound = shape(B, T, dtype=jnp.int32)
    scale = [shape(B, S)] if has_scale else []
    return [
        shape(B, T, I, 128, dtype=dtype),
        shape(B, S, 128, dtype=dtype),
        shape(B, T, I),
        bound,
        bound,
        *scale,
    ]


def fp8_kernel():
    return functools.partial(mosaic_gpu.run, n_blocks=132), shapes(jnp.float8_e4m3fn, True)


def bf16_kernel():
    return lambda *x: mosaic_gpu.run(*x, None, n_blocks=132), shapes(jnp.bfloat16, False)


@pytest.mark.parametrize("kernel", ["fp8_kernel", "bf16_kernel"])
def test_it_compiles_for_hopper_without_spills(kernel):
    (used,) = sm90a.resources(f"{__name__}:{kernel}")
    assert used["registers"] * 3 * 128 <= sm90a.REGISTER_FILE and used["spills"] == 0, used


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn])
@pytest.mark.parametrize("has_scale", [True, False])
@pytest.mark.parametrize(
    ("B", "T", "S", "I"),
    [(1, 8, 256, 64), (2, 9, 70, 32), (1, 130, 300, 64), (2, 37, 5001, 64), (3, 2, 4097, 48), (1, 5, 1, 5)],
)
def test_it_equals_xla_in_float32(dtype, has_scale, B, T, S, I):
    inputs = make_inputs(B, T, S, I, dtype)
    inputs = inputs if has_scale else (*inputs[:-1], None)
    scores = pk.index_scores(*inputs[:5], k_scale=inputs[5], implementation="mosaic_gpu")
    same(scores, inputs)


@on_gpu
@pytest.mark.gpu
def test_runs_are_bitwise_equal():
    inputs = make_inputs(1, 300, 9000, 64, jnp.float8_e4m3fn)
    run = jax.jit(lambda *x: pk.index_scores(*x[:5], k_scale=x[5], implementation="mosaic_gpu"))
    first = run(*inputs)
    assert all((run(*inputs) == first).all() for _ in range(20))


@on_gpu
@pytest.mark.gpu
def test_gradients_equal_those_of_xla():
    q, k, weights, start, stop, _ = make_inputs(1, 6, 50, 64, jnp.bfloat16)

    def total(implementation, q, k, weights):
        scores = pk.index_scores(q, k, weights, start, stop, implementation=implementation)
        return jnp.sum(jnp.where(jnp.isfinite(scores), scores, 0.0))

    gradients, references = (
        jax.grad(functools.partial(total, name), (0, 1, 2))(q, k, weights) for name in ("mosaic_gpu", "xla")
    )
    for gradient, reference in zip(gradients, references, strict=True):
        np.testing.assert_array_equal(np.asarray(gradient), np.asarray(reference))


def test_contract_mistakes_are_reported_before_the_device():
    inputs = make_inputs(1, 2, 3, 64, jnp.bfloat16)
    run = functools.partial(pk.index_scores, implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match="multiplies bfloat16 or float8_e4m3fn, got float32"):
        run(*(x.astype(jnp.float32) for x in inputs[:2]), *inputs[2:5])
    with pytest.raises(NotImplementedError, match="index_head_dim 128 and at most 64 heads, got J=64, I=64"):
        run(inputs[0][..., :64], inputs[1][..., :64], *inputs[2:5])


@pytest.mark.skipif(ON_GPU, reason="needs a machine without a Hopper GPU")
def test_other_devices_are_refused_with_a_reason():
    inputs = make_inputs(1, 2, 3, 64, jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="need jax 0.11|run on Hopper GPUs"):
        pk.index_scores(*inputs[:5], implementation="mosaic_gpu")
