"""Meshes: how they are made, which ones fit a model, and the one in use."""

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from dsa_jax.config import ModelConfig
from dsa_jax.sharding.rules import AXES, ShardingRules, rules_in_use
from dsa_jax.unstable import create_device_mesh


def make_mesh(
    *, data: int | None = None, expert: int = 1, context: int = 1, tensor: int = 1, devices: Any = None
) -> Mesh:
    """A mesh of all devices (or of ``devices``); ``data`` defaults to what the other axes leave over.

    Raises:
      ValueError: the product of the axes is not the number of devices.
    """
    n_devices = len(jax.devices() if devices is None else devices)
    data = max(n_devices // max(expert * context * tensor, 1), 1) if data is None else data
    sizes = {"data": data, "expert": expert, "context": context, "tensor": tensor}
    if min(sizes.values()) < 1 or math.prod(sizes.values()) != n_devices:
        raise ValueError(
            f"the mesh {mesh_text(sizes)} has {math.prod(sizes.values())} devices, but there are {n_devices}; "
            f"{_nearest(sizes, n_devices, lambda _: True)} would work"
        )
    shape = tuple(sizes[axis] for axis in AXES)
    # Neighbours in the mesh are neighbours in the machine's network; a mesh axis may take part of a network dimension.
    ordered = create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(ordered, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_axes(mesh: Mesh | AbstractMesh) -> None:
    """Refuses a mesh without the axes that the sharding rules name. More axes are allowed: nothing uses them.

    Raises:
      ValueError: with the mesh's axes and ours.
    """
    if not set(AXES) <= set(mesh.axis_names):
        raise ValueError(
            f"the mesh must have the axes {', '.join(AXES)}, got {', '.join(map(str, mesh.axis_names))}; "
            "dsa_jax.sharding.make_mesh makes one"
        )


def mesh_in_use() -> AbstractMesh | None:
    """The mesh of ``jax.set_mesh`` or of the surrounding ``shard_map``; None where this code runs on one device.

    That is so if no mesh is set, and inside a ``shard_map`` over all axes of its mesh (or ``jax.pmap``), whatever they
    are called: each device then computes on its own part. A ``shard_map`` over axes beside ours (pipeline stages, for
    one) leaves ours in use; it needs ``check_vma=False``.

    Raises:
      ValueError: the mesh has not our axes; a surrounding ``shard_map`` is over some of ours and not over others; or
        an axis of ours is of the type Explicit, for which the model's operations are not written.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if set(mesh.axis_names) == set(mesh.manual_axes):  # of an empty mesh too
        return None
    check_axes(mesh)
    if manual := [axis for axis in AXES if axis in mesh.manual_axes]:
        raise ValueError(
            f"inside shard_map over {', '.join(manual)} the model cannot be sharded over the other axes of the mesh; "
            "call it outside, or give shard_map all axes"
        )
    if explicit := [axis for axis in AXES if axis in mesh.explicit_axes]:
        raise ValueError(
            f"the mesh axes {', '.join(AXES)} must be of the type Auto, got Explicit for {', '.join(explicit)}; "
            "dsa_jax.sharding.make_mesh makes such a mesh"
        )
    return mesh


def check_mesh(
    config: ModelConfig,
    mesh: Mesh | AbstractMesh,
    *,
    batch: int | None = None,
    seq_len: int | None = None,
    rules: ShardingRules | None = None,
) -> None:
    """Refuses a mesh that does not divide the model's heads and experts, or a batch of these sizes.

    rules: None for those in use.

    Raises:
      ValueError: the mesh has other axes (``check_axes``), or does not divide; then with the mesh axis, both numbers,
        and the nearest mesh of as many devices that does.
    """
    check_axes(mesh)
    rules = rules or rules_in_use()
    sizes = {axis: mesh.shape[axis] for axis in AXES}
    divided = [
        ("n_heads", config.n_heads, rules.heads),
        ("d_expert", config.d_expert, rules.ff),
        ("n_routed_experts", config.n_routed_experts, rules.experts),
        ("the batch", batch, rules.batch),
        ("the sequence length", seq_len, rules.sequence),
    ]

    def fits(sizes: dict[str, int]) -> bool:
        return all(n is None or n % math.prod(sizes[axis] for axis in axes) == 0 for _, n, axes in divided)

    for name, number, axes in divided:
        parts = math.prod(sizes[axis] for axis in axes)
        if number is not None and number % parts:
            asked = " x ".join(f"{axis}={sizes[axis]}" for axis in axes)
            asked += f" = {parts}" if len(axes) > 1 else ""
            raise ValueError(
                f"{name} must be a multiple of the mesh's {asked}, got {number}; "
                f"{_nearest(sizes, math.prod(sizes.values()), fits)} would work"
            )


def meshes_of(n_devices: int) -> list[dict[str, int]]:
    """The axis sizes of every mesh of ``n_devices`` devices."""
    divisors = [d for d in range(1, n_devices + 1) if n_devices % d == 0]
    return [
        {"data": n_devices // math.prod(rest), "expert": rest[0], "context": rest[1], "tensor": rest[2]}
        for rest in itertools.product(divisors, repeat=3)
        if n_devices % math.prod(rest) == 0
    ]


def mesh_text(sizes: Mapping[str, int]) -> str:
    """ "data=2, expert=4, context=1, tensor=1"."""
    return ", ".join(f"{axis}={sizes[axis]}" for axis in AXES)


def _nearest(asked: dict[str, int], n_devices: int, fits: Callable[[dict[str, int]], bool]) -> str:
    """The mesh that fits and changes the fewest axes by the smallest factors; of fewer devices if none of all fits."""
    for total in range(n_devices, 0, -1):
        if meshes := [mesh for mesh in meshes_of(total) if fits(mesh)]:
            best = min(meshes, key=lambda m: sum(abs(math.log(m[a] / max(asked[a], 1))) for a in AXES))
            return mesh_text(best) + ("" if total == n_devices else f" on {total} of the devices")
    raise AssertionError("one device fits everything")
