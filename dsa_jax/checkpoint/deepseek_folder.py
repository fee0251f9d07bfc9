"""DeepSeek's own converted checkpoints: `model{i}-mp{N}.safetensors`, the output of its inference/convert.py.

Each of N files holds one rank's share of every tensor, under shorter names and without the MTP layer. The reader
gives the released names and whole tensors again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsa_jax.checkpoint.files import read_json_object
from dsa_jax.checkpoint.hf_config import file_named, from_hf
from dsa_jax.checkpoint.hf_config_values import read_integer, read_number
from dsa_jax.checkpoint.hf_reader import carried_files
from dsa_jax.checkpoint.names import SCALE_SUFFIX, tensor_table
from dsa_jax.checkpoint.safetensors_file import SafetensorsFile, TensorEntry
from dsa_jax.checkpoint.tensors import Carried
from dsa_jax.config import Fp8Config, ModelConfig, YarnConfig

_FILE = re.compile(r"model(\d+)-mp(\d+)\.safetensors")
# Released name of a module -> (its name here, the axis that is split over ranks; None: every rank has all of it).
_MODULES: dict[str, tuple[str, int | None]] = {
    "embed_tokens": ("embed", 0),
    "input_layernorm": ("attn_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
    "q_a_proj": ("wq_a", None),
    "q_a_layernorm": ("q_norm", None),
    "q_b_proj": ("wq_b", 0),
    "kv_a_proj_with_mqa": ("wkv_a", None),
    "kv_a_layernorm": ("kv_norm", None),
    "kv_b_proj": ("wkv_b", 0),
    "o_proj": ("wo", 1),
    "gate_proj": ("w1", 0),
    "up_proj": ("w3", 0),
    "down_proj": ("w2", 1),
    "lm_head": ("head", 0),
    "gate": ("gate", None),
    "norm": ("norm", None),
    "wq_b": ("wq_b", None),
    "wk": ("wk", None),
    "k_norm": ("k_norm", None),
    "weights_proj": ("weights_proj", None),
}
_PARTS = {"self_attn": "attn", "mlp": "ffn"}
_LEAVES = {"weight_scale_inv": "scale", "e_score_correction_bias": "bias"}
_CONFIG_KEYS = {
    "vocab_size": "vocab_size", "dim": "d_model", "inter_dim": "d_ff", "moe_inter_dim": "d_expert",
    "n_layers": "n_layers", "n_dense_layers": "n_dense_layers", "n_heads": "n_heads",
    "n_routed_experts": "n_routed_experts", "n_shared_experts": "n_shared_experts",
    "n_activated_experts": "n_activated_experts", "n_expert_groups": "n_expert_groups",
    "n_limited_groups": "n_limited_groups", "route_scale": "route_scale", "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank", "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim", "v_head_dim": "v_head_dim", "index_n_heads": "index_n_heads",
    "index_head_dim": "index_head_dim", "index_topk": "index_topk",
}  # fmt: skip
_FIXED = {"score_func": "sigmoid"}
_RUN_TIME = {"dtype", "scale_fmt", "max_batch_size", "max_seq_len", "original_seq_len", "rope_theta",
             "rope_factor", "beta_fast", "beta_slow", "mscale"}  # fmt: skip
_DEFAULTS = {"original_seq_len": 4096, "rope_theta": 10000.0, "rope_factor": 40.0, "beta_fast": 32,
             "beta_slow": 1, "mscale": 1.0}  # fmt: skip


def is_deepseek(path: Path) -> bool:
    """Whether the folder holds files named as DeepSeek's converter names them."""
    return path.is_dir() and any(_FILE.fullmatch(file.name) for file in path.iterdir())


