"""Frequencies and pair layouts, against complex numbers in float64."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax import rope
from dsa_jax.config import deepseek_v32, glm5
from tests.dsa_jax.models import config_of, numbers

POSITIONS = jnp.asarray([[0, 1, 2, 77, 4095, 100_000]])


def turned(x, angles):
    """x [.., R/2] complex, turned by the angles."""
    return x * np.exp(1j * angles)


@pytest.mark.parametrize("config", [deepseek_v32(), glm5()])
def test_rotation_is_a_complex_product_in_either_layout(config):
    x = np.random.default_rng(0).standard_normal((1, 6, 3, config.qk_rope_head_dim)).astype(np.float32)
    freqs = rope.frequencies(config)
    # float32 angles, as the reference has them: at position 100,000 they differ from exact ones by 4e-3
    angles = (np.asarray(POSITIONS)[..., None].astype(np.float32) * freqs)[:, :, None].astype(np.float64)
    rotation = rope.rotation(POSITIONS, config)

    y = np.asarray(rope.rotate_interleaved(jnp.asarray(x), rotation))
    expected = turned(x[..., 0::2] + 1j * x[..., 1::2], angles)
    np.testing.assert_allclose(y[..., 0::2] + 1j * y[..., 1::2], expected, atol=2e-6)

    half = x.shape[-1] // 2
    y = np.asarray(rope.rotate_halves(jnp.asarray(x), rotation))
    expected = turned(x[..., :half] + 1j * x[..., half:], angles)
    np.testing.assert_allclose(y[..., :half] + 1j * y[..., half:], expected, atol=2e-6)


def test_yarn_of_the_released_model_blends_between_pairs_10_and_23():
    config = deepseek_v32()
    plain = rope.frequencies(dataclasses.replace(config, yarn=None))
    ratio = rope.frequencies(config) / plain
    np.testing.assert_allclose(ratio[:11], 1.0, rtol=1e-6)
    np.testing.assert_allclose(ratio[23:], 1 / 40, rtol=1e-6)
    assert (np.diff(ratio[10:24]) < 0).all()
    assert config.softmax_scale == pytest.approx(0.1352338, rel=1e-6)  # 192**-0.5 * (0.1 ln 40 + 1)**2


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        (dict(), 1.0),
        (dict(mscale=0.7, mscale_all_dim=0.7), 1.0),
        (dict(mscale=0.7, mscale_all_dim=1.3), (0.07 * math.log(40) + 1) / (0.13 * math.log(40) + 1)),
        (dict(mscale=0.0, mscale_all_dim=0.0), 0.1 * math.log(40) + 1),
        (dict(mscale=0.7, mscale_all_dim=0.0), 0.1 * math.log(40) + 1),
        (dict(mscale=0.0, mscale_all_dim=0.7), 0.1 * math.log(40) + 1),
        (dict(mscale=0.7, attention_factor=1.25), 1.25),
    ],
)
def test_yarn_scales_cos_and_sin(changes, scale):
    config = deepseek_v32()
    plain = rope.rotation(POSITIONS, config)
    scaled = rope.rotation(
        POSITIONS, dataclasses.replace(config, yarn=dataclasses.replace(config.yarn, **changes))
    )
    for before, after in zip(plain, scaled, strict=True):
        np.testing.assert_array_equal(after, before * np.float32(scale))


def test_frequencies_equal_deepseeks_table():
    table = numbers("tiny_official_float32")["freqs_cis"]  # [64 positions, 16, (cos, sin)]
    cos, sin = rope.rotation(jnp.arange(64)[None], config_of("tiny"))
    np.testing.assert_allclose(np.stack([cos[0], sin[0]], -1), table, atol=1e-6)


def test_the_scores_depend_on_distance_only():
    config = config_of("tiny")
    q, k = np.random.default_rng(1).standard_normal((2, 1, 1, config.qk_rope_head_dim)).astype(np.float32)
    for rotate in (rope.rotate_halves, rope.rotate_interleaved):
        dots = [
            rotate(jnp.asarray(q)[None], rope.rotation(jnp.asarray([[t + 5]]), config)).ravel()
            @ rotate(jnp.asarray(k)[None], rope.rotation(jnp.asarray([[t]]), config)).ravel()
            for t in (0, 10, 50)
        ]
        np.testing.assert_allclose(dots, dots[0], rtol=1e-4)
