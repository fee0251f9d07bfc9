"""Every kind of bad source and destination gives one line that says what is wrong, exit code 2, and writes nothing."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from dsa_jax.checkpoint import load_config, load_params
from dsa_jax.checkpoint.hf_reader import HfFolder
from dsa_jax.commands.cli import main

SHARD = "model-00002-of-00003.safetensors"
WEIGHT = "model.layers.1.self_attn.o_proj.weight"
Tensors = dict[str, np.ndarray]


def change_file(change: Callable[[bytearray], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        raw = bytearray((path / SHARD).read_bytes())
        change(raw)
        (path / SHARD).write_bytes(raw)

    return apply


def change_tensors(change: Callable[[Tensors], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        folder = HfFolder(path)
        tensors = {name: np.array(folder.read(name)) for name in folder.entries}
        change(tensors)
        for file in path.glob("model*"):
            file.unlink()
        save_file(tensors, path / "model.safetensors")

    return apply


def change_config(**changes: object) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        values = json.loads((path / "config.json").read_text()) | changes
        (path / "config.json").write_text(json.dumps(values))

    return apply


def set_scale(value: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[WEIGHT + "_scale_inv"][0, 0] = value

    return change


def add_twice(path: Path) -> None:
    """model.norm.weight in a shard of its own, too."""
    save_file(
        {"model.norm.weight": np.ones(256, np.float32), "x": np.ones(1, np.float32)}, path / "e.safetensors"
    )
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"]["x"] = "e.safetensors"
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


BAD = {
    "missing shard": (
        lambda path: (path / SHARD).unlink(),
        f"1 shards missing, download them: {SHARD} with 11",
    ),
    "truncated shard": (change_file(lambda raw: raw.__delitem__(slice(-7, None))), f"{SHARD} is truncated"),
    "empty shard": (change_file(lambda raw: raw.clear()), "fewer than the 8 of the header length"),
    "corrupt header": (
        change_file(lambda raw: raw.__setitem__(slice(8, 20), b"\xff" * 12)),
        "not valid JSON",
    ),
    "huge header": (change_file(lambda raw: raw.__setitem__(7, 0x7F)), "its header length"),
    "wrong dtype": (
        change_tensors(lambda t: t.__setitem__("model.norm.weight", np.zeros(256, np.int32))),
        "1 tensors of a dtype other than BF16, F32, F16, F8_E4M3: model.norm.weight I32",
    ),
    "another fp8": (
        change_tensors(lambda t: t.__setitem__(WEIGHT, t[WEIGHT].astype(ml_dtypes.float8_e5m2))),
        f"{WEIGHT} F8_E5M2",
    ),
    "wrong shape": (
        change_tensors(lambda t: t.__setitem__("lm_head.weight", t["lm_head.weight"][:500])),
        "1 tensors of a wrong shape: lm_head.weight [500, 256], expected [512, 256]",
    ),
    "scale of a wrong shape": (
        change_tensors(lambda t: t.__setitem__(WEIGHT + "_scale_inv", np.ones((1, 1), np.float32))),
        f"1 block scales of a wrong shape: {WEIGHT}_scale_inv [1, 1], expected [2, 1]",
    ),
    "scale missing": (
        change_tensors(lambda t: t.pop(WEIGHT + "_scale_inv")),
        f"1 FP8 tensors without block scales: {WEIGHT} needs {WEIGHT}_scale_inv",
    ),
    "NaN in a scale": (change_tensors(set_scale(np.nan)), f"NaN, infinite or negative: {WEIGHT}_scale_inv"),
    "infinity in a scale": (
        change_tensors(set_scale(np.inf)),
        f"NaN, infinite or negative: {WEIGHT}_scale_inv",
    ),
    "unknown tensor": (
        change_tensors(lambda t: t.__setitem__("model.layers.9.mystery", np.ones(3, np.float32))),
        "1 tensors unknown to this config: model.layers.9.mystery",
    ),
    "missing tensor": (
        change_tensors(lambda t: t.pop("model.norm.weight")),
        "1 tensors missing, so their leaves are unfilled: model.norm.weight",
    ),
    "tensor stored twice": (
        add_twice,
        "1 tensors stored twice: model.norm.weight in e.safetensors and model-0000",
    ),
    "two sets of weights": (
        lambda path: save_file({"x": np.ones(1, np.float32)}, path / "model.safetensors"),
        "holds both model.safetensors and",
    ),
    "config against shapes": (
        change_config(q_lora_rank=256),
        "tensors of a wrong shape: model.layers.0.self_attn",
    ),
    "config of fewer layers": (change_config(num_hidden_layers=3), "tensors unknown to this config"),
    "config against itself": (change_config(num_key_value_heads=2), "num_key_value_heads must be 4"),
    "no config": (lambda path: (path / "config.json").unlink(), "config.json"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_source_is_one_clear_sentence(release, tmp_path, capsys, kind) -> None:
    damage, message = BAD[kind]
    shutil.copytree(release, tmp_path / "source")
    damage(tmp_path / "source")
    assert main(["convert", str(tmp_path / "source"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("dsa-jax: ") and "Traceback" not in error
    assert not (tmp_path / "out").exists()
    with pytest.raises((ValueError, FileNotFoundError)):
        load_params(tmp_path / "source", load_config(tmp_path / "source"))


def test_a_bad_destination_or_option_is_one_clear_sentence(release, tmp_path, capsys) -> None:
    source, taken = str(release), tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.tex").write_text("")
    for arguments, message in [
        ([source, str(taken)], "exists and is not an unfinished conversion; remove it or choose another"),
        ([source, source], "must not be the source, nor"),
        ([str(tmp_path / "absent"), str(tmp_path / "out")], "no folder"),
        ([source, str(tmp_path / "out"), "--max-memory", "lots"], "--max-memory takes a size such as 2GiB"),
        ([source, str(tmp_path / "out"), "--max-memory", "1MB"], "max_memory must be at least"),
        (
            [source, str(tmp_path / "out"), "--quantize", "fp8"],
            "quantize is for writing the Hugging Face layout",
        ),
    ]:
        assert main(["convert", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert (taken / "thesis.tex").exists() and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_thousand_folders_with_mutated_headers_are_opened_or_refused_clearly(release, tmp_path) -> None:
    path = tmp_path / "folder"
    shutil.copytree(release, path)
    whole = (path / SHARD).read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    generator, refused = random.Random(1), 0
    for _ in range(2000):
        mutated = bytearray(whole)
        for _ in range(generator.randint(1, 3)):
            position = generator.randrange(end)
            if generator.random() < 0.2:
                del mutated[position]
            else:
                mutated[position] = generator.choice(b'0123456789"[]{},:-.eEFB_ \\\x00\xff')
        (path / SHARD).write_bytes(mutated)
        faults = HfFolder(path).faults
        refused += bool(faults)
        assert all(SHARD in text for names in faults.values() for text in names)
    assert refused > 1500
    (path / SHARD).write_bytes(whole)
    assert not HfFolder(path).faults
