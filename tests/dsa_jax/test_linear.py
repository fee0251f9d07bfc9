"""A weight with an adapter beside it: the product has the whole of a small update, whatever the dtypes."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsa_jax.adapted import AdaptedWeight
from dsa_jax.fp8.blocks import dequantize_blocks, quantize_blocks
from dsa_jax.fp8.weight import Fp8Weight
from dsa_jax.linear import linear
from dsa_jax.mla import absorb_keys, absorb_values
from dsa_jax.moe import _grouped_linear
from pallas_kernels.blocking import map_query_blocks
from tests.train.small import CONFIG

TOKENS, RANK, STEP = 4096, 4, 1e-5  # the step is that of AdamW at a learning rate of 1e-5
GROUPS = np.array([1000, 0, 3000, 96])
N, P, H, C = CONFIG.n_heads, CONFIG.qk_nope_head_dim, CONFIG.v_head_dim, CONFIG.kv_lora_rank


def by_matrix(x, w):
    return x @ w


def by_keys(x, w):
    return np.einsum("BTNP,CNP->BTNC", x, w.reshape(C, N, P + H)[..., :P])


def by_values(x, w):
    return np.einsum("BTNC,CNH->BTNH", x, w.reshape(C, N, P + H)[..., P:])


def by_group(x, w):
    return np.concatenate([rows @ w[e] for e, rows in enumerate(np.split(x, np.cumsum(GROUPS)[:-1]))])


def grouped(x, weight):
    return _grouped_linear(x, weight, jnp.asarray(GROUPS))


# name: (ours, the same in NumPy float64, shape of x, shape of the weight)
PRODUCTS = {
    "linear": (linear, by_matrix, (TOKENS, 64), (64, 96)),
    "absorb_keys": (
        lambda x, w: absorb_keys(x, {"wkv_b": w}, CONFIG), by_keys, (1, TOKENS, N, P), (C, N * (P + H)),
    ),
    "absorb_values": (
        lambda x, w: absorb_values(x, {"wkv_b": w}, CONFIG), by_values, (1, TOKENS, N, C), (C, N * (P + H)),
    ),
    "grouped": (grouped, by_group, (TOKENS, 64), (len(GROUPS), 64, 96)),
}  # fmt: skip


def arrays_of(x_shape, w_shape, dtype, param_dtype):
    """x, W and a new adapter, rounded to their dtypes; and the signs of the first step of B."""
    rng = np.random.default_rng(0)
    *stack, rows, columns = w_shape
    x = rng.standard_normal(x_shape).astype(dtype)
    w = (rng.standard_normal(w_shape) * rows**-0.5).astype(param_dtype)
    a = rng.standard_normal((*stack, rows, RANK)).astype(np.float32)
    b = np.zeros((*stack, RANK, columns), np.float32)
    return x, w, a, b, rng.choice([-1.0, 1.0], b.shape)


def share_seen(product, dtype, param_dtype):
    """How much of one step of B is in the change of the output: the slope of our change over the exact one."""
    ours, exact, x_shape, w_shape = PRODUCTS[product]
    x, w, a, b, signs = arrays_of(x_shape, w_shape, dtype, param_dtype)
    moved = (b + STEP * signs).astype(np.float32)
    run = jax.jit(lambda b: ours(jnp.asarray(x), AdaptedWeight(weight=jnp.asarray(w), a=jnp.asarray(a), b=b)))
    before, after = (np.asarray(run(jnp.asarray(b)), np.float64) for b in (b, moved))
    x64, w64, a64 = (z.astype(np.float64) for z in (x, w, a))
    true = exact(x64, w64 + a64 @ moved.astype(np.float64)) - exact(x64, w64 + a64 @ b.astype(np.float64))
    assert np.abs(after - exact(x64, w64 + a64 @ moved)).max() < (0.05 if dtype != np.float32 else 1e-4)
    return ((after - before) * true).sum() / (true * true).sum()


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("param_dtype", [ml_dtypes.bfloat16, np.float32], ids=["weights bf16", "weights f32"])
def test_the_output_has_the_whole_of_a_small_update(product, param_dtype):
    """W + A B rounded to bfloat16 has a few percent of it. What bfloat16 outputs scatter is noise around 1."""
    assert share_seen(product, np.float32, param_dtype) == pytest.approx(1.0, abs=0.02)
    assert share_seen(product, ml_dtypes.bfloat16, param_dtype) == pytest.approx(1.0, abs=0.15)


def test_a_weight_kept_in_fp8_takes_an_adapter():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((8, 200)).astype(np.float32)
    a, b = (
        rng.standard_normal((200, RANK)).astype(np.float32),
        rng.standard_normal((RANK, 130)).astype(np.float32),
    )
    values, scales = quantize_blocks(rng.standard_normal((200, 130)), scale_fmt="ue8m0")
    weight = Fp8Weight(values=jnp.asarray(values), scales=jnp.asarray(scales))
    out = linear(jnp.asarray(x), AdaptedWeight(weight=weight, a=jnp.asarray(a), b=jnp.asarray(b)))
    expected = x.astype(np.float64) @ (dequantize_blocks(values, scales) + a.astype(np.float64) @ b)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-3)


def test_gradients_reach_both_factors_and_not_what_lies_behind_the_last_group():
    """Rows behind the last group, here NaN, give 0 in each product."""
    sizes, n = jnp.asarray([3, 2]), 5
    rng = np.random.default_rng(2)
    x, w, a, b = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((9, 8), (2, 8, 6), (2, 8, 2), (2, 2, 6))
    )
    inside = (jnp.arange(9) < n)[:, None]

    def loss(a, b):
        out = _grouped_linear(jnp.where(inside, x, jnp.nan), AdaptedWeight(weight=w, a=a, b=b), sizes)
        return (out**2).sum()

    d_a, d_b = jax.grad(loss, argnums=(0, 1))(a, b)
    want_a, want_b = np.zeros(a.shape), np.zeros(b.shape)
    for e, rows in ((0, x[:3]), (1, x[3:5])):
        rows, a_e, b_e = (np.asarray(z, np.float64) for z in (rows, a[e], b[e]))
        d_out = 2 * (rows @ np.asarray(w[e], np.float64) + rows @ a_e @ b_e)
        want_a[e], want_b[e] = rows.T @ d_out @ b_e.T, (rows @ a_e).T @ d_out
    np.testing.assert_allclose(d_a, want_a, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(d_b, want_b, rtol=1e-4, atol=1e-4)


def test_the_gradient_of_a_weight_is_summed_over_many_blocks_in_float32():
    """A sum in bfloat16 stops growing at 256 addends of one size; here there are 512."""
    x = jnp.ones((1, 512, 4), jnp.bfloat16)

    def loss(weight):
        return map_query_blocks(functools.partial(linear, weight=weight), 1, x).astype(jnp.float32).sum()

    gradient = jax.jit(jax.grad(loss))(jnp.ones((4, 3), jnp.float32))
    np.testing.assert_array_equal(gradient, np.full((4, 3), 512.0))
