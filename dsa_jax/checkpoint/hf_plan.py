"""What a Hugging Face folder will hold: the dtype of every tensor and the shard that stores it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from dsa_jax.checkpoint.hf_reader import SINGLE_FILE
from dsa_jax.checkpoint.names import SCALE_SUFFIX, TensorRow, scale_shape, tensor_table
from dsa_jax.checkpoint.pieces import Form
from dsa_jax.checkpoint.safetensors_file import DTYPES
from dsa_jax.checkpoint.tensors import FLOATS, FP8, Tensors
from dsa_jax.config import ModelConfig

DEFAULT_SHARD_BYTES = 5_000_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class HfOptions:
    """How a Hugging Face folder is written. Raises ValueError for options that contradict each other.

    dtype: None keeps FP8 and its scales as stored, and every other tensor in the dtype of the checkpoint that was
    converted first; "bfloat16" and "float32" apply to all but the float32 tensors of the release. quantize: "fp8" is
    the released layout: FP8 with float32 scales, bfloat16 and float32, whatever the source. max_shard_bytes: a new
    shard begins when the next tensor does not fit; a larger tensor gets a shard of its own.
    """

    dtype: Form | None = None
    quantize: str | None = None
    max_shard_bytes: int = DEFAULT_SHARD_BYTES

    def __post_init__(self) -> None:
        if self.dtype not in (None, *get_args(Form)):
            raise ValueError(f"dtype must be None or one of {', '.join(get_args(Form))}, got {self.dtype!r}")
        if self.quantize not in (None, "fp8"):
            raise ValueError(f'quantize must be None or "fp8", got {self.quantize!r}')
        if self.quantize and self.dtype not in (None, "fp8"):
            raise ValueError(f'quantize="fp8" decides the dtypes, so dtype must be None, got {self.dtype!r}')
        if self.max_shard_bytes <= 0:
            raise ValueError(f"max_shard_bytes must be positive, got {self.max_shard_bytes}")

    def stored_dtype(self, row: TensorRow, dtype: str, first: str | None) -> str:
        """The safetensors dtype in which a tensor is written.

        dtype: its dtype in the source; first: its dtype in the checkpoint converted first, if known.
        """
        if self.quantize or self.dtype == "fp8":
            if row.quantized:
                return FP8
            return first if first in ("BF16", "F32") else _RELEASED[row.stored]
        if self.dtype is not None:
            return "F32" if self.dtype == "float32" or row.stored == "F32" else "BF16"
        # A BF16 weight held as float32 goes back to BF16; a dequantised FP8 weight keeps its new dtype.
        return first if first is not None and first != FP8 and dtype != FP8 else dtype

    def stored_scale_dtype(self, dtype: str, first: str | None) -> str:
        """The safetensors dtype of a tensor's block scales; arguments as of `stored_dtype`, first of the scales.

        Scales that are kept have the dtype that they came with; made ones, and powers of two (F8_E8M0), are float32.
        """
        return first if first in FLOATS and dtype == FP8 and self.quantize is None else "F32"


_RELEASED = {"FP8": FP8, "BF16": "BF16", "F32": "F32"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """One released weight to write; an FP8 weight is followed by its scales, in scale_dtype."""

    name: str
    row: TensorRow
    dtype: str
    scale_dtype: str = "F32"

    @property
    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name in the file -> (dtype, shape)."""
        own = {self.name: (self.dtype, self.row.shape)}
        if self.dtype == FP8:
            own[self.name + SCALE_SUFFIX] = (self.scale_dtype, scale_shape(self.row.shape))
        return own

    @property
    def n_bytes(self) -> int:
        """Bytes in the file, scales included."""
        return sum(math.prod(shape) * DTYPES[dtype].itemsize for dtype, shape in self.tensors.values())


Shard = tuple[Output, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HfPlan:
    """The shards, in order."""

    shards: tuple[Shard, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(output.n_bytes for shard in self.shards for output in shard)

    def files(self) -> Iterator[tuple[str, Shard]]:
        """(file name, what it holds) of every shard, in order."""
        for number, shard in enumerate(self.shards, start=1):
            single = len(self.shards) == 1
            yield (
                SINGLE_FILE if single else f"model-{number:05d}-of-{len(self.shards):05d}.safetensors",
                shard,
            )

    def recorded_bytes(self, steps: list[dict[str, Any]]) -> int:
        """Bytes of the shards that an earlier run finished; steps: its journal."""
        sizes = {file_name: sum(output.n_bytes for output in shard) for file_name, shard in self.files()}
        return sum(sizes[step["shard"]] for step in steps)


def plan_hf(tensors: Tensors, config: ModelConfig, first: Mapping[str, str], options: HfOptions) -> HfPlan:
    """Which tensor goes into which shard, and in which dtype; in order of the table of names.

    first: released name -> dtype in the checkpoint that was converted first, where known.
    A copy of the main embedding or head (`TensorRow.duplicate`) that it did not have is left out.
    """
    shards: list[list[Output]] = [[]]
    used = 0
    known = any(first.values())
    for name, row in tensor_table(config).items():
        if name not in tensors.entries or (row.duplicate and known and name not in first):
            continue
        dtype = options.stored_dtype(row, tensors.entries[name].dtype, first.get(name))
        scale = options.stored_scale_dtype(tensors.entries[name].dtype, first.get(name + SCALE_SUFFIX))
        output = Output(name=name, row=row, dtype=dtype, scale_dtype=scale)
        if shards[-1] and used + output.n_bytes > options.max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(output)
        used += output.n_bytes
    return HfPlan(shards=tuple(tuple(shard) for shard in shards))
