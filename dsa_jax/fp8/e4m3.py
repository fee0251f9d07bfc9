"""The FP8 format of DeepSeek-V3.2: float8_e4m3fn values that share one float32 scale per block of 128.

An activation has a scale for every 128 values of a row, a stored weight one for every 128 x 128 block. Constants and
scales for both are here; the functions take NumPy arrays (checkpoints) and JAX arrays (activations) alike.

Source: DeepSeek-V3 report, section 3.3, and ``act_quant`` of V3.2's inference/kernel.py.
"""

from typing import Any

import numpy as np

from pallas_kernels.arithmetic import WEIGHT_BLOCK

BLOCK = WEIGHT_BLOCK
E4M3_MAX = 448.0
"""The largest finite value; there is no infinity, and what rounds above it is NaN."""
SMALLEST_AMAX = 1e-4
"""The least amax that a scale is made from, so that a block of zeros has a scale it can be divided by."""


def scale_of(amax: Any, *, ue8m0: bool) -> Any:
    """float32 scales of blocks whose largest magnitudes are ``amax`` (float32): amax / 448.

    ue8m0 rounds each scale up to a power of two, as V3.2 does; V3 does not. In a jitted function XLA may multiply by
    1 / 448 instead, so that an unrounded scale differs in its last bit.
    """
    scales = amax.__array_namespace__().maximum(amax, SMALLEST_AMAX) / E4M3_MAX
    return power_of_two_at_least(scales) if ue8m0 else scales


def power_of_two_at_least(x: Any) -> Any:
    """2 ** ceil(log2 x) of positive normal float32 values, exactly: from the bits, since a logarithm may round."""
    bits = x.view(np.int32)
    exponent = (bits >> 23) + (bits & 0x7FFFFF != 0)
    return (exponent << 23).view(np.float32)
