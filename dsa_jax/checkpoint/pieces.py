"""How released tensors are cut into pieces, and where the pieces go in the leaves of the parameter tree.

A piece is a range of rows of one released tensor, at most PIECE_BYTES in the leaf: the unit of a conversion's memory,
of the Orbax arrays' chunks and of checksums. The cut depends on the shape and the stored form alone, never on the
memory allowed, so that a resumed conversion makes the same pieces.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from dsa_jax.checkpoint.names import SCALE_SUFFIX, TensorRow
from dsa_jax.checkpoint.safetensors_file import DTYPES
from dsa_jax.checkpoint.tensors import FP8, Tensors
from dsa_jax.fp8.blocks import dequantize_blocks, quantize_blocks
from dsa_jax.fp8.e4m3 import BLOCK

PIECE_BYTES = 64 << 20
Form = Literal["fp8", "bfloat16", "float32"]
"""How a leaf is stored: "fp8" as float8_e4m3fn values with block scales, the others as one array."""
_DTYPE_OF_FORM = {"fp8": FP8, "bfloat16": "BF16", "float32": "F32"}
FORM_OF_DTYPE: dict[str, Form] = {FP8: "fp8", "BF16": "bfloat16", "F16": "bfloat16", "F32": "float32"}
"""The form whose pieces a tensor of this safetensors dtype is cut into, by the size of its elements."""
_TILE_ROWS, _TILE_ROW_BYTES = 64, 2048
"""Measured: a third faster than square tiles, seven times as fast as no tiles."""
NOT_FINITE = "holds NaN or infinity"
_ALL_ONES = {
    "float32": (np.uint32, np.uint32(0x7F800000)),
    "bfloat16": (np.uint16, np.uint16(0x7F80)),
    "float16": (np.uint16, np.uint16(0x7C00)),
    "float8_e4m3fn": (np.uint8, np.uint8(0x7F)),
}
"""dtype -> the integer of its size, and the bits that are all 1 in a NaN or an infinity and in nothing else."""
_CHECKED_AT_ONCE = 1 << 18  # values, which fit a cache
Leaf = tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Rows start..stop of the released tensor `name`, which `row` places in our tree."""

    name: str
    row: TensorRow
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the released orientation."""
        return (self.stop - self.start, *self.row.shape[1:])

    @property
    def region(self) -> tuple[slice, ...]:
        """Its region of the leaf (of an FP8 leaf, of its values)."""
        return _region(self.row, self.start, self.stop)

    @property
    def scale_region(self) -> tuple[slice, ...]:
        """The region of its blocks in the scales of an FP8 leaf."""
        return _region(self.row, self.start // BLOCK, -(-self.stop // BLOCK))


def _region(row: TensorRow, start: int, stop: int) -> tuple[slice, ...]:
    rest = (slice(None),) * (len(row.shape) - 1)
    rows = (*rest, slice(start, stop)) if row.transpose else (slice(start, stop), *rest)
    return (*(slice(i, i + 1) for i in row.index), *rows)


def leaf_forms(
    table: Mapping[str, TensorRow], dtypes: Mapping[str, str], dtype: Form | None
) -> dict[Leaf, Form]:
    """Leaf -> its form. dtypes: stored dtype of every tensor of the table.

    dtype None keeps what is stored without loss: a leaf whose tensors are all FP8 stays FP8, one with a
    float32 or float16 tensor becomes float32. "fp8" also quantises; "bfloat16" and "float32" dequantise.
    Norms, router and the indexer's head weights are always float32.
    """
    if dtype is not None and dtype not in get_args(Form):
        raise ValueError(f"dtype must be None or one of {', '.join(get_args(Form))}, got {dtype!r}")
    stored: dict[Leaf, set[str]] = {}
    rows: dict[Leaf, TensorRow] = {}
    for name, row in table.items():
        if not row.duplicate:
            stored.setdefault(row.path, set()).add(dtypes[name])
            rows[row.path] = row
    forms: dict[Leaf, Form] = {}
    for path, row in rows.items():
        if row.float32:
            forms[path] = "float32"
        elif dtype == "fp8":
            forms[path] = "fp8" if row.quantized else "bfloat16"
        elif dtype is not None:
            forms[path] = dtype
        elif stored[path] == {FP8}:
            forms[path] = "fp8"
        else:
            forms[path] = "float32" if stored[path] & {"F32", "F16"} else "bfloat16"
    return forms


def rows_per_piece(row: TensorRow, form: Form, piece_bytes: int | None = None) -> int:
    """Rows of the released tensor in each piece but the last; a multiple of 128 when there are several."""
    size = int(np.prod(row.shape)) * DTYPES[_DTYPE_OF_FORM[form]].itemsize
    count = -(-size // (piece_bytes or PIECE_BYTES))
    if len(row.shape) < 2 or count <= 1:
        return max(row.shape[0], 1)
    return -(-row.shape[0] // (count * BLOCK)) * BLOCK


def cut(name: str, row: TensorRow, form: Form, piece_bytes: int | None = None) -> Iterator[Piece]:
    """The pieces of one tensor, in order of its rows; piece_bytes None: PIECE_BYTES."""
    size = rows_per_piece(row, form, piece_bytes)
    for start in range(0, row.shape[0], size):
        yield Piece(name=name, row=row, start=start, stop=min(start + size, row.shape[0]))


def read_piece(
    tensors: Tensors, piece: Piece, dtype: str, *, scale_fmt: str | None = "ue8m0"
) -> tuple[np.ndarray, np.ndarray | None]:
    """(values, block scales or None) in the released orientation, converted to this safetensors dtype.

    FP8 to FP8 keeps every bit; scale_fmt is that of scales to be made. Raises ValueError for weights that
    cannot be quantised.
    """
    stored = tensors.entries[piece.name].dtype
    values = tensors.read_rows(piece.name, piece.start, piece.stop)
    if stored == FP8:
        first, last = piece.start // BLOCK, -(-piece.stop // BLOCK)
        scales = tensors.read_rows(piece.name + SCALE_SUFFIX, first, last)
        if dtype == FP8:
            return values, scales.astype(np.float32, copy=False)
        values = dequantize_blocks(values, scales)
    elif dtype == FP8:
        try:
            return quantize_blocks(values, scale_fmt=scale_fmt)
        except ValueError as error:
            raise ValueError(f"{piece.name}: {error}") from error
    return values.astype(DTYPES[dtype], copy=False), None


def read_finite_piece(
    tensors: Tensors, piece: Piece, dtype: str, *, scale_fmt: str | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """As `read_piece`, for what is written elsewhere: raises ValueError for a value that is NaN or infinite."""
    values, scales = read_piece(tensors, piece, dtype, scale_fmt=scale_fmt)
    if not all_finite(values):
        raise ValueError(
            f"{piece.name} {NOT_FINITE} (rows {piece.start} .. {piece.stop - 1}): download or export it again; "
            "`dsa-jax verify` lists every such tensor"
        )
    return values, scales


def all_finite(values: np.ndarray) -> bool:
    """Whether there is neither a NaN nor an infinity, from the exponents' bits (float8_e4m3fn has only NaN)."""
    unsigned, mask = _ALL_ONES[str(values.dtype)]
    bits = values.reshape(-1).view(unsigned)
    return not any(
        ((bits[start : start + _CHECKED_AT_ONCE] & mask) == mask).any()
        for start in range(0, bits.size, _CHECKED_AT_ONCE)
    )


