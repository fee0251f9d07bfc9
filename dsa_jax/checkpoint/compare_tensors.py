"""Two checkpoints of one model, tensor by tensor: bit for bit, or how far apart."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from dsa_jax.checkpoint.names import TensorRow, tensor_table
from dsa_jax.checkpoint.open_checkpoint import load_config, open_tensors
from dsa_jax.checkpoint.pieces import cut, read_piece
from dsa_jax.checkpoint.tensors import Tensors, check
from dsa_jax.config import ModelConfig

Verdict = Literal["identical", "equal", "different"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorComparison:
    """One tensor. identical: same type and bits, scales included; equal: same values after dequantisation.

    max_difference: largest absolute difference of the dequantised float32 values; NaN if only one side is NaN.
    """

    name: str
    layer: int | None
    dtypes: tuple[str, str]
    verdict: Verdict
    max_difference: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorReport:
    """The comparison of two checkpoints; layers None: all of them and the tensors outside of layers."""

    ours: Path
    reference: Path
    layers: tuple[int, ...] | None
    rows: tuple[TensorComparison, ...]
    bytes_read: int

    @property
    def passed(self) -> bool:
        """Whether no tensor has a different value."""
        return all(row.verdict != "different" for row in self.rows)

    def count(self, verdict: Verdict) -> int:
        """How many tensors have this verdict."""
        return sum(row.verdict == verdict for row in self.rows)

    def to_json(self) -> str:
        """Everything; a difference that is not finite is written as text."""
        content: dict[str, Any] = dataclasses.asdict(self) | {"passed": self.passed}
        content |= {"ours": str(self.ours), "reference": str(self.reference)}
        for row in content["rows"]:
            if not np.isfinite(row["max_difference"]):
                row["max_difference"] = str(row["max_difference"])
        return json.dumps(content, indent=1, allow_nan=False)

    def to_markdown(self) -> str:
        """A table per layer, and every tensor that differs."""
        lines = [
            f"# {self.ours} against {self.reference}",
            "",
            f"{len(self.rows)} tensors: {self.count('identical')} with the same bits, {self.count('equal')} with "
            f"the same values in another type, {self.count('different')} different. "
            f"{self.bytes_read:,} bytes read.",
            "",
            "| layer | tensors | same bits | same values | different | largest difference |",
            "|---|---|---|---|---|---|",
        ]
        for layer in sorted(
            {row.layer for row in self.rows}, key=lambda layer: -1 if layer is None else layer
        ):
            rows = [row for row in self.rows if row.layer == layer]
            counts = [sum(row.verdict == verdict for row in rows) for verdict in get_args(Verdict)]
            largest = np.max([row.max_difference for row in rows])
            name = "outside layers" if layer is None else layer
            lines.append(f"| {name} | {len(rows)} | {' | '.join(map(str, counts))} | {largest:.3g} |")
        different = [row for row in self.rows if row.verdict == "different"]
        if different:
            lines += ["", "| different tensor | types | largest difference |", "|---|---|---|"]
            lines += [
                f"| {r.name} | {r.dtypes[0]}, {r.dtypes[1]} | {r.max_difference:.3g} |" for r in different
            ]
        return "\n".join(lines) + "\n"


def compare_tensors(
    ours: str | os.PathLike[str],
    reference: str | os.PathLike[str],
    *,
    layers: tuple[int, ...] | None = None,
    ignore: Iterable[str] = (),
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> TensorReport:
    """Compares two checkpoints of any kind, piece by piece, in the released orientation.

    layers: only these (the MTP layer is n_layers), to compare a large model part by part. ignore: as in
    `load_config`. on_progress(bytes of ours done, bytes in all). Raises ValueError when the checkpoints are of
    different architectures, when one is incomplete or damaged, and for a layer that does not exist.
    """
    ours, reference = Path(ours), Path(reference)
    ignore = tuple(ignore)
    config, other = load_config(ours, ignore=ignore), load_config(reference, ignore=ignore)
    _refuse_other_model(config, other)
    last = config.n_layers + config.n_mtp_layers
    if wrong := [layer for layer in layers or () if not 0 <= layer < last]:
        raise ValueError(f"layers must lie in 0 .. {last - 1}, got {wrong}")
    sides = (open_tensors(ours, config), open_tensors(reference, config))
    for side in sides:
        check(side, config, read_scales=False)
    chosen = [
        (name, row)
        for name, row in tensor_table(config).items()
        if all(name in side.entries for side in sides) and (layers is None or _layer(name) in layers)
    ]
    total = sum(sides[0].entries[name].size for name, _ in chosen)
    rows, done = [], 0
    for name, row in chosen:
        rows.append(_compare(sides, name, row))
        done += sides[0].entries[name].size
        on_progress(done, total)
    return TensorReport(
        ours=ours,
        reference=reference,
        layers=layers,
        rows=tuple(rows),
        bytes_read=sum(side.bytes_read for side in sides),
    )


LARGEST_LAYER = 9_999


def parse_layers(text: str) -> tuple[int, ...]:
    """ "0-2,61" -> (0, 1, 2, 61). Raises ValueError for anything else."""
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"--layers takes numbers and ranges such as 0-2,61, got {text!r}")
        start, end = int(first), int(last or first)
        if not start <= end <= LARGEST_LAYER:
            raise ValueError(f"--layers takes ranges that rise, up to layer {LARGEST_LAYER}, got {text!r}")
        layers += range(start, end + 1)
    return tuple(layers)


def _compare(sides: tuple[Tensors, Tensors], name: str, row: TensorRow) -> TensorComparison:
    dtypes = (sides[0].entries[name].dtype, sides[1].entries[name].dtype)
    same_bits, largest = True, 0.0
    for left, right in _piece_pairs(sides, name, row):
        if dtypes[0] == dtypes[1] and all(
            a.tobytes() == b.tobytes() for a, b in zip(left.stored, right.stored, strict=True)
        ):
            continue
        same_bits = False
        a, b = left.values(), right.values()
        with np.errstate(invalid="ignore"):
            difference = np.abs(a - b)
        difference[(a == b) | (np.isnan(a) & np.isnan(b))] = 0
        largest = float(np.maximum(largest, difference.max(initial=0.0)))
    verdict: Verdict = "identical" if same_bits else "equal" if largest == 0 else "different"
    return TensorComparison(
        name=name, layer=_layer(name), dtypes=dtypes, verdict=verdict, max_difference=largest
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rows:
    """stored: a piece as stored, with its scales when FP8; values(): the same dequantised, in float32."""

    stored: tuple[np.ndarray, ...]
    values: Callable[[], np.ndarray]


def _piece_pairs(sides: tuple[Tensors, Tensors], name: str, row: TensorRow) -> Iterator[tuple[_Rows, _Rows]]:
    for piece in cut(name, row, "float32"):

        def rows(side: Tensors, piece=piece) -> _Rows:
            dtype = side.entries[name].dtype
            values, scales = read_piece(side, piece, dtype)
            stored = (values,) if scales is None else (values, scales)
            return _Rows(stored=stored, values=lambda: read_piece(side, piece, "F32")[0])

        yield rows(sides[0]), rows(sides[1])


def _layer(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] else None


def _refuse_other_model(config: ModelConfig, other: ModelConfig) -> None:
    """The stored quantisation may differ, and DeepSeek's own format has neither MTP layer nor token ids."""
    free = {"fp8", "n_mtp_layers", "bos_token_id", "eos_token_ids", "pad_token_id", "max_seq_len"}
    for field in dataclasses.fields(ModelConfig):
        left, right = getattr(config, field.name), getattr(other, field.name)
        if field.name not in free and left != right:
            raise ValueError(f"the checkpoints are of different models: {field.name} is {left} and {right}")
