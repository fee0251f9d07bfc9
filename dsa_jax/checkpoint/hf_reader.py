"""A Hugging Face checkpoint folder: its config.json and the tensors of all its shards."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsa_jax.checkpoint.checksums import CHECKSUMS_FILE
from dsa_jax.checkpoint.files import read_json_object
from dsa_jax.checkpoint.hf_config import file_named, from_hf
from dsa_jax.checkpoint.job import MARKER
from dsa_jax.checkpoint.names import (
    MTP_COPIES,
    MTP_PROJECTION,
    SCALE_SUFFIX,
    TensorRow,
    layer_prefix,
    tensor_table,
)
from dsa_jax.checkpoint.pieces import cut
from dsa_jax.checkpoint.safetensors_file import SafetensorsFile, TensorEntry
from dsa_jax.checkpoint.stacked_experts import unstacked
from dsa_jax.checkpoint.tensors import FP8, Carried
from dsa_jax.config import ModelConfig
from dsa_jax.fp8.blocks import dequantize_blocks

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_CARRIED_SUFFIXES = (".json", ".model", ".txt", ".jinja", ".md")
_NOT_CARRIED = {"config.json", INDEX_FILE, CHECKSUMS_FILE, MARKER}

_BUFFERS = ".rotary_emb.inv_freq"
"""Ends the names of RoPE's frequencies, which old releases of transformers stored; config.json determines them."""

logger = logging.getLogger(__name__)


def load_hf_config(
    path: str | Path, config_file: Path | None = None, *, ignore: Iterable[str] = (), **switches: Any
) -> ModelConfig:
    """The ModelConfig of a checkpoint folder; `switches` are ModelConfig fields, `ignore` as in from_hf.

    config_file: read this file instead of the folder's own config.json. The MTP layer is as `as_stored` says.
    Raises ValueError for what from_hf refuses and for unreadable JSON, FileNotFoundError without config.json.
    """
    path = Path(path)
    file = config_file or path / "config.json"
    values = read_json_object(file)
    with file_named(file):
        config = from_hf(values, ignore=ignore, **switches)
    return as_stored(config, path, _stored_names(path), switches)


def as_stored(
    config: ModelConfig, path: Path, names: Iterable[str], switches: Iterable[str] = ()
) -> ModelConfig:
    """The config with its MTP layer as these tensor names have it; fields named in `switches` stay.

    When it announces an MTP layer and there is none among the names (transformers does not write it), n_mtp_layers
    becomes 0 and a warning is logged. When the MTP layer is stored without embedding and head (GLM-5),
    mtp_shared_embeddings becomes True. Raises ValueError for an MTP layer that config.json does not announce.
    """
    prefix = layer_prefix(config.n_layers)
    names = set(names)
    stored = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    if not config.n_mtp_layers and MTP_PROJECTION in stored and "n_mtp_layers" not in switches:
        raise ValueError(
            f"{path}: layer {config.n_layers} is stored and is an MTP layer, config.json announces none: set "
            "num_nextn_predict_layers to 1 in it, or in Python pass n_mtp_layers=0 to leave the layer out"
        )
    if not names or not config.n_mtp_layers:
        return config
    if not stored and "n_mtp_layers" not in switches:
        logger.warning(
            "%s: config.json announces an MTP layer, no tensor of layer %d is stored: n_mtp_layers is set to 0",
            path,
            config.n_layers,
        )
        return dataclasses.replace(config, n_mtp_layers=0)
    if stored and not stored & set(MTP_COPIES) and "mtp_shared_embeddings" not in switches:
        return dataclasses.replace(config, mtp_shared_embeddings=True)
    return config


