"""grouped_matmul in tiles, and the TPU's kernel interpreted: both equal a loop over groups, gradients included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels.arithmetic import dequantize_blocks
from pallas_kernels.grouped_matmul import mosaic_tpu, xla

interpreted = functools.partial(mosaic_tpu.grouped_matmul, interpret=True)

SIZES = {
    "one row": [0, 1, 0],
    "all in one group": [0, 0, 300, 0],
    "whole tiles": [128, 256, 0, 128],
    "ragged": [1, 129, 0, 127, 128, 0, 70],
    "more groups than rows": [0] * 20 + [1, 0, 2, 1] + [0] * 20,
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("function", [xla.grouped_matmul, interpreted], ids=["xla", "mosaic_tpu"])
def test_it_equals_a_loop_over_groups(sizes, function):
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((sum(sizes), 24)).astype(np.float32)
    weights = rng.standard_normal((len(sizes), 24, 16)).astype(np.float32)
    d_out = rng.standard_normal((sum(sizes), 16)).astype(np.float32)
    groups = np.repeat(np.arange(len(sizes)), sizes)
    expected = np.einsum("MX,MXY->MY", rows, weights[groups])
    d_weights = np.stack([rows[groups == e].T @ d_out[groups == e] for e in range(len(sizes))])
    inputs = jnp.asarray(rows), jnp.asarray(weights)
    out, pull = jax.vjp(lambda r, w: function(r, w, jnp.asarray(sizes)), *inputs)
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-5)
    d_rows_ours, d_weights_ours = pull(jnp.asarray(d_out))
    np.testing.assert_allclose(
        d_rows_ours, np.einsum("MY,MXY->MX", d_out, weights[groups]), rtol=2e-5, atol=2e-5
    )
    np.testing.assert_allclose(d_weights_ours, d_weights, rtol=2e-5, atol=5e-5)


@pytest.mark.parametrize("function", [pk.grouped_matmul, interpreted], ids=["default", "mosaic_tpu"])
def test_fp8_weights_give_what_their_dequantised_values_give(function):
    """With blocks that the last columns and rows of a matrix only partly fill."""
    rng = np.random.default_rng(1)
    weights = jnp.asarray(rng.standard_normal((3, 200, 130)), jnp.float8_e4m3fn)
    scales = jnp.exp2(jnp.asarray(rng.integers(-4, 4, (3, 2, 2)), jnp.float32))
    rows, sizes = jnp.asarray(rng.standard_normal((50, 200)), jnp.float32), jnp.asarray([20, 0, 30])
    dequantised = dequantize_blocks(weights, scales, jnp.float32)
    halves = slice(None, 128), slice(128, None)
    for i, j in np.ndindex(2, 2):
        block = weights[1, halves[i], halves[j]].astype(jnp.float32) * scales[1, i, j]
        np.testing.assert_array_equal(dequantised[1, halves[i], halves[j]], block)
    out, pull = jax.vjp(lambda r: function(r, weights, sizes, weight_scales=scales), rows)
    expected, pull_expected = jax.vjp(lambda r: xla.grouped_matmul(r, dequantised, sizes), rows)
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(pull(out)[0], pull_expected(out)[0], rtol=2e-5, atol=2e-4)


def test_the_default_on_cpu_is_xla_to_the_last_bit():
    rng = np.random.default_rng(3)
    rows, weights = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((40, 24), (3, 24, 16))
    )
    sizes = jnp.asarray([10, 0, 30])
    both = (
        jax.vjp(functools.partial(pk.grouped_matmul, group_sizes=sizes, implementation=name), rows, weights)
        for name in (None, "xla")
    )
    (out, pull), (expected, pull_expected) = both
    np.testing.assert_array_equal(out, expected)
    jax.tree.map(np.testing.assert_array_equal, pull(out), pull_expected(out))


def test_the_platform_that_a_program_is_lowered_for_chooses():
    of = jax.ShapeDtypeStruct
    arguments = of((256, 128), jnp.bfloat16), of((3, 128, 128), jnp.bfloat16), of((3,), jnp.int32)
    traced = jax.jit(pk.grouped_matmul).trace(*arguments)
    assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" not in traced.lower(lowering_platforms=("cpu",)).as_text()


def test_a_broken_kernel_leaves_xla_for_every_platform(monkeypatch, caplog):
    def moved():
        raise AttributeError("gmm has moved")

    monkeypatch.setattr(mosaic_tpu, "megablox", moved)
    of = jax.ShapeDtypeStruct
    arguments = of((128, 128), jnp.bfloat16), of((2, 128, 128), jnp.bfloat16), of((2,), jnp.int32)
    with caplog.at_level("INFO", "pallas_kernels"):
        lowered = jax.jit(pk.grouped_matmul).trace(*arguments).lower(lowering_platforms=("tpu",))
    assert "tpu_custom_call" not in lowered.as_text()
    (record,) = caplog.records
    assert "'mosaic_tpu' failed with AttributeError: gmm has moved" in record.message
    with pytest.raises(AttributeError, match="gmm has moved"):
        pk.grouped_matmul(
            jnp.zeros((8, 8)), jnp.zeros((1, 8, 8)), jnp.asarray([8]), implementation="mosaic_tpu"
        )


def test_the_kernel_covers_several_tiles_in_every_direction_and_rows_outside_all_groups():
    rng, sizes, groups = np.random.default_rng(2), [100, 0, 450], np.repeat([0, 2], [100, 450])
    rows = rng.standard_normal((600, 640)).astype(np.float32)
    weights = rng.standard_normal((3, 640, 1100)).astype(np.float32)
    d_out = rng.standard_normal((600, 1100)).astype(np.float32)
    assert all(n > tile for n, tile in zip((600, 640, 1100), mosaic_tpu.TILE, strict=True))

    def product(rows, weights):
        out = interpreted(rows, weights, jnp.asarray(sizes))
        return jnp.where(jnp.arange(600)[:, None] < 550, out, 0.0)

    out, pull = jax.vjp(product, jnp.asarray(rows), jnp.asarray(weights))
    d_rows, d_weights = pull(jnp.asarray(d_out))
    expected = np.concatenate([rows[:100] @ weights[0], rows[100:550] @ weights[2]])
    np.testing.assert_allclose(out[:550], expected, rtol=2e-4, atol=2e-4)
    d_expected = np.stack([rows[:550][groups == e].T @ d_out[:550][groups == e] for e in range(3)])
    np.testing.assert_allclose(d_weights, d_expected, rtol=2e-4, atol=2e-4)
    back = np.concatenate([d_out[:100] @ weights[0].T, d_out[100:550] @ weights[2].T])
    np.testing.assert_allclose(d_rows[:550], back, rtol=2e-4, atol=2e-4)
