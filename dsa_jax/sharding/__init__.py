"""How the model is spread over devices: the mesh, what each array is split over, and the way into a kernel.

Nothing here is needed on one device. ``with jax.set_mesh(make_mesh(...))`` around the jitted calls turns it on:
``constrain`` then says how an activation lies, and ``shard_map`` runs a function on each device's part of its
arguments. Results are those of one device, but for the order of sums.

    data      rows of the batch; every parameter is split over it too and gathered when it is used (FSDP)
    expert    routed experts; outside of them, more rows of the batch
    context   queries of one row; keys are exchanged as latents (C + R + J values a token), never expanded
    tensor    heads, hidden width of the feed-forward layers, vocabulary; for the indexer, more queries
"""

import functools
import itertools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsa_jax.cache import Cache
from dsa_jax.config import ModelConfig
from dsa_jax.fp8.weight import BLOCK, Fp8Weight

AXES = ("data", "expert", "context", "tensor")  # devices that are neighbours differ in the last one

EXPERT_AXIS = "expert"

# Logical axis -> mesh axes. An array whose size they do not divide is split over as many of them as do, from the left.
RULES = {
    "batch": ("data", "expert"),
    "rows": ("data",),  # of the batch, where all experts' devices see the same ones
    "sequence": ("context",),
    "queries": ("context", "tensor"),  # of the sequence, where the work is the same for all heads
    "heads": ("tensor",),
    "ff": ("tensor",),
    "vocab": ("tensor",),
    "experts": ("expert",),
    "fsdp": ("data", "expert", "context"),
    "fsdp_of_experts": ("data", "context"),
}

# Every parameter; a leading axis of stacked layers is never split.
_FEED_FORWARD = {"w_gate": ("fsdp", "ff"), "w_up": ("fsdp", "ff"), "w_down": ("ff", "fsdp")}
_LAYER = {
    "attn_norm": (None,),
    "attn.wq_a": ("fsdp", None),
    "attn.q_norm": (None,),
    "attn.wq_b": ("fsdp", "heads"),
    "attn.wkv_a": ("fsdp", None),
    "attn.kv_norm": (None,),
    "attn.wkv_b": ("fsdp", "heads"),
    "attn.wo": ("heads", "fsdp"),
    "attn.indexer.wq_b": ("fsdp", None),
    "attn.indexer.wk": ("fsdp", None),
    "attn.indexer.k_norm.scale": (None,),
    "attn.indexer.k_norm.bias": (None,),
    "attn.indexer.weights_proj": ("fsdp", None),
    "ffn_norm": (None,),
    "ffn.gate": ("fsdp", None),
    "ffn.gate_bias": (None,),
    **{f"ffn.{name}": axes for name, axes in _FEED_FORWARD.items()},
    **{f"ffn.shared_experts.{name}": axes for name, axes in _FEED_FORWARD.items()},
    "ffn.experts.w_gate": ("experts", "fsdp_of_experts", "ff"),
    "ffn.experts.w_up": ("experts", "fsdp_of_experts", "ff"),
    "ffn.experts.w_down": ("experts", "ff", "fsdp_of_experts"),
}
_ENDS = {"embed": (None, "fsdp"), "norm": (None,), "head": ("fsdp", "vocab")}
PARAMETERS = {
    **_ENDS,
    **{f"mtp.{name}": axes for name, axes in _ENDS.items()},
    "mtp.embed_norm": (None,),
    "mtp.hidden_norm": (None,),
    "mtp.proj": ("fsdp", None),
    **{f"mtp.layer.{name}": axes for name, axes in _LAYER.items()},
    **{f"dense_layers.{name}": (None, *axes) for name, axes in _LAYER.items()},
    **{f"moe_layers.{name}": (None, *axes) for name, axes in _LAYER.items()},
}

Axes = tuple[str | None, ...]  # one logical axis per dimension; () is for arrays that are not split