class HfFolder:
    """The tensors of all shards of a checkpoint folder; see `tensors.Tensors`.

    config: if it shares embedding and head with the MTP layer, copies of them that are stored must be equal to them.
    Raises ValueError when the folder has no weights at all, or two conflicting sets of them.
    """

    def __init__(self, path: str | Path, config: ModelConfig | None = None) -> None:
        self.path = Path(path)
        self.entries: dict[str, TensorEntry] = {}
        self.faults: dict[str, list[str]] = {}
        self.unreadable: set[str] = set()
        self._files: dict[str, SafetensorsFile] = {}
        weight_map = _weight_map(self.path)
        if weight_map is None and not (self.path / SINGLE_FILE).is_file():
            raise ValueError(
                f"{self.path} holds neither {SINGLE_FILE} nor {INDEX_FILE}; give the folder of a "
                "Hugging Face checkpoint in safetensors format"
            )
        by_shard: dict[str, set[str]] = {} if weight_map is not None else {SINGLE_FILE: set()}
        for name, shard in (weight_map or {}).items():
            by_shard.setdefault(shard, set()).add(name)
        for shard in sorted(by_shard):
            self._open(shard, by_shard[shard], weight_map or {})
        for file in sorted(self.path.glob("*.safetensors")):
            if file.name not in by_shard:
                self._fault("weight files that do not belong to the model; move them away", file.name)
        if config is not None:
            self._compare_copies(tensor_table(config))

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors read so far, headers not counted."""
        return sum(file.bytes_read for file in set(self._files.values()))

    def read(self, name: str) -> np.ndarray:
        """The tensor as stored. Raises KeyError for a name not in `entries`."""
        return self._files[name].read(name)

    def read_rows(self, name: str, start: int, stop: int, columns: slice = slice(None)) -> np.ndarray:
        """Rows start..stop as stored, of a matrix only these columns; as SafetensorsFile.read_rows."""
        return self._files[name].read_rows(name, start, stop, columns)

    def read_weight(self, name: str) -> np.ndarray:
        """The tensor as stored, or float32 with its block scales multiplied in when stored in FP8."""
        stored = self.read(name)
        if self.entries[name].dtype != FP8:
            return stored
        return dequantize_blocks(stored, self.read(name + SCALE_SUFFIX))

    def _open(self, shard: str, expected: set[str], weight_map: Mapping[str, str]) -> None:
        """Takes the tensors of one shard; expected: those that the index says it has."""
        try:
            opened = SafetensorsFile(self.path / shard)
        except FileNotFoundError:
            self._fault("shards missing, download them", f"{shard} with {len(expected)} tensors")
            self.unreadable |= expected
            return
        except ValueError as error:
            self._fault("unreadable shards", str(error))
            self.unreadable |= expected
            return
        for name in sorted(expected - set(opened.entries)):
            self._fault("tensors not in the shard the index names", f"{name} in {shard}")
            self.unreadable.add(name)
        for name in list(opened.entries):
            if weight_map.get(name, shard) != shard:
                self._fault("tensors in another shard than the index names", f"{name} in {shard}")
            if name.endswith(_BUFFERS):
                del opened.entries[name]
            elif parts := unstacked(name, opened.entries[name]):
                del opened.entries[name]
                opened.entries |= parts
        for name, entry in opened.entries.items():
            if name in self.entries:
                self._fault("tensors stored twice", f"{name} in {self._files[name].path.name} and {shard}")
            self.entries[name] = entry
            self._files[name] = opened

    def _compare_copies(self, table: Mapping[str, TensorRow]) -> None:
        """Finds stored copies that differ from the tensor whose leaf they share."""
        copies = {row.path: name for name, row in table.items() if row.duplicate and name in self.entries}
        for name, row in table.items():
            if row.duplicate or row.path not in copies or name not in self.entries:
                continue
            copy = copies[row.path]
            if {self.entries[name].shape, self.entries[copy].shape} != {row.shape}:
                continue  # reported by `tensors.find_faults`
            for part in cut(name, row, "float32"):
                first, second = (
                    self.read_rows(each, part.start, part.stop).astype(np.float32) for each in (name, copy)
                )
                if not np.array_equal(first, second, equal_nan=True):
                    self._fault("tensors of the MTP layer that differ from the one they are to share; load them "
                                "with mtp_shared_embeddings=False", f"{copy} ({name})")  # fmt: skip
                    break

    def _fault(self, kind: str, detail: str) -> None:
        self.faults.setdefault(kind, []).append(detail)


def carried_files(path: Path) -> tuple[Path, ...]:
    """Tokenizer, chat template and generation settings of a folder: the small files that are not weights."""
    return tuple(
        file
        for file in sorted(path.iterdir())
        if file.is_file() and file.suffix in _CARRIED_SUFFIXES and file.name not in _NOT_CARRIED
    )


def hf_carried(folder: HfFolder) -> Carried:
    """What a conversion of the folder carries along."""
    return Carried(
        hf_config=read_json_object(folder.path / "config.json"),
        files=carried_files(folder.path),
        stored={name: entry.dtype for name, entry in folder.entries.items()},
    )


def _stored_names(path: Path) -> Iterable[str]:
    weight_map = _weight_map(path)
    if weight_map is not None:
        return weight_map
    return SafetensorsFile(path / SINGLE_FILE).entries if (path / SINGLE_FILE).is_file() else ()


def _weight_map(path: Path) -> dict[str, str] | None:
    """Tensor name -> shard file name of the folder's index; None when it has no index."""
    if not (path / INDEX_FILE).is_file():
        return None
    if (path / SINGLE_FILE).is_file():
        raise ValueError(
            f"{path} holds both {SINGLE_FILE} and {INDEX_FILE}; remove the one that is out of date"
        )
    weight_map = read_json_object(path / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path / INDEX_FILE} has no weight_map of tensor names; re-download it")
    for name, shard in weight_map.items():
        # An index is downloaded data: it must not lead to files outside the folder.
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ValueError(
                f"{path / INDEX_FILE} puts {name} into {shard!r}, not a .safetensors file; re-download it"
            )
    return weight_map