def deepseek_name(released: str) -> tuple[str, int | None]:
    """Released name -> (name in the converted files, axis split over ranks or None).

    Raises KeyError for a module the converter does not know, such as those of the MTP layer.
    """
    *parts, module, leaf = released.removeprefix("model.").split(".")
    if leaf == "weight" or leaf in _LEAVES or leaf == "bias":
        name, axis = _MODULES[module]
    else:
        raise KeyError(released)
    # A routed expert is stored whole by one rank; the shared ones are split like any other SwiGLU.
    if "experts" in parts:
        axis = None
    renamed = [_PARTS.get(part, part) for part in parts]
    return ".".join([*renamed, name, _LEAVES.get(leaf, leaf)]), axis


class DeepSeekFolder:
    """Tensors over a converted folder under their released names; see `tensors.Tensors`.

    Raises ValueError when the files come from several conversions.
    """

    def __init__(self, path: str | Path, config: ModelConfig) -> None:
        self.path = Path(path)
        self.entries: dict[str, TensorEntry] = {}
        self.faults: dict[str, list[str]] = {}
        self.unreadable: set[str] = set()
        ranks = {int(m[1]): int(m[2]) for f in self.path.iterdir() if (m := _FILE.fullmatch(f.name))}
        if len(set(ranks.values())) != 1:
            raise ValueError(f"{path} mixes files of several conversions (mp{sorted(set(ranks.values()))})")
        self._n_ranks = next(iter(ranks.values()))
        self._files: list[SafetensorsFile | None] = []
        for rank in range(self._n_ranks):
            name = f"model{rank}-mp{self._n_ranks}.safetensors"
            try:
                self._files.append(SafetensorsFile(self.path / name))
            except FileNotFoundError:
                self._files.append(None)
                self.faults.setdefault("shards missing, download them", []).append(name)
            except ValueError as error:
                self._files.append(None)
                self.faults.setdefault("unreadable shards", []).append(str(error))
        if others := sorted(f.name for f in self.path.glob("*.safetensors") if not _FILE.fullmatch(f.name)):
            self.faults["weight files that do not belong to the model; move them away"] = others
        self._places: dict[str, tuple[str, int | None, tuple[int, ...]]] = {}
        used: set[str] = set()
        for released, row in tensor_table(config).items():
            for suffix in ("", SCALE_SUFFIX) if len(row.shape) == 2 else ("",):
                self._find(released + suffix, used)
        unknown = sorted({name for file in self._files if file for name in file.entries} - used)
        if unknown:
            self.faults["tensors unknown to this config"] = unknown

    @property
    def bytes_read(self) -> int:
        return sum(file.bytes_read for file in self._files if file)

    def read_rows(self, name: str, start: int, stop: int, columns: slice = slice(None)) -> np.ndarray:
        """Rows start..stop, joined from the ranks' shares."""
        stored, axis, holders = self._places[name]
        if axis is None:
            return self._file(holders[0]).read_rows(stored, start, stop, columns)
        parts = []
        if axis == 1:
            for rank in holders:
                parts.append(self._file(rank).read_rows(stored, start, stop))
            return np.concatenate(parts, axis=1)[:, columns]
        share = self._file(holders[0]).entries[stored].shape[0]
        for rank in holders:
            first, last = max(start - rank * share, 0), min(stop - rank * share, share)
            if first < last:
                parts.append(self._file(rank).read_rows(stored, first, last, columns))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _file(self, rank: int) -> SafetensorsFile:
        file = self._files[rank]
        assert file is not None
        return file

    def _find(self, released: str, used: set[str]) -> None:
        try:
            stored, axis = deepseek_name(released)
        except KeyError:
            return
        used.add(stored)
        holders = [rank for rank, file in enumerate(self._files) if file and stored in file.entries]
        if not holders:
            if None in self._files:
                self.unreadable.add(released)
            return
        entries = [self._file(rank).entries[stored] for rank in holders]
        if len({(entry.dtype, entry.shape) for entry in entries}) > 1:
            self.faults.setdefault("tensors that differ between ranks", []).append(stored)
            self.unreadable.add(released)
            return
        shape = list(entries[0].shape)
        if axis is not None and self._n_ranks > 1:
            if len(holders) < self._n_ranks:
                if None not in self._files:
                    self.faults.setdefault("tensors missing from a rank", []).append(stored)
                self.unreadable.add(released)
                return
            shape[axis] *= self._n_ranks
        else:
            axis = None
        self._places[released] = (stored, axis, tuple(holders))
        size = sum(entry.size for entry in entries) if axis is not None else entries[0].size
        self.entries[released] = TensorEntry(dtype=entries[0].dtype, shape=tuple(shape), begin=0, end=size)


