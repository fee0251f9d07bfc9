"""The Hopper kernel of sparse_mla: the interpreted pipeline, compilation, accuracy on a GPU."""

import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels.sparse_mla import mosaic_gpu, xla
from pallas_kernels.sparse_mla.mosaic_gpu_kernel import build
from pallas_kernels.sparse_mla.mosaic_gpu_plan import Inputs, Plan, split_keys
from tests.pallas_kernels import sm90a

ON_GPU = jax.default_backend() == "gpu"
on_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a Hopper GPU")
SCALE = 576**-0.5


def make_inputs(B, T, N, S, K, seed=0):
    """Random rows without repeated keys; -1 anywhere, one row without keys, one whose only key comes last."""
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


def quantized(inputs, seed=1):
    """The same inputs with an FP8 cache whose scales are not powers of two: (inputs, keyword arguments)."""
    rng = np.random.default_rng(seed)
    q_latent, q_rope, latent, *others = inputs
    blocks = np.asarray(latent, np.float32).reshape(*latent.shape[:2], 4, 128)
    blocks = blocks * np.exp2(rng.uniform(-4, 4, (*latent.shape[:2], 4, 1)))
    scales = np.abs(blocks).max(axis=-1) / 448.0
    values = (blocks / scales[..., None]).astype(ml_dtypes.float8_e4m3fn).reshape(latent.shape)
    return (q_latent, q_rope, jnp.asarray(values), *others), {
        "latent_scale": jnp.asarray(scales, jnp.float32)
    }


def with_garbage(inputs, options):
    """NaN in every key that no query lists, key 0 among them, which a -1 must not read."""
    q_latent, q_rope, latent, k_rope, indices = inputs
    indices = jnp.where(indices == 0, -1, indices)
    listed = (indices.reshape(len(indices), -1, 1) == jnp.arange(latent.shape[1])).any(axis=1)[..., None]
    assert not listed.all()
    latent, k_rope = (jnp.where(listed, x, jnp.nan).astype(x.dtype) for x in (latent, k_rope))
    options = {name: jnp.where(listed, scale, jnp.nan) for name, scale in options.items()}
    return (q_latent, q_rope, latent, k_rope, indices), options


def check(out, lse, inputs, latent_scale=None):
    q_latent, q_rope, latent, k_rope, indices = inputs
    if latent_scale is not None:  # one rounding to bfloat16, then float32
        latent = (latent.astype(jnp.float32) * jnp.repeat(latent_scale, 128, axis=-1)).astype(jnp.bfloat16)
    in_float32 = [x.astype(jnp.float32) for x in (q_latent, q_rope, latent, k_rope)]
    reference, reference_lse = (np.asarray(x) for x in xla.forward(*in_float32, indices, scale=SCALE))
    out, lse = np.asarray(out, np.float32), np.asarray(lse)
    has_keys = np.isfinite(reference_lse)
    np.testing.assert_array_equal(np.isneginf(lse), ~has_keys)
    assert (out[~has_keys] == 0).all()
    error = np.linalg.norm(out - reference) / np.linalg.norm(reference)
    assert error < 3e-3, error
    np.testing.assert_allclose(lse[has_keys], reference_lse[has_keys], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(ON_GPU, reason="runs on CPU")
@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the Mosaic GPU interpreter needs jax 0.11")
@pytest.mark.parametrize(
    ("B", "T", "N", "S", "K", "fp8"),
    [(1, 3, 64, 150, 200, False), (2, 2, 16, 100, 70, False), (2, 1, 16, 100, 70, True)],
)
def test_the_pipeline_in_the_interpreter_equals_xla(B, T, N, S, K, fp8):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    inputs, options = make_inputs(B, T, N, S, K), {}
    if fp8:
        inputs, options = quantized(inputs)
    inputs, options = with_garbage(inputs, options)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        out, lse = mosaic_gpu.forward(*inputs, **options, scale=SCALE, interpret=True)
    check(out, lse, inputs, **options)


def kernel(T, n_splits, pairs, fp8=False):
    """The function and shapes of V3.2's attention, T queries over 32K keys, for ``sm90a``."""
    S, N, K = 32768, 128, 2048
    shape = lambda *s, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(s, dtype)  # noqa: E731
    function = build(Plan(1, T, N, K, n_splits, pairs, SCALE, fp8, n_multiprocessors=132))
    inputs = Inputs(
        q_latent=shape(T, N, 512),
        q_rope=shape(T, N, 64),
        indices=shape(T, K, dtype=jnp.int32),
        latent=shape(1, S, 512, dtype=jnp.float8_e4m3fn if fp8 else jnp.bfloat16),
        latent_scale=shape(1, S, 4, dtype=jnp.float32) if fp8 else None,
        k_rope=shape(1, S, 64),
    )
    return function, [inputs]


prefill_kernel = functools.partial(kernel, 4096, 1, 16)
decode_kernel = functools.partial(kernel, 1, 16, 1)
fp8_kernel = functools.partial(kernel, 256, 1, 16, fp8=True)
fp8_split_kernel = functools.partial(kernel, 1, 16, 1, fp8=True)


KERNELS = ["prefill_kernel", "decode_kernel", "fp8_kernel", "fp8_split_kernel"]


@pytest.mark.parametrize("name", KERNELS)
def test_it_compiles_for_hopper_with_at_most_two_spilled_words(name):
    (used,) = sm90a.resources(f"{__name__}:{name}")
    # jax 0.12 spills two words of fp8_split_kernel, jax 0.11 none
    assert used["registers"] * 3 * 128 <= sm90a.REGISTER_FILE and used["spills"] <= 8, used


@pytest.mark.parametrize("name", KERNELS)
def test_no_asynchronous_copy_has_an_address_that_hopper_refuses(name):
    copies = sm90a.instructions(f"{__name__}:{name}", "LDGSTS")
    assert copies
    # a shared address of two registers, one of them uniform, beside a descriptor: illegal instruction
    refused = [line for line in copies if re.search(r"\[R\d+\+UR\d+[^]]*\], desc", line)]
    assert not refused, refused


@pytest.mark.parametrize("items", [1, 2, 7, 64, 128, 131, 132, 133, 256, 8192])
@pytest.mark.parametrize("pairs", [1, 2, 15, 16, 17])
def test_splits_cover_the_keys_and_only_small_batches_are_split(items, pairs):
    n_splits, per_split = split_keys(items, pairs, 132)
    assert (n_splits - 1) * per_split < pairs <= n_splits * per_split
    assert n_splits == 1 or items * n_splits <= 2 * 132
    if items == 1:
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
        (40, 1, 128, 2500, 2048),
    ],
)
@pytest.mark.parametrize("fp8", [False, True])
def test_it_equals_xla_in_float32(B, T, N, S, K, fp8):
    inputs, options = make_inputs(B, T, N, S, K), {}
    if fp8:
        inputs, options = quantized(inputs)
    run = jax.jit(functools.partial(pk.sparse_mla, scale=SCALE, implementation="mosaic_gpu"))
    out, lse = run(*inputs, **options)
    check(out, lse, inputs, **options)
    for _ in range(20):  # bit for bit
        again = run(*inputs, **options)
        assert (again[0] == out).all() and (again[1] == lse).all()


