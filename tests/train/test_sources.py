"""Every kind of checkpoint that is read: each of its tensors is in what is made of it, or named in an error.

Kinds that train.export writes from are in test_export.py: a run, a run with adapters, a run that shares its embeddings.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import save_file

from dsa_jax.checkpoint import convert, load_config, load_params, write_hf
from dsa_jax.checkpoint.hf_config import from_hf
from dsa_jax.checkpoint.hf_reader import HfFolder
from dsa_jax.checkpoint.names import tensor_table
from tests.dsa_jax.checkpoint.test_deepseek_folder import convert_as_deepseek
from tests.dsa_jax.checkpoint.test_spellings import COPIES, write_bytes
from tests.train.small import CONFIG, initial
from tests.train.test_export import write_run
from tests.vectors.weights import CONFIGS, make_weights, write_release_checkpoint

Tensors = dict[str, np.ndarray]
EXTRA = "model.layers.0.self_attn.extra.weight"
MTP = "model.layers.4."


@dataclass
class Source:
    """A checkpoint. expected: released name -> its values, all of them. config_file: of the model, if not in it."""

    path: Path
    expected: Tensors
    config_file: Path | None = None


def config_json(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS["tiny"] | {"quantization_config": None} | changes))
    return folder / "config.json"


def plain(tmp: Path, extra: Tensors, change: Callable[[Tensors], Tensors] = dict, **changes: Any) -> Source:
    """One file of float32 tensors; change: what is stored for them."""
    weights = make_weights("tiny", mtp=True)
    config_json(tmp / "source", **changes)
    save_file(change(weights) | extra, tmp / "source" / "model.safetensors")
    return Source(tmp / "source", weights)


def bfloat16(tmp: Path, extra: Tensors) -> Source:
    rounded = {
        name: array.astype(ml_dtypes.bfloat16) for name, array in make_weights("tiny", mtp=True).items()
    }
    config_json(tmp / "source")
    save_file(rounded | extra, tmp / "source" / "model.safetensors")
    return Source(tmp / "source", {name: array.astype(np.float32) for name, array in rounded.items()})


def fp8_shards(tmp: Path, extra: Tensors) -> Source:
    expected = write_release_checkpoint(tmp / "source")
    if extra:
        index = json.loads((tmp / "source" / "model.safetensors.index.json").read_text())
        save_file(extra, tmp / "source" / "extra.safetensors")
        index["weight_map"] |= dict.fromkeys(extra, "extra.safetensors")
        (tmp / "source" / "model.safetensors.index.json").write_text(json.dumps(index))
    return Source(tmp / "source", expected)


def rewritten(tmp: Path, extra: Tensors, change: Callable[[Tensors], Tensors]) -> Source:
    """The FP8 release with its tensors, scales included, changed and stored in one file."""
    expected = write_release_checkpoint(tmp / "release")
    folder = HfFolder(tmp / "release")
    stored = {name: np.array(folder.read(name)) for name in folder.entries}
    write_bytes(tmp / "source", change(stored) | extra)
    (tmp / "source" / "config.json").write_bytes((tmp / "release" / "config.json").read_bytes())
    return Source(tmp / "source", expected)


def one_byte_scales(tensors: Tensors) -> Tensors:
    return {
        name: (np.log2(array) + 127).astype(np.uint8).view(ml_dtypes.float8_e8m0fnu)
        if name.endswith("_scale_inv")
        else array
        for name, array in tensors.items()
    }


def stacked(tensors: Tensors) -> Tensors:
    """The experts as transformers stacks them, with their scales if they have any."""
    found = {name: array for name, array in tensors.items() if ".mlp.experts." not in name}
    for layer in range(1, 5):
        prefix = f"model.layers.{layer}.mlp.experts."
        for suffix in {"", "_scale_inv"} if prefix + "0.up_proj.weight_scale_inv" in tensors else {""}:
            parts = [[f"{prefix}{e}.{part}_proj.weight{suffix}" for part in ("gate", "up")] for e in range(8)]
            found[f"{prefix}gate_up_proj{suffix}"] = np.stack(
                [np.concatenate([tensors[name] for name in names]) for names in parts]
            )
            found[f"{prefix}down_proj{suffix}"] = np.stack(
                [tensors[f"{prefix}{e}.down_proj.weight{suffix}"] for e in range(8)]
            )
    return found


def without(*prefixes: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: array for name, array in tensors.items() if not name.startswith(prefixes)}


def left_out(source: Source, *prefixes: str) -> Source:
    source.expected = without(*prefixes)(source.expected)
    return source


def deepseek(tmp: Path, extra: Tensors) -> Source:
    expected = write_release_checkpoint(tmp / "release", "tiny_two_ranks")
    convert_as_deepseek(tmp / "release", tmp / "source")
    (tmp / "source" / "config.json").write_bytes((tmp / "release" / "config.json").read_bytes())
    if extra:
        save_file(extra, tmp / "source" / "extra.safetensors")
    return left_out(Source(tmp / "source", expected), MTP)


def converted(tmp: Path, extra: Tensors) -> Source:
    source = fp8_shards(tmp, {})
    convert(source.path, tmp / "orbax")
    if not extra:
        return Source(tmp / "orbax", source.expected)
    tree = ocp.StandardCheckpointer().restore(tmp / "orbax")
    tree["params"]["extra"] = np.ones(3, np.float32)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp / "changed", tree)
    return Source(tmp / "changed", source.expected, config_file=tmp / "source" / "config.json")


def params_of_small(tmp: Path, extra: Tensors) -> tuple[dict[str, Any], Tensors, Path]:
    """A tree, what it holds by released names, and a config.json for it."""
    params = jax.device_get({"params": dict(initial()["params"])})
    expected: Tensors = {}
    for name, row in tensor_table(CONFIG).items():
        leaf: Any = params["params"]
        for key in row.path:
            leaf = leaf[key]
        expected[name] = leaf[row.index].T if row.transpose else leaf[row.index]
    write_hf(tmp / "config", params, CONFIG)
    if extra:
        params["params"]["extra"] = np.ones(3, np.float32)
    return params, expected, tmp / "config" / "config.json"


def saved_by_orbax(tmp: Path, extra: Tensors) -> Source:
    params, expected, config_file = params_of_small(tmp, extra)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp / "source", params)
    return Source(tmp / "source", expected, config_file)


def training_step(tmp: Path, extra: Tensors) -> Source:
    params, expected, config_file = params_of_small(tmp, extra)
    write_run(tmp / "run", params)
    return Source(tmp / "run" / "checkpoints" / "1", expected, config_file)


def training_params(tmp: Path, extra: Tensors) -> Source:
    source = training_step(tmp, extra)
    return Source(source.path / "params", source.expected, source.config_file)


def with_buffers(weights: Tensors) -> Tensors:
    return weights | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(16, np.float32)}


KINDS: dict[str, Callable[[Path, Tensors], Source]] = {
    "float32": plain,
    "bfloat16": bfloat16,
    "FP8 in shards": fp8_shards,
    "F8_E8M0 scales": lambda tmp, extra: rewritten(tmp, extra, one_byte_scales),
    "stacked experts": lambda tmp, extra: plain(tmp, extra, stacked),
    "stacked FP8 experts": lambda tmp, extra: rewritten(tmp, extra, stacked),
    "RoPE buffers": lambda tmp, extra: plain(tmp, extra, with_buffers),
    "shared MTP": lambda tmp, extra: left_out(plain(tmp, extra, without(*COPIES)), *COPIES),
    "announced MTP is not there": lambda tmp, extra: left_out(plain(tmp, extra, without(MTP)), MTP),
    "DeepSeek's converter": deepseek,
    "Orbax, converted": converted,
    "Orbax, saved by Orbax": saved_by_orbax,
    "a step of a run": training_step,
    "the parameters of a step": training_params,
}


def values_of(folder: Path) -> Tensors:
    """Every tensor of a Hugging Face folder, dequantised."""
    opened = HfFolder(folder)
    assert not opened.faults
    names = [name for name in opened.entries if not name.endswith("_scale_inv")]
    return {name: np.asarray(opened.read_weight(name), np.float32) for name in names}


def assert_holds(found: Tensors, expected: Tensors) -> None:
    copies = set(COPIES) | {name.replace("layers.4", f"layers.{CONFIG.n_layers}") for name in COPIES}
    assert set(found) - copies == set(expected) - copies and set(found) >= set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_in_the_result(tmp_path, kind) -> None:
    source = KINDS[kind](tmp_path, {})
    config = load_config(source.path, config_file=source.config_file, dtype="float32", param_dtype="float32")
    loaded = load_params(source.path, config)
    write_hf(tmp_path / "loaded", loaded, config, mtp_copies=False)
    assert_holds(values_of(tmp_path / "loaded"), source.expected)
    convert(source.path, tmp_path / "out", config_file=source.config_file)
    final = tmp_path / "out"
    if (final / "_METADATA").is_file():
        convert(final, final := tmp_path / "back")
    assert_holds(values_of(final), source.expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_that_has_no_place_is_named(tmp_path, kind) -> None:
    source = KINDS[kind](tmp_path, {EXTRA: np.ones((3, 4), np.float32)})
    config = load_config(source.path, config_file=source.config_file)
    for use in (
        lambda: load_params(source.path, config),
        lambda: convert(source.path, tmp_path / "out", config_file=source.config_file),
    ):
        with pytest.raises(ValueError, match="extra"):
            use()
    assert not (tmp_path / "out").exists()


# What could be left out by a config.json that says less than is stored.


def test_an_mtp_layer_that_config_json_does_not_announce_is_named(tmp_path) -> None:
    source = plain(tmp_path, {}, num_nextn_predict_layers=0)
    for use in (load_config, lambda path: convert(path, tmp_path / "out")):
        with pytest.raises(
            ValueError, match="layer 4 is stored and is an MTP layer, config.json announces none"
        ):
            use(source.path)
    left = load_params(source.path, load_config(source.path, n_mtp_layers=0))
    assert "mtp" not in left["params"]  # asked for


def test_a_last_layer_beyond_num_hidden_layers_is_named(tmp_path) -> None:
    source = plain(tmp_path, {}, without(MTP), num_hidden_layers=3, num_nextn_predict_layers=0)
    config = load_config(source.path)
    with pytest.raises(ValueError, match="unknown to this config: model.layers.3"):
        load_params(source.path, config)


def test_an_mtp_layer_of_a_run_that_config_file_does_not_announce_is_named(tmp_path) -> None:
    source = training_params(tmp_path, {})
    values = json.loads(source.config_file.read_text()) | {"num_nextn_predict_layers": 0}
    source.config_file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"layer 2 is stored and is an MTP layer.*num_nextn_predict_layers"):
        convert(source.path, tmp_path / "out", config_file=source.config_file)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "model-00002-of-00002.safetensors"])
def test_a_weight_file_beside_the_models_own_is_named(tmp_path, name) -> None:
    source = plain(tmp_path, {})
    save_file({"x": np.ones(1, np.float32)}, source.path / name)
    with pytest.raises(
        ValueError, match=f"1 weight files that do not belong to the model; move them away: {name}"
    ):
        load_params(source.path, load_config(source.path))


def test_copies_that_differ_from_what_they_are_to_share_are_named(tmp_path) -> None:
    source = plain(tmp_path, {}, lambda tensors: tensors | {name: tensors[name] + 1 for name in COPIES})
    shared = load_config(source.path, mtp_shared_embeddings=True)
    with pytest.raises(
        ValueError, match=rf"2 tensors of the MTP layer that differ .*: {COPIES[0]} \(model.embed"
    ):
        load_params(source.path, shared)


@pytest.mark.parametrize("config_file", [True, False])
def test_a_config_file_takes_the_mtp_layer_as_it_is_stored(tmp_path, config_file) -> None:
    """config_file with GLM's shared embeddings, and with an MTP layer that is announced and not there."""
    for prefixes, expected in ((COPIES, (1, True)), ((MTP,), (0, False))):
        folder = tmp_path / str(expected[0])
        folder.mkdir()
        source = plain(folder, {}, without(*prefixes))
        file = config_json(folder / "elsewhere") if config_file else None
        config = load_config(source.path, config_file=file)
        assert (config.n_mtp_layers, config.mtp_shared_embeddings) == expected
        convert(source.path, folder / "out", config_file=file)
        assert_holds_params(folder / "out", left_out(source, *prefixes).expected)


def assert_holds_params(folder: Path, expected: Tensors) -> None:
    convert(folder, folder.parent / "back")
    assert_holds(values_of(folder.parent / "back"), expected)


def test_a_dense_checkpoint_with_fresh_indexers_keeps_all_it_had(tmp_path) -> None:
    weights = {n: a for n, a in make_weights("tiny", mtp=True).items() if ".indexer." not in n}
    values = {k: v for k, v in CONFIGS["tiny"].items() if not k.startswith("index_")}
    values |= {"quantization_config": None, "model_type": "deepseek_v3"}
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps(values))
    save_file(weights, tmp_path / "source" / "model.safetensors")
    added = convert(tmp_path / "source", tmp_path / "out", format="hf", add_indexer=True).added
    found = values_of(tmp_path / "out")
    assert set(found) == set(weights) | set(added)
    assert from_hf(json.loads((tmp_path / "out" / "config.json").read_text())).n_mtp_layers == 1
    for name, array in weights.items():
        np.testing.assert_array_equal(found[name], array)