def load_deepseek_config(
    path: Path, config_file: Path | None = None, *, ignore: Iterable[str] = (), **switches: Any
) -> ModelConfig:
    """The ModelConfig from config_file, or the one config*.json of the folder, DeepSeek's spelling or Hugging Face's.

    There is never an MTP layer: DeepSeek's converter leaves it out. max_seq_len is original_seq_len times the
    RoPE factor, as in the release. ignore: as in from_hf. Raises ValueError for unknown, missing or unsupported keys.
    """
    if config_file is None:
        found = sorted(file for file in path.glob("config*.json"))
        if len(found) != 1:
            raise ValueError(
                f"{path} must hold one config*.json, it holds {len(found)}; give the config with --config "
                "(DeepSeek's inference/configs has config_671B_v3.2.json)"
            )
        config_file = found[0]
    values = read_json_object(config_file)
    if "model_type" not in values:
        fields = _fields(values, config_file)
    with file_named(config_file):
        if "model_type" in values:
            return from_hf(values, ignore=ignore, **({"n_mtp_layers": 0} | switches))
        return ModelConfig(**(fields | switches))


def deepseek_files(path: Path) -> tuple[Path, ...]:
    """Tokenizer files of a folder; its config.json is none of Hugging Face's."""
    return tuple(file for file in carried_files(path) if not file.name.startswith("config"))


def deepseek_carried(folder: DeepSeekFolder) -> Carried:
    """What a conversion of the folder passes on: tokenizer files, and no Hugging Face config.json."""
    return Carried(
        files=deepseek_files(folder.path),
        stored={name: entry.dtype for name, entry in folder.entries.items()},
    )


def _fields(values: Mapping[str, Any], file: Path) -> dict[str, Any]:
    if unknown := sorted(set(values) - set(_CONFIG_KEYS) - set(_FIXED) - _RUN_TIME):
        raise ValueError(f"{file} has keys this loader does not know: {', '.join(unknown)}; remove them")
    if missing := sorted(set(_CONFIG_KEYS) - set(values)):
        raise ValueError(f"{file} lacks the keys {', '.join(missing)}; add them")
    for key, supported in _FIXED.items():
        if values.get(key, supported) != supported:
            raise ValueError(f"{file}: {key} must be {supported!r}, got {values[key]!r}")
    rope = {key: values.get(key, default) for key, default in _DEFAULTS.items()}
    with file_named(file):
        original = read_integer("original_seq_len", rope.pop("original_seq_len"))
        numbers = {key: read_number(key, value) for key, value in rope.items()}
        factor = numbers["rope_factor"]
        yarn = YarnConfig(
            factor=factor,
            original_seq_len=original,
            beta_fast=numbers["beta_fast"],
            beta_slow=numbers["beta_slow"],
            mscale=numbers["mscale"],
            mscale_all_dim=numbers["mscale"],
        )
        route_scale = read_number("route_scale", values["route_scale"])
    quantised = values.get("dtype") == "fp8"
    fields = {field: values[key] for key, field in _CONFIG_KEYS.items()}
    return fields | {
        "route_scale": route_scale,
        "rope_theta": numbers["rope_theta"],
        "yarn": yarn if factor > 1 else None,
        "max_seq_len": int(original * factor),
        "fp8": Fp8Config(scale_fmt=values.get("scale_fmt")) if quantised else None,
        "bos_token_id": 0,
        "eos_token_ids": (1,),
    }