@on_gpu
@pytest.mark.gpu
def test_every_e4m3_value_is_converted_exactly():
    q_latent, q_rope, _, k_rope, _ = make_inputs(1, 1, 64, 256, 1)
    values = np.arange(256, dtype=np.uint8)
    values[np.isnan(values.view(ml_dtypes.float8_e4m3fn).astype(np.float32))] = 0
    rows = np.stack([np.roll(np.tile(values, 2), s) for s in range(256)]).view(ml_dtypes.float8_e4m3fn)
    # ldexp: XLA's exp2 is exp(x log 2), whose results need not be powers of two.
    scales = np.ldexp(np.float32(1), np.random.default_rng(0).integers(-20, 20, (1, 256, 4)))
    indices = jnp.arange(256, dtype=jnp.int32)[:, None, None]  # one key per query: out is its latent
    queries = [jnp.broadcast_to(q, (1, 256, *q.shape[2:])) for q in (q_latent * 0, q_rope * 0)]
    out, _ = pk.sparse_mla(
        *queries, jnp.asarray(rows)[None], k_rope, indices[:, 0][None],
        latent_scale=jnp.asarray(scales), scale=SCALE, implementation="mosaic_gpu",
    )  # fmt: skip
    expected = rows.astype(np.float32) * np.repeat(scales[0], 128, axis=-1)
    np.testing.assert_array_equal(
        np.asarray(out, np.float32), np.broadcast_to(expected[:, None], out[0].shape)[None]
    )


@on_gpu
@pytest.mark.gpu
def test_missing_keys_of_an_fp8_cache_are_not_read():
    inputs, options = quantized(make_inputs(2, 3, 64, 200, 300))
    out, lse = pk.sparse_mla(*inputs, **options, scale=SCALE, implementation="mosaic_gpu")
    used = np.zeros((2, 200), bool)
    for b in range(2):
        used[b, np.unique(np.asarray(inputs[4][b])[np.asarray(inputs[4][b]) >= 0])] = True
    latent = np.asarray(inputs[2]).copy()
    latent[~used] = np.nan
    poisoned = (*inputs[:2], jnp.asarray(latent), *inputs[3:])
    again = pk.sparse_mla(*poisoned, **options, scale=SCALE, implementation="mosaic_gpu")
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
def test_other_devices_are_refused_with_a_reason():
    inputs = make_inputs(1, 1, 64, 10, 5)
    with pytest.raises(NotImplementedError, match="need jax 0.11|run on Hopper GPUs"):
        pk.sparse_mla(*inputs, scale=SCALE, implementation="mosaic_gpu")


def test_an_fp8_cache_is_read_as_its_dequantised_latents_and_has_no_gradient():
    inputs, options = quantized(make_inputs(2, 3, 8, 60, 40))
    run = functools.partial(pk.sparse_mla, scale=SCALE, implementation="xla")
    check(*run(*inputs, **options), inputs, **options)
    with pytest.raises(NotImplementedError, match="no gradient over an FP8 cache"):
        jax.grad(lambda q: run(q, *inputs[1:], **options)[0].astype(jnp.float32).sum())(inputs[0])
    with pytest.raises(ValueError, match=r"must be float8_e4m3fn and float32, got \['bfloat16', 'float32'\]"):
        run(*inputs[:2], inputs[2].astype(jnp.bfloat16), *inputs[3:], **options)
    with pytest.raises(ValueError, match=r"latent_scale must have shape \(2, 60\) and a divisor of C=512"):
        run(*inputs, latent_scale=options["latent_scale"][:, :59])


def test_other_widths_and_types_are_refused():
    inputs = make_inputs(1, 1, 64, 10, 5)
    run = functools.partial(pk.sparse_mla, scale=SCALE, implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match=r"must be \(512, 64\), got \(256, 64\)"):
        run(inputs[0][..., :256], inputs[1], inputs[2][..., :256], *inputs[3:])
    with pytest.raises(NotImplementedError, match="multiplies bfloat16, got float32"):
        run(*(x.astype(jnp.float32) for x in inputs[:4]), inputs[4])
    inputs, options = quantized(inputs)
    with pytest.raises(NotImplementedError, match="one scale per 128 values, got 2 for 512"):
        run(*inputs, latent_scale=options["latent_scale"][..., :2])
