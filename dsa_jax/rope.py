"""Rotary position embedding: YaRN frequencies and the two pair layouts that DeepSeek-V3.2 mixes.

MLA rotates neighbouring pairs (x[2j], x[2j+1]); the indexer rotates the two halves (x[j], x[j+R/2]).
Confusing them is the most frequent error in reimplementations, so the layout is in the function's name.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsa_jax.config import ModelConfig

Rotation = tuple[jax.Array, jax.Array]  # cos, sin [B T R/2] float32


def frequencies(config: ModelConfig) -> np.ndarray:
    """Radians per position of the R/2 pairs, float32.

    YaRN (arXiv 2309.00071) keeps the pairs that turn often inside ``original_seq_len``, divides by
    ``factor`` those that do not, and blends linearly in between. It depends on the config alone, never on
    the length at hand. mscale is not applied here: it enters the softmax scale.
    """
    dim = config.qk_rope_head_dim
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    plain = (1.0 / np.float32(config.rope_theta) ** exponent).astype(np.float32)
    yarn = config.yarn
    if yarn is None:
        return plain

    def pair_turning(rotations: float) -> float:
        return (
            dim
            * math.log(yarn.original_seq_len / (rotations * 2 * math.pi))
            / (2 * math.log(config.rope_theta))
        )

    low = max(math.floor(pair_turning(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_turning(yarn.beta_slow)), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low if high != low else 0.001), 0, 1)
    keep = (1 - ramp).astype(np.float32)
    return plain / np.float32(yarn.factor) * (1 - keep) + plain * keep


def rotation(positions: Int[Array, "B T"], config: ModelConfig) -> Rotation:
    """cos and sin of position times frequency, float32 (bf16 angles would lose positions past 256)."""
    angles = positions[..., None].astype(jnp.float32) * frequencies(config)
    return jnp.cos(angles), jnp.sin(angles)


def rotate_interleaved(x: Float[Array, "B T *heads R"], rotation: Rotation) -> Float[Array, "B T *heads R"]:
    """Rotates the pairs (x[2j], x[2j+1]), in place, in float32."""
    cos, sin = _over_heads(rotation, x.ndim)
    x32 = x.astype(jnp.float32)
    even, odd = x32[..., 0::2], x32[..., 1::2]
    rotated = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)


def rotate_halves(x: Float[Array, "B T *heads R"], rotation: Rotation) -> Float[Array, "B T *heads R"]:
    """Rotates the pairs (x[j], x[j + R/2]), in place, in float32."""
    cos, sin = _over_heads(rotation, x.ndim)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _over_heads(rotation: Rotation, ndim: int) -> Rotation:
    cos, sin = rotation
    return (cos, sin) if ndim == 3 else (cos[:, :, None], sin[:, :, None])
