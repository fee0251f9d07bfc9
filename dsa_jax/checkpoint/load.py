"""`load_params`: any checkpoint into the parameter tree, whole or sharded, each host reading its own part."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from rich.console import Console
from rich.progress import Progress

from dsa_jax.checkpoint.names import SCALE_SUFFIX, TensorRow, tensor_table
from dsa_jax.checkpoint.open_checkpoint import open_tensors
from dsa_jax.checkpoint.orbax_folder import Leaf
from dsa_jax.checkpoint.orbax_tensors import SCALES, VALUES, OrbaxTensors
from dsa_jax.checkpoint.pieces import Form, leaf_forms, numpy_dtype
from dsa_jax.checkpoint.tensors import FP8, Tensors, check
from dsa_jax.config import ModelConfig
from dsa_jax.fp8.blocks import dequantize_blocks
from dsa_jax.fp8.e4m3 import BLOCK
from dsa_jax.fp8.weight import Fp8Weight

ShardingRule = Callable[[Leaf, tuple[int, ...]], Sharding]
Region = tuple[slice, ...]
_PROGRESS_FROM_BYTES = 1 << 30

logger = logging.getLogger(__name__)


@dataclasses.dataclass(kw_only=True)
class ReadCount:
    """Filled by load_params: bytes this host read, and bytes of all tensors of the model as stored."""

    read: int = 0
    total: int = 0


def load_params(
    path: str | Path,
    config: ModelConfig,
    mesh: Mesh | None = None,
    *,
    shardings: ShardingRule | Mapping[str, Any] | None = None,
    keep_fp8: bool = False,
    count: ReadCount | None = None,
) -> dict[str, Any]:
    """{"params": tree} of jax arrays from a Hugging Face, DeepSeek or Orbax checkpoint.

    Leaves are config.param_dtype, norms, router and indexer weights float32; stored FP8 is multiplied by its
    block scales. With keep_fp8 the leaves the checkpoint stores in FP8 become Fp8Weight, dequantised inside
    each product: half the memory of bfloat16. With n_mtp_layers == 0 a stored MTP layer is left out.

    mesh: shard every array over all its devices, along the largest axis they divide. shardings instead of
    mesh: a function (path of the array, shape) -> Sharding, or a tree like {"params": ...} of Shardings; the
    path is below "params", that of an Fp8Weight's parts ends in "values" or "scales", and in a tree one
    Sharding in its place is for the values, with the scales on every device. Only the ranges that this
    host's devices hold are read; `count` tells how many bytes that were.

    Raises one ValueError that lists everything missing, unknown or of a wrong shape, and one for a folder
    whose conversion is not finished.
    """
    if mesh is not None and shardings is not None:
        raise ValueError("give mesh or shardings, not both: shardings say their mesh themselves")
    tensors = open_tensors(Path(path), config)
    check(tensors, config)
    table = tensor_table(config)
    leaves = _leaves(tensors, table, config, keep_fp8)
    rule = _rule(mesh, shardings)
    count = count if count is not None else ReadCount()
    count.total = sum(leaf.stored_bytes for leaf in leaves.values())
    tree: dict[str, Any] = {}
    console = Console(stderr=True)
    hidden = count.total < _PROGRESS_FROM_BYTES or not console.is_terminal
    with Progress(console=console, disable=hidden) as progress:
        task = progress.add_task("loading", total=count.total)
        for path_, leaf in leaves.items():
            branch = tree
            for key in path_[:-1]:
                branch = branch.setdefault(key, {})
            branch[path_[-1]] = leaf.load(rule)
            progress.advance(task, leaf.stored_bytes)
    count.read = tensors.bytes_read
    if rule is not None:
        logger.info("host %d read %d of %d bytes", jax.process_index(), count.read, count.total)
    return {"params": tree}


def largest_axis_rule(mesh: Mesh) -> ShardingRule:
    """Shards along the largest axis that the mesh's device count divides; copies what has none."""

    def rule(path: Leaf, shape: tuple[int, ...]) -> Sharding:
        divisible = [axis for axis, size in enumerate(shape) if size and size % mesh.size == 0]
        spec: list[Any] = [None] * len(shape)
        if divisible:
            spec[max(divisible, key=lambda axis: shape[axis])] = mesh.axis_names
        return NamedSharding(mesh, PartitionSpec(*spec))

    return rule


def _rule(mesh: Mesh | None, shardings: ShardingRule | Mapping[str, Any] | None) -> ShardingRule | None:
    if mesh is not None:
        return largest_axis_rule(mesh)
    if shardings is None or not isinstance(shardings, Mapping):
        return shardings
    tree = shardings["params"] if "params" in shardings else shardings

    def rule(path: Leaf, shape: tuple[int, ...]) -> Sharding:
        node: Any = tree
        for i, key in enumerate(path):
            if isinstance(node, Fp8Weight):
                node = getattr(node, key)
            elif isinstance(node, Sharding):
                if path[i:] == (SCALES,) and isinstance(node, NamedSharding):
                    return NamedSharding(node.mesh, PartitionSpec())
                return node
            elif key not in node:
                raise ValueError(f"shardings have no entry for {'/'.join(path)}")
            else:
                node = node[key]
        return node

    return rule


