"""FP8 block quantisation of stored weights: float8_e4m3fn values, one float32 scale per 128 x 128 block.

DeepSeek-V3's technical report, section 3.3, and its inference/kernel.py. The block is always 128: a ragged
last block (576 rows make 5 block rows) has its own scale, so the block size cannot be read off the shapes.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from dsa_jax.fp8.weight import BLOCK

E4M3_MAX = 448.0
SMALLEST_AMAX = 1e-4
"""An all-zero block still gets a scale that can be divided by."""


_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
"""float32 value of every float8_e4m3fn bit pattern: a look-up is four times as fast as astype."""


def dequantize_blocks(
    values: np.ndarray, scales: np.ndarray, *, first_row: int = 0, first_column: int = 0
) -> np.ndarray:
    """[n, k] float8_e4m3fn, [ceil(n/128), ceil(k/128)] scales -> [n, k] float32: value * scale of its block.

    first_row, first_column: where in the whole matrix a part of it lies; scales are then those of the blocks
    the part touches. Raises ValueError when the shapes do not belong together.
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
    # Every pattern is below 256; "clip" only spares the check and the copy that "raise" makes.
    np.take(_VALUES, values.view(np.uint8), out=weights, mode="clip")
    for block_row, row_scales in enumerate(scales.astype(np.float32)):
        top = max(block_row * BLOCK - row_offset, 0)
        bottom = (block_row + 1) * BLOCK - row_offset
        weights[top:bottom] *= np.repeat(row_scales, BLOCK)[column_offset : column_offset + k]
    return weights


def quantize_blocks(weights: np.ndarray, *, scale_fmt: str | None) -> tuple[np.ndarray, np.ndarray]:
    """[n, k] finite floats -> ([n, k] float8_e4m3fn, [ceil(n/128), ceil(k/128)] float32 scales).

    scale = amax of the block / 448, rounded up to a power of two for scale_fmt "ue8m0", as it is for None.
    Raises ValueError on a weight that is not finite.
    """
    weights = np.asarray(weights, np.float32)
    if not np.isfinite(weights).all():
        raise ValueError("weights to quantise must be finite, got NaN or infinity; check the training run")
    n, k = weights.shape
    rows, columns = -(-n // BLOCK), -(-k // BLOCK)
    # Zeros added to a ragged block leave its amax, and so its scale, that of the real values.
    padded = np.zeros((rows * BLOCK, columns * BLOCK), np.float32)
    padded[:n, :k] = weights
    blocks = padded.reshape(rows, BLOCK, columns, BLOCK)
    amax = np.maximum(np.abs(blocks).max(axis=(1, 3)), np.float32(SMALLEST_AMAX))
    scales = amax / np.float32(E4M3_MAX)
    if scale_fmt == "ue8m0":
        scales = _round_up_to_power_of_two(scales)
    # Clipped because amax / (amax / 448) may round above 448, where e4m3fn has only NaN.
    scaled = np.clip(blocks / scales[:, None, :, None], -E4M3_MAX, E4M3_MAX)
    return scaled.reshape(padded.shape)[:n, :k].astype(ml_dtypes.float8_e4m3fn), scales


def _round_up_to_power_of_two(scales: np.ndarray) -> np.ndarray:
    """2^ceil(log2(x)) of positive normal float32 values, on bit patterns: a float log2 may round across."""
    bits = scales.view(np.uint32)
    exponent = (bits >> np.uint32(23)) + ((bits & np.uint32(0x7FFFFF)) != 0)
    return (exponent.astype(np.uint32) << np.uint32(23)).view(np.float32)