# -- meshes


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
    # Neighbours in the mesh are neighbours in the machine; an axis may take a part of one of its dimensions.
    places = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(places, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_mesh(
    config: ModelConfig, mesh: Mesh | AbstractMesh, *, batch: int | None = None, seq_len: int | None = None
) -> None:
    """Refuses a mesh that does not divide the model's heads and experts, or a batch of these sizes.

    Raises:
      ValueError: with the axis, both numbers, and the nearest mesh of as many devices that would work.
    """
    sizes = {axis: mesh.shape[axis] for axis in AXES}
    rules = [
        ("n_heads", config.n_heads, ("tensor",)),
        ("d_expert", config.d_expert, ("tensor",)),
        ("n_routed_experts", config.n_routed_experts, ("expert",)),
        ("the batch", batch, ("data", "expert")),
        ("the sequence length", seq_len, ("context",)),
    ]

    def fits(sizes: dict[str, int]) -> bool:
        return all(n is None or n % math.prod(sizes[axis] for axis in axes) == 0 for _, n, axes in rules)

    for name, number, axes in rules:
        parts = math.prod(sizes[axis] for axis in axes)
        if number is not None and number % parts:
            asked = " x ".join(f"{axis}={sizes[axis]}" for axis in axes)
            asked += f" = {parts}" if len(axes) > 1 else ""
            raise ValueError(
                f"{name} must be a multiple of the mesh's {asked}, got {number}; "
                f"{_nearest(sizes, math.prod(sizes.values()), fits)} would work"
            )


def meshes_of(n_devices: int) -> list[dict[str, int]]:
    """The sizes of every mesh of so many devices."""
    divisors = [d for d in range(1, n_devices + 1) if n_devices % d == 0]
    return [
        {"data": n_devices // math.prod(rest), "expert": rest[0], "context": rest[1], "tensor": rest[2]}
        for rest in itertools.product(divisors, repeat=3)
        if n_devices % math.prod(rest) == 0
    ]


def _nearest(asked: dict[str, int], n_devices: int, fits: Callable[[dict[str, int]], bool]) -> str:
    """The mesh that fits and changes the fewest axes by the smallest factors, of fewer devices if there is no other."""
    for total in range(n_devices, 0, -1):
        if meshes := [mesh for mesh in meshes_of(total) if fits(mesh)]:
            best = min(meshes, key=lambda m: sum(abs(math.log(m[a] / max(asked[a], 1))) for a in AXES))
            return mesh_text(best) + ("" if total == n_devices else f" on {total} of the devices")
    raise AssertionError("one device fits everything")


def mesh_text(sizes: Mapping[str, int]) -> str:
    """ "data=2, expert=4, context=1, tensor=1"."""
    return ", ".join(f"{axis}={sizes[axis]}" for axis in AXES)


# -- arrays that a program is given


def param_shardings(tree: Any, config: ModelConfig, mesh: Mesh) -> Any:
    """A NamedSharding for every leaf of ``tree``: arrays or shapes, e.g. ``jax.eval_shape(model.init, key, tokens)``.

    Parameters and adapters ({"params": ..., "lora": ...}), weights kept in FP8, and whatever carries the path of
    a parameter in its own: optimizer states. Scalars lie everywhere.

    Raises:
      ValueError: a parameter is not in the table, or the mesh does not divide the model (``check_mesh``).
    """
    check_mesh(config, mesh)

    def sharding(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, Fp8Weight) and leaf.ndim == 0:
            return NamedSharding(mesh, P())
        axes = _listed(".".join(_word(key) for key in path), leaf)
        spec = P(*(_split(name, n, mesh) for name, n in zip(axes, _sizes(leaf), strict=True)))
        return jax.tree.map(lambda _: NamedSharding(mesh, spec), leaf)

    return jax.tree.map_with_path(sharding, tree, is_leaf=lambda x: isinstance(x, Fp8Weight))


def batch_sharding(config: ModelConfig, mesh: Mesh, batch: int, seq_len: int) -> NamedSharding:
    """For tokens, targets and segment_ids [B T].

    Raises:
      ValueError: the mesh does not divide the batch or the sequence.
    """
    check_mesh(config, mesh, batch=batch, seq_len=seq_len)
    return NamedSharding(mesh, P(RULES["batch"], RULES["sequence"]))


def cache_shardings(config: ModelConfig, mesh: Mesh, batch: int) -> Cache:
    """For the cache of ``batch`` rows: split over rows only, since every query may read any key of its row.

    Raises:
      ValueError: the mesh does not divide the batch.
    """
    check_mesh(config, mesh, batch=batch)
    stacked, rows = NamedSharding(mesh, P(None, RULES["batch"])), NamedSharding(mesh, P(RULES["batch"]))
    return Cache(latent=stacked, k_rope=stacked, index_k=stacked, segment_ids=rows, length=rows)


def _listed(path: str, leaf: Any) -> Axes:
    """Logical axes of the parameter whose path ends ``path``."""
    found = re.search(r"(?:^|\.)(params|lora)\.(?!.*\b(?:params|lora)\.)(.+)$", path)
    name, adapter = (found[2], found[1] == "lora") if found else (path, False)
    if adapter:
        name, factor = name.rsplit(".", 1)
    axes = PARAMETERS.get(name)
    if axes is None:
        raise ValueError(
            f"parameter {path} {tuple(leaf.shape)} has no row in dsa_jax.sharding.PARAMETERS; add one"
        )
    if adapter:  # of a matrix [X Y]: a is [X rank], b is [rank Y]
        axes = (*axes[:-1], None) if factor == "a" else (*axes[:-2], None, axes[-1])
    if len(axes) != len(leaf.shape):
        raise ValueError(f"parameter {path} must have {len(axes)} axes, {axes}, got {tuple(leaf.shape)}")
    return axes


def _word(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))


def _sizes(leaf: Any) -> tuple[int, ...]:
    """Of each dimension the number of parts that may be told apart: elements, or whole blocks of an FP8 weight."""
    if not isinstance(leaf, Fp8Weight):
        return leaf.shape
    return *leaf.shape[:-2], *(n // BLOCK if n % BLOCK == 0 else 1 for n in leaf.shape[-2:])


def _split(name: str | None, size: int, mesh: Mesh | AbstractMesh) -> tuple[str, ...] | None:
    """The mesh axes for a dimension of this size; None for none."""
    axes = RULES[name] if name else ()
    while axes and size % math.prod(mesh.shape[axis] for axis in axes):
        axes = axes[:-1]
    return axes or None


# -- inside the model


@dataclass(frozen=True)
class PartialSum:
    """A result of ``shard_map`` that is each device's part of a sum over the logical axes ``over``."""

    axes: Axes
    over: tuple[str, ...]


def expert_devices(n_rows: int) -> int:
    """How many devices exchange tokens of a batch of so many rows: they hold other experts, and other rows. Else 1."""
    mesh = _mesh_in_use()
    return mesh.shape[EXPERT_AXIS] if mesh and EXPERT_AXIS in (_split("batch", n_rows, mesh) or ()) else 1


def query_axes(n_queries: int) -> tuple[str, ...]:
    """The mesh axes over which ``shard_map`` splits so many "queries" of a row, in the order of the chunks. Else ()."""
    mesh = _mesh_in_use()
    axes = (_split("queries", n_queries, mesh) or ()) if mesh else ()
    return tuple(axis for axis in axes if mesh and mesh.shape[axis] > 1)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """x, laid out over the mesh in use by these logical axes; x itself if there is none."""
    mesh = _mesh_in_use()
    if mesh is None:
        return x
    return lax.with_sharding_constraint(
        x, P(*(_split(name, n, mesh) for name, n in zip(axes, x.shape, strict=True)))
    )


def gathered(owner: str, parameters: Any) -> Any:
    """A layer's parameters ("attn" or "ffn") as its functions use them: split by head, expert and width, else whole.

    This undoes "fsdp" for as long as the layer runs; gradients go straight back to the layout of the parameters.
    """
    mesh = _mesh_in_use()
    if mesh is None:
        return parameters

    def gather(path: Any, leaf: Any) -> Any:
        name = ".".join((owner, *map(_word, path)))
        return leaf if len(leaf.shape) == 1 else _gathered(leaf, _LAYER[name], mesh)

    return jax.tree.map_with_path(gather, parameters, is_leaf=lambda x: isinstance(x, Fp8Weight))


def as_stored(owner: str, parameters: Any) -> Any:
    """Parameters of a layer's part ("attn.indexer"), or their gradients, laid out as the parameters are at rest."""

    def lay_out(path: Any, leaf: Any) -> Any:
        return constrain(leaf, *_LAYER[".".join((owner, *map(_word, path)))])

    return jax.tree.map_with_path(lay_out, parameters)


def gathered_matrix(name: str, weight: Any) -> Any:
    """The same for a parameter outside the layers."""
    mesh = _mesh_in_use()
    return weight if mesh is None else _gathered(weight, PARAMETERS[name], mesh)


def _gathered(leaf: Any, axes: Axes, mesh: AbstractMesh) -> Any:
    stored = [_split(name, n, mesh) for name, n in zip(axes, _sizes(leaf), strict=True)]
    used = [
        None if name in ("fsdp", "fsdp_of_experts") else part for name, part in zip(axes, stored, strict=True)
    ]
    return jax.tree.map(lambda x: _move(x, P(*used), P(*stored)), leaf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _move(x: jax.Array, there: P, back: P) -> jax.Array:
    return lax.with_sharding_constraint(x, there)


_move.defvjp(
    lambda x, there, back: (_move(x, there, back), None),
    lambda there, back, _, d: (lax.with_sharding_constraint(d, back),),
)


def lookup(table: jax.Array, tokens: jax.Array, dtype: Any) -> jax.Array:
    """``table[tokens]`` [B T D] in this dtype. Devices exchange tokens, then the columns they hold; never the table."""
    mesh = _mesh_in_use()
    columns = _split("fsdp", table.shape[1], mesh) if mesh else None
    if columns is None:
        return constrain(table[tokens].astype(dtype), "batch", "sequence", None)

    def exchange(table: jax.Array, tokens: jax.Array) -> jax.Array:
        parts = table[lax.all_gather(tokens, columns)].astype(dtype)  # [devices B T D/devices]
        return lax.all_to_all(parts, columns, split_axis=0, concat_axis=3, tiled=True)[0]

    in_axes = ((None, "fsdp"), ("batch", "sequence"))
    return shard_map(exchange, in_axes, ("batch", "sequence", None))(table, tokens)


def shard_map(function: Callable[..., Any], in_axes: Any, out_axes: Any) -> Callable[..., Any]:
    """``function`` of each device's part of the arguments, under the mesh in use; without one, ``function``.

    ``pl.pallas_call`` refuses sharded arrays, and XLA would gather much of what the index arithmetic of the other
    implementations touches. in_axes, out_axes: for every argument and result the logical axes of its dimensions, or
    a ``PartialSum``; one entry may stand for a whole tree of equal arrays. A dimension that is named in no entry
    is whole on every device.
    """

    def call(*arrays: Any) -> Any:
        mesh = _mesh_in_use()
        if mesh is None:
            return function(*arrays)
        sizes: dict[str, int] = {}  # of a logical axis, the greatest common divisor of its appearances

        def note(axes: Axes, tree: Any) -> None:
            for leaf in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Fp8Weight)):
                for name, size in zip(axes, _sizes(leaf), strict=False):
                    if name:
                        sizes[name] = math.gcd(size, sizes.get(name, 0))

        jax.tree.map(note, in_axes, arrays, is_leaf=_is_axes)
        split = {name: _split(name, size, mesh) for name, size in sizes.items()}

        def spec(axes: Axes | PartialSum) -> P:
            names = axes.axes if isinstance(axes, PartialSum) else axes
            return P(*(split[name] if name else None for name in names))

        def summed(axes: Axes | PartialSum, part: Any) -> Any:
            over = axes.over if isinstance(axes, PartialSum) else ()
            mesh_axes = tuple(axis for name in over for axis in split[name] or ())
            return jax.tree.map(lambda x: _sum(x, mesh_axes), part) if mesh_axes else part

        def body(*arrays: Any) -> Any:
            return jax.tree.map(summed, out_axes, function(*arrays), is_leaf=_is_axes)

        specs = [jax.tree.map(spec, axes, is_leaf=_is_axes) for axes in (in_axes, out_axes)]
        return jax.shard_map(body, in_specs=specs[0], out_specs=specs[1], check_vma=False)(*arrays)

    return call


def _sum(part: jax.Array, mesh_axes: tuple[str, ...]) -> jax.Array:
    """lax.psum whose gradient exchanges nothing: shard_map hands every device its own, divided by their number."""

    @jax.custom_vjp
    def psum(part):
        return lax.psum(part, mesh_axes)

    psum.defvjp(lambda part: (psum(part), None), lambda _, d: (d * lax.axis_size(mesh_axes),))
    return psum(part) if jnp.issubdtype(part.dtype, jnp.inexact) else lax.psum(part, mesh_axes)


def _is_axes(x: Any) -> bool:
    return isinstance(x, PartialSum) or (
        isinstance(x, tuple) and all(n is None or isinstance(n, str) for n in x)
    )


def _mesh_in_use() -> AbstractMesh | None:
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if set(AXES) <= set(mesh.axis_names) else None
