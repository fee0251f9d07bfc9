"""Folders that hold the same model in the ways that released folders and transformers write it."""

import json
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from dsa_jax.checkpoint import convert, load_config, load_params, verify
from dsa_jax.checkpoint.hf_reader import HfFolder
from dsa_jax.commands.cli import main
from tests.dsa_jax.models import params_of
from tests.vectors.weights import CONFIGS, make_weights, released_shapes

COPIES = ("model.layers.4.embed_tokens.weight", "model.layers.4.shared_head.head.weight")


def write(folder: Path, tensors: dict[str, np.ndarray], **config: Any) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIGS["tiny"] | {"quantization_config": None} | config))
    return folder


def loaded(folder: Path, **switches: Any) -> Any:
    config = load_config(folder, dtype="float32", param_dtype="float32", **switches)
    return load_params(folder, config)


def assert_equal(tree: Any, expected: Any) -> None:
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, tree, expected)


def test_an_mtp_layer_without_copies_uses_the_main_embedding_and_head(tmp_path) -> None:
    weights = make_weights("tiny", mtp=True)
    source = write(tmp_path / "shared", {k: v for k, v in weights.items() if k not in COPIES})
    assert load_config(source).mtp_shared_embeddings
    tree = loaded(source)
    assert not {"embed", "head"} & set(tree["params"]["mtp"])
    assert verify(source).faults == ()

    convert(source, tmp_path / "orbax")
    assert verify(tmp_path / "orbax").faults == ()
    assert_equal(loaded(tmp_path / "orbax"), tree)
    convert(tmp_path / "orbax", tmp_path / "back")
    back = HfFolder(tmp_path / "back")
    assert set(back.entries) == set(weights) - set(COPIES)
    for name in back.entries:
        np.testing.assert_array_equal(back.read(name), weights[name])


def test_one_copy_alone_is_a_missing_tensor(tmp_path) -> None:
    weights = make_weights("tiny", mtp=True)
    source = write(tmp_path / "half", {k: v for k, v in weights.items() if k != COPIES[0]})
    with pytest.raises(ValueError, match=f"missing.*{COPIES[0]}"):
        loaded(source)


def test_stacked_experts_and_rope_buffers_are_read(tmp_path) -> None:
    weights = make_weights("tiny", mtp=True)
    stacked = {name: array for name, array in weights.items() if ".mlp.experts." not in name}
    for layer in range(1, 5):
        prefix = f"model.layers.{layer}.mlp.experts."
        parts = {
            part: np.stack([weights[f"{prefix}{e}.{part}.weight"] for e in range(8)])
            for part in ("gate_proj", "up_proj", "down_proj")
        }
        stacked[prefix + "gate_up_proj"] = np.concatenate([parts["gate_proj"], parts["up_proj"]], axis=1)
        stacked[prefix + "down_proj"] = parts["down_proj"]
    stacked["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(16, np.float32)
    source = write(tmp_path / "stacked", stacked)
    assert set(HfFolder(source).entries) == set(released_shapes("tiny", mtp=True))
    assert_equal(loaded(source), params_of("tiny"))
    assert verify(source).faults == ()


def test_power_of_two_scales_of_one_byte_are_read(release, tmp_path) -> None:
    folder = HfFolder(release)
    tensors = {name: np.array(folder.read(name)) for name in folder.entries}
    scales = [name for name in tensors if name.endswith("_scale_inv")]
    for name in scales:
        exponent = np.log2(tensors[name]).astype(np.int32) + 127
        tensors[name] = exponent.astype(np.uint8).view(ml_dtypes.float8_e8m0fnu)
    source = write_bytes(tmp_path / "e8m0", tensors)
    (source / "config.json").write_text((release / "config.json").read_text())
    assert HfFolder(source).entries[scales[0]].dtype == "F8_E8M0"
    assert_equal(loaded(source), loaded(release))
    kept, expected = (load_params(path, load_config(path), keep_fp8=True) for path in (source, release))
    assert_equal(kept, expected)
    convert(source, tmp_path / "orbax")
    assert verify(tmp_path / "orbax").faults == ()
    assert_equal(loaded(tmp_path / "orbax"), loaded(release))


def write_bytes(folder: Path, tensors: dict[str, np.ndarray]) -> Path:
    """model.safetensors written by hand: the package's NumPy framework knows no float8_e8m0fnu."""
    names = {
        np.dtype(np.float32): "F32",
        np.dtype(ml_dtypes.bfloat16): "BF16",
        np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
        np.dtype(ml_dtypes.float8_e8m0fnu): "F8_E8M0",
    }
    header, offset = {}, 0
    for name, array in tensors.items():
        offsets = [offset, offset + array.nbytes]
        header[name] = {"dtype": names[array.dtype], "shape": list(array.shape), "data_offsets": offsets}
        offset += array.nbytes
    raw = json.dumps(header).encode()
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        for array in tensors.values():
            stream.write(array.tobytes())
    return folder


def test_ignored_keys_are_an_option_everywhere_and_remembered(tmp_path, capsys) -> None:
    source = write(tmp_path / "extra", make_weights("tiny", mtp=True), sliding_window=128)
    with pytest.raises(ValueError, match="pass --ignore sliding_window"):
        load_config(source)
    assert main(["verify", str(source)]) == 2
    assert "--ignore sliding_window" in capsys.readouterr().err
    assert main(["verify", str(source), "--ignore", "sliding_window"]) == 0

    convert(source, tmp_path / "orbax", ignore=("sliding_window",))
    convert(tmp_path / "orbax", tmp_path / "back")
    values = json.loads((tmp_path / "back" / "config.json").read_text())
    assert values["sliding_window"] == 128 and values["dsa_jax_ignore"] == ["sliding_window"]
    assert verify(tmp_path / "back").faults == ()
    model = ["--model", str(source), "--ignore", "sliding_window"]
    assert main(["compare", *model, "--checkpoint", str(tmp_path / "back")]) == 0
    assert main(["generate", *model, "--token-ids", "5", "--max-new-tokens", "1"]) == 0
