"""The norms against NumPy float64, on numbers so small that eps and its place matter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax.cache import place
from dsa_jax.config import tiny
from dsa_jax.mla import Mla, compress
from dsa_jax.norm import layer_norm, rms_norm
from dsa_jax.rope import rotation

EPS = 1e-6
CONFIG = tiny(
    d_model=32, q_lora_rank=24, kv_lora_rank=16, n_heads=2, index_n_heads=2, index_head_dim=32, dtype="float32",
    qk_rope_head_dim=8, init_std=0.2, norm_eps=0.5, latent_norm_eps=2.0,
)  # fmt: skip


def rms(x, eps):
    x = np.asarray(x, np.float64)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


def inputs(size):
    rng = np.random.default_rng(0)
    x, weight, bias = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 3, 8), (8,), (8,)))
    return size * x, weight, bias


@pytest.mark.parametrize("size", [1e-5, 1e-3, 1.0])
def test_they_equal_the_equations(size):
    x, weight, bias = inputs(size)
    given = jnp.asarray(x), jnp.asarray(weight)
    np.testing.assert_allclose(rms_norm(*given, EPS), rms(x, EPS) * weight, rtol=2e-6, atol=1e-9)
    centred = np.asarray(x, np.float64) - np.asarray(x, np.float64).mean(-1, keepdims=True)
    expected = rms(centred, EPS) * weight + bias
    np.testing.assert_allclose(
        layer_norm(*given, jnp.asarray(bias), EPS), expected, rtol=2e-6, atol=1e-5 * size
    )


def test_bfloat16_is_rounded_once_behind_the_weight():
    x, weight, _ = inputs(1.0)
    x = jnp.asarray(x, jnp.bfloat16)
    once = jnp.asarray(rms(x, EPS) * weight, jnp.float32).astype(jnp.bfloat16)
    twice = jnp.asarray(rms(x, EPS), jnp.float32).astype(jnp.bfloat16) * jnp.asarray(weight, jnp.bfloat16)
    np.testing.assert_array_equal(rms_norm(x, jnp.asarray(weight), EPS), once)
    assert (once != twice).any()


def test_the_latents_have_an_eps_of_their_own():
    parameters = Mla(CONFIG).init(jax.random.key(0))["params"]
    hidden = jax.random.normal(jax.random.key(1), (1, 5, CONFIG.d_model))
    placement, _ = place(jnp.ones((1, 5), jnp.int32), None)
    rope = rotation(placement.positions, CONFIG)
    queries, keys = compress(hidden, rope, placement, parameters, CONFIG)
    wide = {name: np.asarray(hidden, np.float64) @ parameters[name] for name in ("wq_a", "wkv_a")}
    for found, expected in (
        (queries.q_compressed, rms(wide["wq_a"], CONFIG.latent_norm_eps)),
        (keys.latent, rms(wide["wkv_a"][..., : CONFIG.kv_lora_rank], CONFIG.latent_norm_eps)),
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
