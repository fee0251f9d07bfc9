"""Opens a checkpoint folder of any kind: its config and its tensors."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from dsa_jax.checkpoint.deepseek_folder import (
    DeepSeekFolder,
    deepseek_carried,
    deepseek_files,
    is_deepseek,
    load_deepseek_config,
)
from dsa_jax.checkpoint.files import read_json_object
from dsa_jax.checkpoint.fresh_indexer import FreshIndexer, add_indexer_keys
from dsa_jax.checkpoint.hf_config import file_named, from_hf, to_hf, with_ignored
from dsa_jax.checkpoint.hf_reader import HfFolder, as_stored, carried_files, hf_carried, load_hf_config
from dsa_jax.checkpoint.job import refuse_incomplete
from dsa_jax.checkpoint.orbax_folder import METADATA_FILE, OrbaxReader, is_orbax, load_orbax_config
from dsa_jax.checkpoint.orbax_tensors import OrbaxTensors, orbax_carried, orbax_names
from dsa_jax.checkpoint.tensors import Carried, Tensors
from dsa_jax.config import ModelConfig

Kind = Literal["hf", "deepseek", "orbax"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint. added: names of the tensors that are fresh, not stored."""

    kind: Kind
    config: ModelConfig
    tensors: Tensors
    carried: Carried
    added: tuple[str, ...] = ()


def kind_of(path: Path) -> Kind:
    """Which layout the folder has. Raises FileNotFoundError when there is no such folder."""
    if not path.is_dir():
        raise FileNotFoundError(f"no folder {path}: give the folder of a checkpoint")
    if is_orbax(path):
        return "orbax"
    return "deepseek" if is_deepseek(path) else "hf"


def load_config(
    path: str | os.PathLike[str],
    *,
    ignore: Iterable[str] = (),
    config_file: str | os.PathLike[str] | None = None,
    **switches: Any,
) -> ModelConfig:
    """The ModelConfig of a checkpoint folder of any kind; `switches` are ModelConfig fields that replace its own.

    ignore: unknown keys of config.json to accept, as in from_hf. config_file: read this file instead of the
    folder's own (Hugging Face's spelling, or DeepSeek's for a folder of its converter).
    Raises ValueError for what is unreadable, contradictory or unfinished, FileNotFoundError when it is not
    there.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"no folder {path}, so no config.json: give the folder of a checkpoint")
    refuse_incomplete(path)
    kind = kind_of(path)
    file = None if config_file is None else Path(config_file)
    if kind == "deepseek":
        return load_deepseek_config(path, file, ignore=ignore, **switches)
    if kind == "hf":
        return load_hf_config(path, file, ignore=ignore, **switches)
    if file is None:
        try:
            return load_orbax_config(path, **switches)
        except (
            KeyError,
            TypeError,
            AttributeError,
        ) as error:  # of JSON that has other fields, or of other types
            raise ValueError(
                f"{path / METADATA_FILE} does not describe a model ({error!r}); convert the checkpoint again"
            ) from error
    values = read_json_object(file)
    with file_named(file):
        config = from_hf(values, ignore=ignore, **switches)
    return as_stored(config, path, orbax_names(OrbaxReader(path), config), switches)


def open_tensors(path: Path, config: ModelConfig, *, max_chunk_bytes: int | None = None) -> Tensors:
    """The folder's tensors, of whatever kind it is. Raises ValueError for an unfinished conversion."""
    refuse_incomplete(path)
    kind = kind_of(path)
    if kind == "orbax":
        return OrbaxTensors(OrbaxReader(path), config, max_chunk_bytes=max_chunk_bytes)
    return DeepSeekFolder(path, config) if kind == "deepseek" else HfFolder(path, config)


def open_checkpoint(
    path: Path,
    *,
    config_file: Path | None = None,
    ignore: tuple[str, ...] = (),
    add_indexer: bool = False,
    max_chunk_bytes: int | None = None,
) -> Checkpoint:
    """Opens the checkpoint for a conversion. add_indexer: give a dense V3 or V3.1 fresh indexers."""
    refuse_incomplete(path)
    kind = kind_of(path)
    if add_indexer:
        if kind != "hf":
            raise ValueError(f"--add-indexer takes a Hugging Face checkpoint, {path} is of the kind {kind}")
        return _with_indexer(path, config_file or path / "config.json", ignore)
    config = load_config(path, ignore=ignore, config_file=config_file)
    tensors = open_tensors(path, config, max_chunk_bytes=max_chunk_bytes)
    if isinstance(tensors, HfFolder):
        carried = hf_carried(tensors)
    elif isinstance(tensors, DeepSeekFolder):
        carried = deepseek_carried(tensors)
    else:
        carried = orbax_carried(path)
        if not (path / METADATA_FILE).is_file() and config_file is not None:
            carried = dataclasses.replace(carried, hf_config=read_json_object(config_file))
    if carried.hf_config is not None:
        carried = dataclasses.replace(carried, hf_config=with_ignored(carried.hf_config, ignore))
    return Checkpoint(kind=kind, config=config, tensors=tensors, carried=carried)


def files_to_carry(path: Path) -> tuple[Path, ...]:
    """The tokenizer files, generation_config.json and the like that accompany the tensors of this folder."""
    kind = kind_of(path)
    if kind == "orbax":
        return orbax_carried(path).files
    return carried_files(path) if kind == "hf" else deepseek_files(path)


def _with_indexer(path: Path, config_file: Path, ignore: Iterable[str]) -> Checkpoint:
    values = add_indexer_keys(read_json_object(config_file))
    with file_named(config_file):
        config = from_hf(values, ignore=ignore)
    folder = HfFolder(path)
    config = as_stored(config, path, folder.entries)
    tensors = FreshIndexer(folder, config)
    carried = dataclasses.replace(hf_carried(folder), hf_config=to_hf(config))
    return Checkpoint(kind="hf", config=config, tensors=tensors, carried=carried, added=tensors.added)
