"""FP8 block quantisation of stored weights, in NumPy: float8_e4m3fn values, one scale per 128 x 128 block.

A ragged last block (576 rows make 5 block rows) has its own scale, so the block size cannot be read off the shapes.
Source: DeepSeek-V3 report, section 3.3, and its inference/kernel.py.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from dsa_jax.fp8.e4m3 import BLOCK, E4M3_MAX, scale_of

_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
"""The float32 value of every float8_e4m3fn bit pattern: a table look-up is four times as fast as astype."""


def dequantize_blocks(
    values: np.ndarray, scales: np.ndarray, *, first_row: int = 0, first_column: int = 0
) -> np.ndarray:
    """[n, k] float8_e4m3fn, [ceil(n/128), ceil(k/128)] scales -> [n, k] float32: value * scale of its block.

    A part of a matrix is dequantised with first_row and first_column, its offset in the whole matrix; ``scales`` are
    then those of the blocks that overlap the part.

    Raises:
      ValueError: the scales do not have the shape that the values need.
    """
    n, k = values.shape
    row_offset, column_offset = first_row % BLOCK, first_column % BLOCK
    expected = (-(-(row_offset + n) // BLOCK), -(-(column_offset + k) // BLOCK))
    if scales.shape != expected:
        raise ValueError(
            f"an FP8 matrix of shape {values.shape} needs scales of shape {expected} (blocks of {BLOCK}), "
            f"got {scales.shape}"
        )
    weights = np.empty((n, k), np.float32)
    # Every bit pattern is a valid index; mode "clip" avoids the check and the copy of the default "raise".
    np.take(_VALUES, values.view(np.uint8), out=weights, mode="clip")
    for block_row, row_scales in enumerate(scales.astype(np.float32)):
        top = max(block_row * BLOCK - row_offset, 0)
        bottom = (block_row + 1) * BLOCK - row_offset
        weights[top:bottom] *= np.repeat(row_scales, BLOCK)[column_offset : column_offset + k]
    return weights


def quantize_blocks(weights: np.ndarray, *, scale_fmt: str | None) -> tuple[np.ndarray, np.ndarray]:
    """[n, k] finite floats -> ([n, k] float8_e4m3fn, [ceil(n/128), ceil(k/128)] float32 scales).

    scale = amax of the block / 448, rounded up to a power of two if scale_fmt is "ue8m0", unrounded if it is None.

    Raises:
      ValueError: a weight is not finite.
    """
    weights = np.asarray(weights, np.float32)
    if not np.isfinite(weights).all():
        raise ValueError("weights to quantise must be finite, got NaN or infinity; check the training run")
    n, k = weights.shape
    rows, columns = -(-n // BLOCK), -(-k // BLOCK)
    # Padding a ragged block with zeros does not change its amax, and so neither its scale.
    padded = np.zeros((rows * BLOCK, columns * BLOCK), np.float32)
    padded[:n, :k] = weights
    blocks = padded.reshape(rows, BLOCK, columns, BLOCK)
    scales = scale_of(np.abs(blocks).max(axis=(1, 3)), ue8m0=scale_fmt == "ue8m0")
    # Clipped because amax / (amax / 448) may round to more than 448, which e4m3fn can only store as NaN.
    scaled = np.clip(blocks / scales[:, None, :, None], -E4M3_MAX, E4M3_MAX)
    return scaled.reshape(padded.shape)[:n, :k].astype(ml_dtypes.float8_e4m3fn), scales
