"""Functions that run on each device's part of their arguments: ``shard_map``, and what the model needs beside it.

Without a mesh in use (``mesh_in_use``) they are the plain functions of one device.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from dsa_jax.adapted import AdaptedWeight, axes_of_adapter
from dsa_jax.fp8.weight import Fp8Weight
from dsa_jax.sharding.constraints import constrain
from dsa_jax.sharding.mesh import mesh_in_use
from dsa_jax.sharding.rules import EXPERT_AXIS, Axes, divisible_sizes, rules_in_use


@dataclass(frozen=True)
class PartialSum:
    """A result of ``shard_map`` that is each device's part of a sum over the logical axes ``over``."""

    axes: Axes
    over: tuple[str, ...]


def shard_map(function: Callable[..., Any], in_axes: Any, out_axes: Any) -> Callable[..., Any]:
    """``function`` of each device's part of the arguments, under the mesh in use; without one, ``function`` itself.

    Kernels need it, since ``pl.pallas_call`` refuses sharded arrays. The other implementations need it because XLA
    would gather much of what their index arithmetic touches.

    in_axes, out_axes: for every argument and result the logical axes of its dimensions, or a ``PartialSum``. One
    entry may stand for a whole tree of arrays with the same axes. A dimension that no entry names is not sharded.
    """

    def call(*arrays: Any) -> Any:
        mesh, rules = mesh_in_use(), rules_in_use()
        if mesh is None:
            return function(*arrays)
        axes_of_arrays = jax.tree.map(_with_adapters, tuple(in_axes), arrays, is_leaf=_is_axes)
        sizes: dict[str, int] = {}  # per logical axis, the greatest common divisor of its sizes

        def note(axes: Axes, tree: Any) -> None:
            for leaf in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Fp8Weight)):
                for name, size in zip(axes, divisible_sizes(leaf), strict=False):
                    if name:
                        sizes[name] = math.gcd(size, sizes.get(name, 0))

        jax.tree.map(note, axes_of_arrays, arrays, is_leaf=_is_axes)
        split = {name: rules.mesh_axes(name, size, mesh) for name, size in sizes.items()}

        def spec(axes: Axes | PartialSum) -> P:
            names = axes.axes if isinstance(axes, PartialSum) else axes
            return P(*(split[name] if name else None for name in names))

        def summed(axes: Axes | PartialSum, part: Any) -> Any:
            over = axes.over if isinstance(axes, PartialSum) else ()
            mesh_axes = tuple(axis for name in over for axis in split[name] or ())
            return jax.tree.map(lambda x: _sum(x, mesh_axes), part) if mesh_axes else part

        def body(*arrays: Any) -> Any:
            return jax.tree.map(summed, out_axes, function(*arrays), is_leaf=_is_axes)

        specs = [jax.tree.map(spec, axes, is_leaf=_is_axes) for axes in (axes_of_arrays, out_axes)]
        return jax.shard_map(body, in_specs=specs[0], out_specs=specs[1], check_vma=False)(*arrays)

    return call


def lookup(table: jax.Array, tokens: jax.Array, dtype: Any) -> jax.Array:
    """``table[tokens]`` [B T D] in this dtype. Devices exchange tokens, then embedding columns; never the table."""
    mesh = mesh_in_use()
    columns = rules_in_use().mesh_axes("fsdp", table.shape[1], mesh) if mesh else None
    if columns is None:
        return constrain(table[tokens].astype(dtype), "batch", "sequence", None)

    def exchange(table: jax.Array, tokens: jax.Array) -> jax.Array:
        parts = table[lax.all_gather(tokens, columns)].astype(dtype)  # [devices B T D/devices]
        return lax.all_to_all(parts, columns, split_axis=0, concat_axis=3, tiled=True)[0]

    in_axes = ((None, "fsdp"), ("batch", "sequence"))
    return shard_map(exchange, in_axes, ("batch", "sequence", None))(table, tokens)


def expert_devices(n_rows: int) -> int:
    """Among how many devices tokens are dispatched: those along EXPERT_AXIS, if they hold other experts and other rows.

    Otherwise 1. n_rows: of the batch.
    """
    mesh, rules = mesh_in_use(), rules_in_use()
    if mesh is None or EXPERT_AXIS not in rules.experts:
        return 1
    return mesh.shape[EXPERT_AXIS] if EXPERT_AXIS in (rules.mesh_axes("batch", n_rows, mesh) or ()) else 1


def query_axes(n_queries: int) -> tuple[str, ...]:
    """The mesh axes over which ``shard_map`` splits the "queries" of a row, in the order of the chunks; () if none."""
    mesh = mesh_in_use()
    if mesh is None:
        return ()
    return tuple(
        axis for axis in rules_in_use().mesh_axes("queries", n_queries, mesh) or () if mesh.shape[axis] > 1
    )


def _sum(part: jax.Array, mesh_axes: tuple[str, ...]) -> jax.Array:
    """lax.psum with a gradient that needs no communication.

    The transpose of ``shard_map`` divides a replicated result's cotangent by the number of devices that hold it; the
    gradient multiplies by that number again.
    """

    @jax.custom_vjp
    def psum(part):
        return lax.psum(part, mesh_axes)

    psum.defvjp(lambda part: (psum(part), None), lambda _, d: (d * lax.axis_size(mesh_axes),))
    return psum(part) if jnp.issubdtype(part.dtype, jnp.inexact) else lax.psum(part, mesh_axes)


def _with_adapters(axes: Axes, tree: Any) -> Any:
    """``axes``, which stands for the whole tree, with those of the adapters spelt out if the tree has some."""

    def of_leaf(leaf: Any) -> Any:
        if not isinstance(leaf, AdaptedWeight) or not axes:
            return axes
        of_a, of_b = axes_of_adapter(axes)
        return AdaptedWeight(weight=axes, a=of_a, b=of_b)

    is_weight = lambda x: isinstance(x, Fp8Weight | AdaptedWeight)  # noqa: E731
    if not any(isinstance(leaf, AdaptedWeight) for leaf in jax.tree.leaves(tree, is_leaf=is_weight)):
        return axes
    return jax.tree.map(of_leaf, tree, is_leaf=is_weight)


def _is_axes(x: Any) -> bool:
    return isinstance(x, PartialSum) or (
        isinstance(x, tuple) and all(n is None or isinstance(n, str) for n in x)
    )
