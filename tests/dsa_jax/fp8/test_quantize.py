"""FP8 activations: scales from the bits, rounding as ml_dtypes rounds, and the Hadamard rotation."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import scipy.linalg

from dsa_jax.fp8.quantize import _round_to_e4m3, fake_quantize, quantize, rotate_hadamard


def reference(x, ue8m0):
    """act_quant in NumPy: one scale per 128 values, at least 1e-4 / 448."""
    blocks = x.reshape(*x.shape[:-1], -1, 128).astype(np.float32)
    scales = np.maximum(np.abs(blocks).max(-1), np.float32(1e-4)) / np.float32(448)
    if ue8m0:
        scales = np.exp2(np.ceil(np.log2(scales.astype(np.float64)))).astype(np.float32)
    values = np.clip(blocks / scales[..., None], -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return values.reshape(x.shape), scales


@pytest.mark.parametrize("ue8m0", [True, False])
def test_quantize_equals_numpy(ue8m0):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((64, 3, 256)) * np.exp(rng.uniform(-20, 20, (64, 3, 1)))).astype(np.float32)
    x[0] = 0.0
    x[1, 0, :128] = 448.0  # an exact power of two as scale
    x[1, 1, 0] = 1e30
    values, scales = quantize(jnp.asarray(x), ue8m0=ue8m0)
    expected_values, expected_scales = reference(x, ue8m0)
    same = np.asarray(values).view(np.uint8) == expected_values.view(np.uint8)
    if ue8m0:
        np.testing.assert_array_equal(scales, expected_scales)
        assert same.all()
    else:  # XLA multiplies by 1 / 448, which differs from dividing in the last bit
        np.testing.assert_allclose(scales, expected_scales, rtol=2e-7)
        assert same.mean() > 0.999


def test_quantising_and_dequantising_in_one_program_still_rounds():
    x = np.random.default_rng(2).standard_normal((32, 256)).astype(np.float32)
    values, scales = reference(x, ue8m0=True)
    expected = values.astype(np.float32).reshape(32, 2, 128) * scales[..., None]
    np.testing.assert_array_equal(jax.jit(fake_quantize)(jnp.asarray(x)), expected.reshape(32, 256))


def test_every_e4m3_value_and_every_midpoint_rounds_as_ml_dtypes_rounds():
    values = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    values = np.sort(values[np.isfinite(values)])
    middles = (values[1:] + values[:-1]) / 2
    beside = [np.nextafter(middles, np.float32(side)) for side in (-1e9, 1e9)]
    x = np.concatenate([values, middles, *beside])
    expected = x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(_round_to_e4m3)(jnp.asarray(x)), expected)


def test_power_of_two_scales_are_exact_in_bfloat16():
    x = np.random.default_rng(1).standard_normal((32, 128)).astype(np.float32)
    exact = fake_quantize(jnp.asarray(x))
    rounded = fake_quantize(jnp.asarray(x)).astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(exact, rounded)
    assert np.abs(exact - x).max() < 2**-4 * np.abs(x).max()
    assert (np.asarray(exact) != x).any()


def test_gradient_passes_through():
    gradient = jax.grad(lambda x: (fake_quantize(x) * jnp.arange(128.0)).sum())(jnp.ones((2, 128)))
    np.testing.assert_array_equal(gradient, np.broadcast_to(np.arange(128.0), (2, 128)))


def test_axis_must_be_whole_blocks():
    with pytest.raises(ValueError, match="multiple of 128, got 100"):
        quantize(jnp.ones((2, 100)))


def test_hadamard_is_sylvesters_and_orthogonal():
    x = np.random.default_rng(2).standard_normal((5, 2, 128)).astype(np.float32)
    rotated = rotate_hadamard(jnp.asarray(x))
    np.testing.assert_allclose(rotated, x @ scipy.linalg.hadamard(128) * 128**-0.5, atol=1e-5)
    np.testing.assert_allclose(rotate_hadamard(rotated), x, atol=1e-5)


def test_hadamard_in_bfloat16_is_rounded_once():
    x = jnp.asarray(np.random.default_rng(3).standard_normal((7, 128)), jnp.bfloat16)
    exact = np.asarray(x, np.float64) @ scipy.linalg.hadamard(128) * 128**-0.5
    np.testing.assert_allclose(np.asarray(rotate_hadamard(x), np.float64), exact, rtol=2**-8, atol=1e-6)
