"""The grouped product in tiles, and the TPU's kernel interpreted, equal a loop, gradients included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax import grouped
from dsa_jax.fp8.weight import Fp8Weight

SIZES = {
    "one row": [0, 1, 0],
    "an expert gets all": [0, 0, 300, 0],
    "whole tiles": [128, 256, 0, 128],
    "ragged": [1, 129, 0, 127, 128, 0, 70],
    "more experts than rows": [0] * 20 + [1, 0, 2, 1] + [0] * 20,
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(
    "function",
    [grouped.tiled, functools.partial(grouped.megablox, interpret=True)],
    ids=["tiled", "megablox"],
)
def test_groups_equal_a_loop_over_experts(sizes, function):
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


def test_weights_in_fp8_are_dequantised_expert_by_expert():
    rng = np.random.default_rng(1)
    values = jnp.asarray(rng.standard_normal((3, 200, 130)), jnp.float8_e4m3fn)
    weights = Fp8Weight(
        values=values, scales=jnp.exp2(jnp.asarray(rng.integers(-4, 4, (3, 2, 2)), jnp.float32))
    )
    rows, sizes = jnp.asarray(rng.standard_normal((50, 200)), jnp.float32), jnp.asarray([20, 0, 30])
    out, pull = jax.vjp(lambda r: grouped.grouped_matmul(r, weights, sizes), rows)
    expected, pull_expected = jax.vjp(
        lambda r: grouped.tiled(r, weights.dequantize(jnp.dtype(jnp.float32)), sizes), rows
    )
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    np.testing.assert_allclose(pull(out)[0], pull_expected(out)[0], rtol=1e-6)


def test_the_kernel_takes_several_tiles_in_every_direction_and_rows_of_no_group():
    rng, sizes, groups = np.random.default_rng(2), [100, 0, 450], np.repeat([0, 2], [100, 450])
    rows = rng.standard_normal((600, 640)).astype(np.float32)
    weights = rng.standard_normal((3, 640, 1100)).astype(np.float32)
    d_out = rng.standard_normal((600, 1100)).astype(np.float32)
    assert all(n > tile for n, tile in zip((600, 640, 1100), grouped.KERNEL_TILE, strict=True))

    def product(rows, weights):
        out = grouped.megablox(rows, weights, jnp.asarray(sizes), interpret=True)
        return jnp.where(jnp.arange(600)[:, None] < 550, out, 0.0)

    out, pull = jax.vjp(product, jnp.asarray(rows), jnp.asarray(weights))
    d_rows, d_weights = pull(jnp.asarray(d_out))
    expected = np.concatenate([rows[:100] @ weights[0], rows[100:550] @ weights[2]])
    np.testing.assert_allclose(out[:550], expected, rtol=2e-4, atol=2e-4)
    d_expected = np.stack([rows[:550][groups == e].T @ d_out[:550][groups == e] for e in range(3)])
    np.testing.assert_allclose(d_weights, d_expected, rtol=2e-4, atol=2e-4)
    back = np.concatenate([d_out[:100] @ weights[0].T, d_out[100:550] @ weights[2].T])
    np.testing.assert_allclose(d_rows[:550], back, rtol=2e-4, atol=2e-4)
