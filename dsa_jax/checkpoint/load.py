"""`load_params`: any checkpoint into the parameter tree, on one device or sharded; each host reads its own part."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from rich.console import Console
from rich.progress import Progress

from dsa_jax.checkpoint.names import SCALE_SUFFIX, TensorRow, scale_shape, tensor_table
from dsa_jax.checkpoint.open_checkpoint import open_tensors
from dsa_jax.checkpoint.orbax_tensors import SCALES, VALUES, OrbaxTensors
from dsa_jax.checkpoint.pieces import Form, Leaf, leaf_forms, numpy_dtype
from dsa_jax.checkpoint.tensors import FP8, Tensors, check
from dsa_jax.config import ModelConfig
from dsa_jax.fp8.blocks import dequantize_blocks
from dsa_jax.fp8.e4m3 import BLOCK
from dsa_jax.fp8.weight import Fp8Weight
from dsa_jax.sharding import check_mesh, param_shardings

ShardingRule = Callable[[Leaf, tuple[int, ...]], Sharding]
Region = tuple[slice, ...]
Bounds = tuple[tuple[int, int], ...]
"""(start, stop) per axis."""
_PROGRESS_FROM_BYTES = 1 << 30

logger = logging.getLogger(__name__)


@dataclasses.dataclass(kw_only=True)
class ReadCount:
    """Filled by load_params: bytes this host read, and bytes of all tensors of the model as stored."""

    read: int = 0
    total: int = 0


def load_params(
    path: str | os.PathLike[str],
    config: ModelConfig,
    mesh: Mesh | None = None,
    *,
    shardings: ShardingRule | Mapping[str, Any] | None = None,
    keep_fp8: bool = False,
    count: ReadCount | None = None,
) -> dict[str, Any]:
    """{"params": tree} of jax arrays from a Hugging Face, DeepSeek or Orbax checkpoint.

    Leaves have the dtype config.param_dtype, but norms, router and indexer weights are float32. Stored FP8 is
    multiplied by its block scales. With keep_fp8, leaves that the checkpoint stores in FP8 become Fp8Weight, which is
    dequantised inside each product and takes half the memory of bfloat16. With n_mtp_layers == 0 a stored MTP layer
    is left out.

    Args:
      mesh: shards every array as `dsa_jax.sharding.param_shardings` does, by the rules in use. None: one device.
      shardings: instead of mesh. A tree {"params": ...} of Shardings; one in place of an Fp8Weight is for the values,
        and the scales are replicated. Or a function (path of the array, shape) -> Sharding; the path is below
        "params", and that of an Fp8Weight's parts ends in "values" or "scales".
      count: filled with the bytes read. Only ranges that this host's devices hold are read.

    Raises:
      ValueError: the mesh has other axes than the sharding rules or does not divide the model; tensors are missing,
        unknown or of a wrong shape (one error lists them all); the folder is an unfinished conversion.
      FileNotFoundError: there is no such folder.
    """
    if mesh is not None and shardings is not None:
        raise ValueError("give mesh or shardings, not both: shardings have a mesh of their own")
    if mesh is not None:
        check_mesh(config, mesh)
    tensors = open_tensors(Path(path), config)
    check(tensors, config)
    leaves = _leaves(tensors, tensor_table(config), config, keep_fp8)
    if mesh is not None:
        shapes = unflatten_dict({path: leaf.shapes for path, leaf in leaves.items()})
        shardings = param_shardings({"params": shapes}, config, mesh)
    rule = _rule(shardings)
    count = count if count is not None else ReadCount()
    count.total = sum(leaf.stored_bytes for leaf in leaves.values())
    arrays: dict[Leaf, Any] = {}
    console = Console(stderr=True)
    hidden = count.total < _PROGRESS_FROM_BYTES or not console.is_terminal
    with Progress(console=console, disable=hidden) as progress:
        task = progress.add_task("loading", total=count.total)
        for leaf_path, leaf in leaves.items():
            arrays[leaf_path] = leaf.load(rule)
            progress.advance(task, leaf.stored_bytes)
    count.read = tensors.bytes_read
    if rule is not None:
        logger.info("host %d read %d of %d bytes", jax.process_index(), count.read, count.total)
    return {"params": unflatten_dict(arrays)}


def _rule(shardings: ShardingRule | Mapping[str, Any] | None) -> ShardingRule | None:
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
    """Reads one leaf of the tree.

    names: released name of each index of the stacked axes; keep: as an Fp8Weight; form: dtype of the array otherwise.
    """

    path: Leaf
    row: TensorRow
    names: Mapping[tuple[int, ...], str]
    tensors: Tensors
    keep: bool
    form: Form

    @property
    def shapes(self) -> Any:
        """What `load` returns, with shapes in place of arrays."""
        shape = self.row.leaf_shape
        if not self.keep:
            return jax.ShapeDtypeStruct(shape, numpy_dtype(self.form))
        return Fp8Weight(
            values=jax.ShapeDtypeStruct(shape, numpy_dtype("fp8")),
            scales=jax.ShapeDtypeStruct(scale_shape(shape), np.dtype(np.float32)),
        )

    @property
    def stored_bytes(self) -> int:
        names = [name + suffix for name in self.names.values() for suffix in ("", SCALE_SUFFIX)]
        return sum(self.tensors.entries[name].size for name in names if name in self.tensors.entries)

    def load(self, rule: ShardingRule | None) -> Any:
        shapes = self.shapes
        if not self.keep:
            return self._array(self.path, shapes.shape, rule, self._read)
        return Fp8Weight(
            values=self._array((*self.path, VALUES), shapes.values.shape, rule, self._read_values),
            scales=self._array((*self.path, SCALES), shapes.scales.shape, rule, self._read_scales),
        )

    def _array(
        self,
        path: Leaf,
        shape: tuple[int, ...],
        rule: ShardingRule | None,
        read: Callable[[Region], np.ndarray],
    ) -> jax.Array:
        if rule is None:
            return jnp.asarray(read(tuple(slice(0, size) for size in shape)))
        sharding = rule(path, shape)
        parts = {_bounds(shape, index) for index in sharding.addressable_devices_indices_map(shape).values()}
        # Parts that tile a box are read as one: narrow columns of the same rows would be read row by row, or again.
        box = tuple((min(b[0] for b in axis), max(b[1] for b in axis)) for axis in zip(*parts, strict=True))
        if sum(map(_n_elements, parts)) == _n_elements(box):
            parts = {box}
        held = {bounds: read(tuple(slice(*b) for b in bounds)) for bounds in parts}

        def part(index: tuple[slice, ...]) -> np.ndarray:
            wanted = _bounds(shape, index)
            bounds = box if box in held else wanted
            return held[bounds][
                tuple(slice(b[0] - a[0], b[1] - a[0]) for a, b in zip(bounds, wanted, strict=True))
            ]

        return jax.make_array_from_callback(shape, sharding, part)

    def _read(self, region: Region) -> np.ndarray:
        dtype = numpy_dtype(self.form)
        if isinstance(self.tensors, OrbaxTensors):
            return self._read_orbax(self.tensors, region, dtype)
        buffer = np.empty([s.stop - s.start for s in region], dtype)
        for target, name, rows, columns in self._parts(region):
            values = self.tensors.read_rows(name, rows.start, rows.stop, columns)
            if self.tensors.entries[name].dtype == FP8:
                scales = self.tensors.read_rows(
                    name + SCALE_SUFFIX, rows.start // BLOCK, -(-rows.stop // BLOCK), _blocks(columns)
                )
                values = dequantize_blocks(values, scales, first_row=rows.start, first_column=columns.start)
            buffer[target] = values.T if self.row.transpose else values
        return buffer

    def _read_orbax(self, tensors: OrbaxTensors, region: Region, dtype: np.dtype) -> np.ndarray:
        """An Orbax checkpoint has leaves in our orientation, so that no more than the region is read."""
        if not tensors.is_fp8(self.path):
            return tensors.reader.read(self.path, region).astype(dtype, copy=False)
        buffer = np.empty([s.stop - s.start for s in region], dtype)
        stack, (rows, columns) = region[:-2], region[-2:]
        for target in np.ndindex(buffer.shape[:-2]):
            index = tuple(slice(s.start + i, s.start + i + 1) for s, i in zip(stack, target, strict=True))
            values = tensors.reader.read((*self.path, VALUES), (*index, rows, columns))
            scales = tensors.reader.read((*self.path, SCALES), (*index, _blocks(rows), _blocks(columns)))
            buffer[target] = dequantize_blocks(
                values.reshape(values.shape[-2:]),
                scales.reshape(scales.shape[-2:]),
                first_row=rows.start,
                first_column=columns.start,
            )
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
        for target, name, rows, columns in self._parts(region):
            values = self.tensors.read_rows(name + suffix, rows.start, rows.stop, columns)
            buffer[target] = values.T if self.row.transpose else values
        return buffer

    def _parts(self, region: Region) -> Any:
        """(index into the buffer, released name, its rows, its columns) of every tensor that overlaps the region."""
        depth = len(self.row.index)
        lead, own = region[:depth], region[depth:]
        for index in itertools.product(*(range(s.start, s.stop) for s in lead)):
            target = tuple(i - s.start for i, s in zip(index, lead, strict=True))
            matrix = own[::-1] if self.row.transpose else own
            rows, columns = matrix[0], matrix[1] if len(matrix) > 1 else slice(None)
            yield target, self.names[index], rows, columns


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


def _bounds(shape: tuple[int, ...], index: tuple[slice, ...] | None) -> Bounds:
    slices = index or (slice(None),) * len(shape)
    return tuple(s.indices(size)[:2] for s, size in zip(slices, shape, strict=True))


def _blocks(elements: slice) -> slice:
    """The blocks that these rows or columns overlap."""
    return slice(elements.start // BLOCK, -(-elements.stop // BLOCK))


def _n_elements(bounds: Bounds) -> int:
    return math.prod(stop - start for start, stop in bounds)
