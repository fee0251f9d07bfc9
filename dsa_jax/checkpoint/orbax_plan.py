"""What an Orbax checkpoint will hold: the form of every leaf, its arrays, and the pieces that fill them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from dsa_jax.checkpoint.names import TensorRow, scale_shape, tensor_table
from dsa_jax.checkpoint.orbax_folder import ArraySpec
from dsa_jax.checkpoint.orbax_tensors import SCALES, VALUES
from dsa_jax.checkpoint.pieces import Form, Leaf, Piece, cut, leaf_forms, numpy_dtype, rows_per_piece
from dsa_jax.checkpoint.tensors import Tensors
from dsa_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class OrbaxPlan:
    """forms: leaf -> how it is stored; specs: array -> shape, dtype and chunk (an FP8 leaf has two arrays)."""

    table: Mapping[str, TensorRow]
    forms: Mapping[Leaf, Form]
    specs: Mapping[Leaf, ArraySpec]

    @property
    def n_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(int(np.prod(spec.shape)) * spec.dtype.itemsize for spec in self.specs.values())

    def pieces(self) -> Iterator[Piece]:
        """All pieces, in order of the table."""
        for name, row in self.table.items():
            if not row.duplicate:
                yield from cut(name, row, self.forms[row.path])

    def piece_bytes(self, piece: Piece) -> int:
        """Bytes of the piece in the arrays, scales included."""
        form = self.forms[piece.row.path]
        size = int(np.prod(piece.shape)) * numpy_dtype(form).itemsize
        if form == "fp8":
            size += 4 * int(np.prod(scale_shape(piece.shape)))
        return size

    def recorded_bytes(self, steps: list[dict[str, Any]]) -> int:
        """Bytes of the pieces that an earlier run finished; steps: its journal."""
        finished = {(name, start) for step in steps for name, start, *_ in step["pieces"]}
        return sum(
            self.piece_bytes(piece) for piece in self.pieces() if (piece.name, piece.start) in finished
        )


def plan_orbax(tensors: Tensors, config: ModelConfig, dtype: Form | None) -> OrbaxPlan:
    """The plan for these tensors; dtype as in `pieces.leaf_forms`."""
    table = tensor_table(config)
    stored = {name: tensors.entries[name].dtype for name, row in table.items() if not row.duplicate}
    forms = leaf_forms(table, stored, dtype)
    specs: dict[Leaf, ArraySpec] = {}
    for row in table.values():
        if not row.duplicate and row.path not in specs and (*row.path, VALUES) not in specs:
            specs |= _array_specs(row, forms[row.path])
    return OrbaxPlan(table=table, forms=forms, specs=specs)


def _array_specs(row: TensorRow, form: Form) -> dict[Leaf, ArraySpec]:
    """The arrays of the row's leaf; a chunk is one piece."""
    rows = rows_per_piece(row, form)
    chunk = _oriented((rows, *row.shape[1:]), row)
    values = ArraySpec(shape=row.leaf_shape, dtype=numpy_dtype(form), chunk=chunk)
    if form != "fp8":
        return {row.path: values}
    scales = ArraySpec(
        shape=row.stack + _oriented(scale_shape(row.shape), row)[len(row.stack) :],
        dtype=np.dtype(np.float32),
        chunk=_oriented(scale_shape((rows, *row.shape[1:])), row),
    )
    return {(*row.path, VALUES): values, (*row.path, SCALES): scales}


def _oriented(shape: tuple[int, ...], row: TensorRow) -> tuple[int, ...]:
    """A released shape as one element of the stacked axes of our leaf."""
    return (1,) * len(row.stack) + (shape[::-1] if row.transpose else shape)
