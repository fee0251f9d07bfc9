"""A weight with a low-rank adapter beside it (LoRA, arXiv 2106.09685), which is never added to the weight.

In bfloat16 a weight cannot hold an addend below half its last bit, and the updates of an adapter are smaller than that.
So each product is x W + (x A) B, summed in float32 and rounded once. An ``AdaptedWeight`` takes the place of a plain
array in the parameter tree, as an ``Fp8Weight`` does, which it may hold.
"""

import dataclasses
from typing import Any

import jax

Axes = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptedWeight:
    """weight [*stack In Out] (an array or an Fp8Weight), a [*stack In rank] and b [*stack rank Out] in float32."""

    # The weight must come first: Linen compares the shape of a parameter's first leaf with the declared shape. The
    # type is Any because jax.tree functions put shapes, shardings and None in place of arrays.
    weight: Any
    a: Any
    b: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight itself."""
        return self.weight.shape


jax.tree_util.register_dataclass(AdaptedWeight, data_fields=["weight", "a", "b"], meta_fields=[])


def axes_of_adapter(axes: Axes) -> tuple[Axes, Axes]:
    """The logical axes of a and b beside a weight with these axes; the rank is never sharded."""
    return (*axes[:-1], None), (*axes[:-2], None, axes[-1])
