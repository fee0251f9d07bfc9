"""A weight that stays in FP8 in memory: float8_e4m3fn values with one float32 scale per 128 x 128 block.

This is the released checkpoint's own format, and takes half the memory of bfloat16. An ``Fp8Weight`` takes the place
of a plain array in the parameter tree and is dequantised inside each matrix product. It has no gradient.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.arithmetic import dequantize_blocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fp8Weight:
    """values [*stack In Out] float8_e4m3fn, scales [*stack ceil(In/128) ceil(Out/128)] float32."""

    # Values must come first: Linen compares the shape of a parameter's first leaf with the declared shape. The type
    # is Any because jax.tree functions put shapes, shardings and None in place of arrays.
    values: Any
    scales: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight itself."""
        return self.values.shape

    def dequantize(self, dtype: jnp.dtype) -> jax.Array:
        """Each value times the scale of its block, in float32, then cast (weight_dequant of inference/kernel.py)."""
        return dequantize_blocks(self.values, self.scales, dtype)


jax.tree_util.register_dataclass(Fp8Weight, data_fields=["values", "scales"], meta_fields=[])


def as_matrix(weight: "jax.Array | Fp8Weight", dtype: jnp.dtype) -> jax.Array:
    """The weight as a plain array of this dtype; an ``Fp8Weight`` is dequantised."""
    return weight.dequantize(dtype) if isinstance(weight, Fp8Weight) else weight.astype(dtype)
