"""Experts stacked in one tensor, as transformers stores them with save_original_format=False, as released tensors.

experts.gate_up_proj is [E, 2 F, D], each gate above its up projection, and experts.down_proj is [E, D, F]. FP8 block
scales are stacked in the same way. Each released matrix is a range of bytes of the stack, so nothing is copied.
"""

from __future__ import annotations

from dsa_jax.checkpoint.names import SCALE_SUFFIX
from dsa_jax.checkpoint.safetensors_file import TensorEntry

_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def unstacked(name: str, entry: TensorEntry) -> dict[str, TensorEntry]:
    """Released name -> its range of the file, for every matrix of a stack; {} for any other tensor."""
    prefix, _, kind = name.rpartition(".experts.")
    suffix = SCALE_SUFFIX if kind.endswith(SCALE_SUFFIX) else ""
    parts = _PARTS.get(kind.removesuffix(suffix), ())
    if not prefix or not parts or len(entry.shape) != 3 or not entry.size or entry.shape[1] % len(parts):
        return {}
    experts, rows, columns = entry.shape
    size = entry.size // (experts * len(parts))
    return {
        f"{prefix}.experts.{expert}.{part}.weight{suffix}": TensorEntry(
            dtype=entry.dtype,
            shape=(rows // len(parts), columns),
            begin=entry.begin + i * size,
            end=entry.begin + (i + 1) * size,
        )
        for i, (expert, part) in enumerate((e, part) for e in range(experts) for part in parts)
    }