def to_leaf(array: np.ndarray, row: TensorRow) -> np.ndarray:
    """Released orientation -> ours, contiguous, with the stacked axes in front."""
    oriented = transpose(array) if row.transpose else np.ascontiguousarray(array)
    return oriented.reshape((1,) * len(row.index) + oriented.shape)


def from_leaf(array: np.ndarray, row: TensorRow) -> np.ndarray:
    """The inverse of `to_leaf`."""
    flat = array.reshape(array.shape[len(row.index) :])
    return transpose(flat) if row.transpose else flat


def transpose(matrix: np.ndarray) -> np.ndarray:
    """A contiguous transpose, tile by tile: row by row, every read of the source would miss the caches."""
    result = np.empty(matrix.shape[::-1], matrix.dtype)
    # Same-sized integers: NumPy copies extension dtypes one element at a time.
    source, target = (np.ascontiguousarray(a).view(f"u{matrix.itemsize}") for a in (matrix, result))
    if matrix.itemsize == 1 and matrix.size and not (matrix.shape[0] % 8 or matrix.shape[1] % 8):
        _transpose_bytes(source, target)
        return result
    height, width = _TILE_ROWS, _TILE_ROW_BYTES // matrix.itemsize
    for i in range(0, matrix.shape[0], height):
        for j in range(0, matrix.shape[1], width):
            target[j : j + width, i : i + height] = source[i : i + height, j : j + width].T
    return result


def _transpose_bytes(source: np.ndarray, target: np.ndarray) -> None:
    """8 x 8 bytes at a time inside 64-bit words: swaps quarters of 1, 2 and 4 bytes, then moves whole words.

    The block exchange of Hacker's Delight, section 7-3, on bytes; twice as fast as copying them one by one.
    """
    words = target.view(np.uint64).reshape(target.shape[0] // 8, 8, -1)
    for i in range(0, source.shape[0], _TILE_ROWS):
        tile = source[i : i + _TILE_ROWS].view(np.uint64)
        tile = tile.reshape(-1, 8, tile.shape[1]).copy()
        for distance, mask in ((1, 0x00FF00FF00FF00FF), (2, 0x0000FFFF0000FFFF), (4, 0x00000000FFFFFFFF)):
            pairs = tile.reshape(tile.shape[0], 4 // distance, 2, distance, -1)
            shift = np.uint64(8 * distance)
            swapped = ((pairs[:, :, 0] >> shift) ^ pairs[:, :, 1]) & np.uint64(mask)
            pairs[:, :, 1] ^= swapped
            pairs[:, :, 0] ^= swapped << shift
        for k in range(8):
            words[:, k, i // 8 : i // 8 + tile.shape[0]] = tile[:, k].T


def dtype_of_form(form: Form) -> str:
    """The safetensors dtype whose values a leaf of this form holds."""
    return _DTYPE_OF_FORM[form]


def numpy_dtype(form: Form) -> np.dtype:
    """The NumPy dtype of the (values) array of a leaf of this form."""
    return DTYPES[_DTYPE_OF_FORM[form]]


def digest(array: np.ndarray) -> str:
    """SHA-256 of the array's bytes in C order, its first 128 bits in hexadecimal."""
    contiguous = np.ascontiguousarray(array)
    return hashlib.sha256(memoryview(contiguous.reshape(-1).view(np.uint8))).hexdigest()[:32]
