"""Layouts that the model asks XLA for: of activations, and of parameters while a layer uses them.

Every function returns its argument where no mesh is in use (``mesh_in_use``, which also says what is refused).
"""

import functools
from typing import Any

import jax
from jax import lax
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from dsa_jax.adapted import AdaptedWeight, axes_of_adapter
from dsa_jax.fp8.weight import Fp8Weight
from dsa_jax.sharding.mesh import mesh_in_use
from dsa_jax.sharding.rules import FSDP, LAYER, PARAMETERS, Axes, divisible_sizes, dotted, rules_in_use


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """x, sharded by these logical axes, one per dimension."""
    mesh = mesh_in_use()
    if mesh is None:
        return x
    return lax.with_sharding_constraint(x, rules_in_use().spec(axes, x.shape, mesh))


def gathered(owner: str, parameters: Any) -> Any:
    """A layer's parameters ("attn" or "ffn") as its functions use them: sharded by head, expert and width only.

    The FSDP dimension is gathered while the layer runs; gradients are resharded to the stored layout at once.
    """
    mesh = mesh_in_use()
    if mesh is None:
        return parameters

    def gather(path: Any, leaf: Any) -> Any:
        return leaf if len(leaf.shape) == 1 else _gathered(leaf, LAYER[f"{owner}.{dotted(path)}"], mesh)

    return jax.tree.map_with_path(
        gather, parameters, is_leaf=lambda x: isinstance(x, Fp8Weight | AdaptedWeight)
    )


def gathered_matrix(name: str, weight: Any) -> Any:
    """``gathered`` for a parameter outside the layers, by its path: "head", "mtp.proj"."""
    mesh = mesh_in_use()
    return weight if mesh is None else _gathered(weight, PARAMETERS[name], mesh)


def as_stored(owner: str, parameters: Any) -> Any:
    """Parameters of a part of a layer ("attn.indexer"), or their gradients, in the layout that they are stored in."""

    def stored(path: Any, leaf: Any) -> Any:
        return constrain(leaf, *LAYER[f"{owner}.{dotted(path)}"])

    return jax.tree.map_with_path(stored, parameters)


def _gathered(leaf: Any, axes: Axes, mesh: AbstractMesh) -> Any:
    if isinstance(leaf, AdaptedWeight):
        of_a, of_b = axes_of_adapter(axes)
        return AdaptedWeight(
            weight=_gathered(leaf.weight, axes, mesh),
            a=_gathered(leaf.a, of_a, mesh),
            b=_gathered(leaf.b, of_b, mesh),
        )
    rules, sizes = rules_in_use(), divisible_sizes(leaf)
    stored = rules.spec(axes, sizes, mesh)
    used = rules.spec(tuple(None if name in FSDP else name for name in axes), sizes, mesh)
    return jax.tree.map(lambda x: _reshard(x, used, stored), leaf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _reshard(x: jax.Array, layout: P, of_gradient: P) -> jax.Array:
    return lax.with_sharding_constraint(x, layout)


_reshard.defvjp(
    lambda x, layout, of_gradient: (_reshard(x, layout, of_gradient), None),
    lambda layout, of_gradient, _, d: (lax.with_sharding_constraint(d, of_gradient),),
)