@dataclasses.dataclass(frozen=True, kw_only=True)
class _LeafReader:
    """One leaf of the tree: how it is held, and where its parts are read from."""

    path: Leaf
    row: TensorRow
    names: Mapping[tuple[int, ...], str]
    tensors: Tensors
    keep: bool
    form: Form

    @property
    def stored_bytes(self) -> int:
        names = [name + suffix for name in self.names.values() for suffix in ("", SCALE_SUFFIX)]
        return sum(self.tensors.entries[name].size for name in names if name in self.tensors.entries)

    def load(self, rule: ShardingRule | None) -> Any:
        shape = self.row.leaf_shape
        if not self.keep:
            return self._array(self.path, shape, rule, self._read)
        scales = (*shape[:-2], *(-(-size // BLOCK) for size in shape[-2:]))
        return Fp8Weight(
            values=self._array((*self.path, VALUES), shape, rule, self._read_values),
            scales=self._array((*self.path, SCALES), scales, rule, self._read_scales),
        )

    def _array(
        self,
        path: Leaf,
        shape: tuple[int, ...],
        rule: ShardingRule | None,
        read: Callable[[Region], np.ndarray],
    ) -> jax.Array:
        if rule is None:
            return jnp.asarray(read(_whole(shape, (slice(None),) * len(shape))))
        held: dict[Any, np.ndarray] = {}

        def part(index: tuple[slice, ...]) -> np.ndarray:
            # Devices that hold the same part ask one after the other: it is read once.
            region = _whole(shape, index)
            key = tuple((s.start, s.stop) for s in region)
            if key not in held:
                held[key] = read(region)
            return held[key]

        return jax.make_array_from_callback(shape, rule(path, shape), part)

    def _read(self, region: Region) -> np.ndarray:
        dtype = numpy_dtype(self.form)
        tensors = self.tensors
        if isinstance(tensors, OrbaxTensors) and not tensors.is_fp8(self.path):
            return tensors.reader.read(self.path, region).astype(dtype, copy=False)
        buffer = np.empty([s.stop - s.start for s in region], dtype)
        for place, name, rows, columns in self._parts(region):
            values = tensors.read_rows(name, rows.start, rows.stop, columns)
            if tensors.entries[name].dtype == FP8:
                blocks = slice(columns.start // BLOCK, -(-columns.stop // BLOCK))
                first, last = rows.start // BLOCK, -(-rows.stop // BLOCK)
                scales = tensors.read_rows(name + SCALE_SUFFIX, first, last, blocks)
                values = dequantize_blocks(values, scales, first_row=rows.start, first_column=columns.start)
            buffer[place] = values.T if self.row.transpose else values
        return buffer

    def _read_values(self, region: Region) -> np.ndarray:
        return self._stored(region, VALUES, "")

    def _read_scales(self, region: Region) -> np.ndarray:
        return self._stored(region, SCALES, SCALE_SUFFIX)

    def _stored(self, region: Region, part: str, suffix: str) -> np.ndarray:
        if isinstance(self.tensors, OrbaxTensors):
            return self.tensors.reader.read((*self.path, part), region)
        dtype = np.dtype(np.float32) if suffix else numpy_dtype("fp8")
        buffer = np.empty([s.stop - s.start for s in region], dtype)
        for place, name, rows, columns in self._parts(region):
            values = self.tensors.read_rows(name + suffix, rows.start, rows.stop, columns)
            buffer[place] = values.T if self.row.transpose else values
        return buffer

    def _parts(self, region: Region) -> Any:
        """(place in the buffer, released name, its rows, its columns) of every tensor the region touches."""
        depth = len(self.row.index)
        lead, own = region[:depth], region[depth:]
        for index in itertools.product(*(range(s.start, s.stop) for s in lead)):
            place = tuple(i - s.start for i, s in zip(index, lead, strict=True))
            matrix = own[::-1] if self.row.transpose else own
            rows, columns = matrix[0], matrix[1] if len(matrix) > 1 else slice(None)
            yield place, self.names[index], rows, columns


def _leaves(
    tensors: Tensors, table: Mapping[str, TensorRow], config: ModelConfig, keep_fp8: bool
) -> dict[Leaf, _LeafReader]:
    names: dict[Leaf, dict[tuple[int, ...], str]] = {}
    for name, row in table.items():
        if not row.duplicate:
            names.setdefault(row.path, {})[row.index] = name
    stored = {name: tensors.entries[name].dtype for name, row in table.items() if not row.duplicate}
    forms = leaf_forms(table, stored, config.param_dtype)
    kept = leaf_forms(table, stored, None) if keep_fp8 else {}
    return {
        path: _LeafReader(
            path=path,
            row=table[next(iter(indexed.values()))],
            names=indexed,
            tensors=tensors,
            keep=kept.get(path) == "fp8",
            form=forms[path],
        )
        for path, indexed in names.items()
    }


def _whole(shape: tuple[int, ...], index: tuple[slice, ...]) -> Region:
    return tuple(slice(*s.indices(size)[:2]) for s, size in zip(index, shape, strict=True))
