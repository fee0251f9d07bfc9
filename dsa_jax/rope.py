"""Rotary position embedding: YaRN frequencies, and the two pair layouts that DeepSeek-V3.2 uses.

MLA rotates neighbouring pairs (x[2j], x[2j+1]); the indexer rotates pairs across the two halves (x[j], x[j+R/2]).
Confusing them is a frequent error in reimplementations, so each function names its layout.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsa_jax.config import ModelConfig


class Rotation(NamedTuple):
    """cos and sin of the angle of each pair, times YaRN's rotation scale, [B T R/2] float32."""

    cos: jax.Array
    sin: jax.Array


def frequencies(config: ModelConfig) -> np.ndarray:
    """Radians per position of the R/2 pairs, [R/2] float32.

    YaRN (arXiv 2309.00071) keeps the frequency of pairs that turn many times within ``original_seq_len``, divides
    that of slow pairs by ``factor``, and interpolates linearly in between. The result depends on the config alone,
    never on the length of the input. The temperatures are applied in ``rotation`` and ``ModelConfig.softmax_scale``.
    """
    dim = config.qk_rope_head_dim
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    plain = (1.0 / np.float32(config.rope_theta) ** exponent).astype(np.float32)
    yarn = config.yarn
    if yarn is None:
        return plain

    def pair_with(rotations: float) -> float:  # within original_seq_len; pairs turn slower as j grows
        return (
            dim
            * math.log(yarn.original_seq_len / (rotations * 2 * math.pi))
            / (2 * math.log(config.rope_theta))
        )

    low = max(math.floor(pair_with(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_with(yarn.beta_slow)), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low if high != low else 0.001), 0, 1)
    keep = (1 - ramp).astype(np.float32)
    return plain / np.float32(yarn.factor) * (1 - keep) + plain * keep


def rotation(positions: Int[Array, "B T"], config: ModelConfig) -> Rotation:
    """cos and sin of position times frequency, float32: bfloat16 cannot tell positions above 256 apart.

    Both are multiplied by ``YarnConfig.rotation_scale``, which is 1 for DeepSeek-V3.2: MLA and the indexer share them.
    """
    angles = positions[..., None].astype(jnp.float32) * frequencies(config)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if config.yarn is None or config.yarn.rotation_scale == 1.0:
        return Rotation(cos, sin)
    return Rotation(cos * config.yarn.rotation_scale, sin * config.yarn.rotation_scale)


def rotate_interleaved(x: Float[Array, "B T *heads R"], rotation: Rotation) -> Float[Array, "B T *heads R"]:
    """Rotates the pairs (x[2j], x[2j+1]) in float32; the output keeps their places."""
    cos, sin = _over_heads(rotation, x.ndim)
    x32 = x.astype(jnp.float32)
    even, odd = x32[..., 0::2], x32[..., 1::2]
    rotated = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)


def rotate_halves(x: Float[Array, "B T *heads R"], rotation: Rotation) -> Float[Array, "B T *heads R"]:
    """Rotates the pairs (x[j], x[j + R/2]) in float32; the output keeps their places."""
    cos, sin = _over_heads(rotation, x.ndim)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _over_heads(rotation: Rotation, ndim: int) -> Rotation:
    cos, sin = rotation
    return rotation if ndim == 3 else Rotation(cos[:, :, None], sin[:, :, None])
