"""Bounds of the numbers that describe a run, so that a mistyped one is refused before anything is read or compiled."""

import dataclasses
import math
from typing import Any

_LARGEST = 2**31 - 1  # of sizes, counts and seeds: int32
_COUNT, _COUNT_OR_NONE = (1, _LARGEST), (0, _LARGEST)
_POSITIVE, _AT_LEAST_0 = (math.ulp(0.0), math.inf), (0.0, math.inf)

# Field -> the smallest and the largest value, of which infinity is none. None is left to the fields that take it.
LIMITS: dict[str, tuple[float, float]] = {
    # of Run
    "batch": _COUNT, "seq_len": _COUNT, "accumulate": _COUNT, "checkpoint_every": _COUNT,
    "keep": _COUNT, "log_every": _COUNT, "seed": _COUNT_OR_NONE, "eval_batches": _COUNT_OR_NONE,
    # of Stage
    "steps": _COUNT, "lr_warmup": _COUNT_OR_NONE, "data_seed": _COUNT_OR_NONE, "lr": _AT_LEAST_0,
    "index_lr": _AT_LEAST_0, "lr_end": _AT_LEAST_0, "clip": _POSITIVE, "weight_decay": _AT_LEAST_0,
    "mtp_weight": _AT_LEAST_0, "balance_weight": _AT_LEAST_0, "bias_step": _AT_LEAST_0,
    # of Source, Lora and MeshSpec
    "weight": _POSITIVE, "rank": _COUNT, "alpha": _POSITIVE,
    "data": _COUNT, "expert": _COUNT, "context": _COUNT, "tensor": _COUNT,
}  # fmt: skip


def check_numbers(described: Any, owner: str = "") -> None:
    """Raises ValueError for a field of the dataclass whose number is outside its limits, or NaN.

    owner: what the message begins with, where several of the kind are described.
    """
    for field in dataclasses.fields(described):
        value = getattr(described, field.name)
        if field.name not in LIMITS or not isinstance(value, int | float):
            continue
        least, most = LIMITS[field.name]
        if value < least:
            rule = "positive" if least == _POSITIVE[0] else f"at least {least:.0f}"
            raise ValueError(f"{owner}{field.name} must be {rule}, got {value}")
        if not (value <= most and value < math.inf):
            rule = "finite" if most == math.inf else "below 2**31"
            shown = (
                value
                if abs(value) < 10**20 or isinstance(value, float)
                else "an integer of more than 20 digits"
            )
            raise ValueError(f"{owner}{field.name} must be {rule}, got {shown}")
