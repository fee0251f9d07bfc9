"""What all kinds of checkpoint have in common: released names, and rows of tensors on demand."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from dsa_jax.checkpoint.names import (
    MTP_PROJECTION,
    SCALE_SUFFIX,
    TensorRow,
    layer_prefix,
    scale_shape,
    tensor_table,
)
from dsa_jax.checkpoint.safetensors_file import TensorEntry
from dsa_jax.config import ModelConfig

FLOATS = ("BF16", "F32", "F16")
FP8 = "F8_E4M3"
SCALES = (*FLOATS, "F8_E8M0")
"""Stored dtypes of block scales; all are read as float32."""
_NAMES_IN_A_MESSAGE = 8

logger = logging.getLogger(__name__)


@runtime_checkable
class Tensors(Protocol):
    """A checkpoint, whatever its layout, as released tensors in their released [out, in] orientation.

    entries: name -> dtype and shape, block scales under the name + SCALE_SUFFIX; faults: kind of fault found
    on opening -> what has it; unreadable: names whose fault is already listed, so that they are not reported missing
    again; bytes_read: what was read from disk so far.
    """

    @property
    def path(self) -> Path: ...
    @property
    def entries(self) -> Mapping[str, TensorEntry]: ...
    @property
    def faults(self) -> dict[str, list[str]]: ...
    @property
    def unreadable(self) -> set[str]: ...
    @property
    def bytes_read(self) -> int: ...

    def read_rows(self, name: str, start: int, stop: int, columns: slice = slice(None)) -> np.ndarray:
        """Rows start..stop of the first axis, of a matrix only these columns, in the stored dtype."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Carried:
    """What a conversion carries along besides the tensors.

    hf_config: the parsed config.json the weights came with, None when there was none; files: tokenizer files
    and the like; stored: released name -> dtype in the checkpoint first converted.
    """

    hf_config: dict[str, Any] | None = None
    files: tuple[Path, ...] = ()
    stored: Mapping[str, str] = dataclasses.field(default_factory=dict)


def find_faults(tensors: Tensors, config: ModelConfig, *, read_scales: bool) -> dict[str, list[str]]:
    """Everything that prevents these tensors from filling exactly the leaves of config, by kind of fault.

    read_scales also reads the block scales and finds those that are NaN, infinite or negative.
    """
    table = tensor_table(config)
    faults: dict[str, list[str]] = {kind: list(names) for kind, names in tensors.faults.items()}
    known = set(table)
    for name, row in table.items():
        if len(row.shape) == 2:
            known.add(name + SCALE_SUFFIX)
        if fault := _fault_of(tensors, name, row, read_scales):
            faults.setdefault(fault[0], []).append(fault[1])
    unknown = [name for name in tensors.entries if name not in known]
    prefix = layer_prefix(config.n_layers)
    if not config.n_mtp_layers and prefix + MTP_PROJECTION in tensors.entries:
        skipped = sum(name.startswith(prefix) for name in unknown)
        logger.info("%s: %d tensors of the MTP layer are left out", tensors.path, skipped)
        unknown = [name for name in unknown if not name.startswith(prefix)]
    if unknown:
        faults["tensors unknown to this config"] = unknown
    return faults


def check(tensors: Tensors, config: ModelConfig, *, read_scales: bool = True) -> None:
    """Raises one ValueError that lists every fault of `find_faults`."""
    if faults := find_faults(tensors, config, read_scales=read_scales):
        lines = "".join(f"\n  {describe_fault(kind, names)}" for kind, names in faults.items())
        raise ValueError(f"{tensors.path} does not hold the model of this config:{lines}")


def describe_fault(kind: str, names: list[str]) -> str:
    """ "2 tensors missing: a, b"; a long list is cut and counted."""
    shown = ", ".join(names[:_NAMES_IN_A_MESSAGE])
    more = len(names) - _NAMES_IN_A_MESSAGE
    return f"{len(names)} {kind}: {shown}" + (f" and {more} more" if more > 0 else "")


def _fault_of(tensors: Tensors, name: str, row: TensorRow, read_scales: bool) -> tuple[str, str] | None:
    scale_name = name + SCALE_SUFFIX
    entry, scale = tensors.entries.get(name), tensors.entries.get(scale_name)
    if entry is None:
        if row.duplicate or name in tensors.unreadable:
            return None
        return "tensors missing, so their leaves are unfilled", name
    if entry.shape != row.shape:
        return "tensors of a wrong shape", f"{name} {list(entry.shape)}, expected {list(row.shape)}"
    if entry.dtype == FP8 and len(row.shape) == 2:
        if scale is not None:
            return _fault_of_scale(tensors, scale_name, scale, row, read_scales)
        if scale_name not in tensors.unreadable:
            return "FP8 tensors without block scales", f"{name} needs {scale_name}"
    elif entry.dtype not in FLOATS:
        return f"tensors of a dtype other than {', '.join(FLOATS)}, {FP8}", f"{name} {entry.dtype}"
    elif scale is not None:
        return "block scales of a tensor that is not FP8", f"{scale_name} ({name} is {entry.dtype})"
    return None


def _fault_of_scale(
    tensors: Tensors, name: str, scale: TensorEntry, row: TensorRow, read: bool
) -> tuple[str, str] | None:
    if scale.shape != scale_shape(row.shape):
        expected = list(scale_shape(row.shape))
        return "block scales of a wrong shape", f"{name} {list(scale.shape)}, expected {expected}"
    if scale.dtype not in SCALES:
        return "block scales of an unknown dtype", f"{name} {scale.dtype}"
    if read:
        values = tensors.read_rows(name, 0, scale.shape[0]).astype(np.float32)
        if not (np.isfinite(values) & (values >= 0)).all():
            return "block scales that are NaN, infinite or negative", name
    return None
