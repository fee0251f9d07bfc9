"""A router stored in float32, as transformers 5.24 saves it, keeps its type and bits through `convert`."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from dsa_jax.checkpoint import convert, load_config, load_params, write_hf
from dsa_jax.checkpoint.hf_reader import HfFolder
from tests.vectors.weights import make_tokens, make_weights

GATE = ".mlp.gate.weight"
FLOAT32 = ("e_score_correction_bias", "indexer.k_norm.weight", "indexer.k_norm.bias")


def saved(path: Path, release: Path, float32_gates) -> Path:
    """A bfloat16 folder in which the named gates are float32, with bits that bfloat16 cannot hold."""
    path.mkdir()
    weights = {}
    for name, weight in make_weights("tiny", mtp=True).items():
        if name in float32_gates:
            weights[name] = np.nextafter(weight, np.float32(np.inf))
            assert (weights[name] != weights[name].astype(ml_dtypes.bfloat16).astype(np.float32)).any()
        else:
            weights[name] = weight if name.endswith(FLOAT32) else weight.astype(ml_dtypes.bfloat16)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((release / "config.json").read_text()) | {"quantization_config": None}
    (path / "config.json").write_text(json.dumps(values))
    return path


def tensors_of(path: Path) -> dict[str, tuple[str, bytes]]:
    folder = HfFolder(path)
    return {name: (entry.dtype, folder.read(name).tobytes()) for name, entry in folder.entries.items()}


GATES = [name for name in make_weights("tiny", mtp=True) if name.endswith(GATE)]


@pytest.mark.parametrize("gates", [GATES, GATES[:1]], ids=["every gate", "the gate of one layer"])
def test_float32_gates_come_back_with_type_and_bits(gates, release, tmp_path):
    source = saved(tmp_path / "source", release, gates)
    convert(source, tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "hf")
    expected = tensors_of(source)
    assert {name for name in GATES if expected[name][0] == "F32"} == set(gates)
    assert tensors_of(tmp_path / "hf") == expected


def test_float32_gates_stay_so_when_the_rest_is_quantised(release, tmp_path):
    source = saved(tmp_path / "source", release, GATES)
    convert(source, tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "hf", quantize="fp8")
    expected, found = tensors_of(source), tensors_of(tmp_path / "hf")
    assert {name: found[name] for name in GATES} == {name: expected[name] for name in GATES}


def test_float32_gates_are_loaded_and_written_without_rounding(release, tmp_path):
    source = saved(tmp_path / "source", release, GATES)
    config = load_config(source)
    write_hf(tmp_path / "hf", load_params(source, config), config)
    expected, found = tensors_of(source), tensors_of(tmp_path / "hf")
    assert {name: found[name] for name in GATES} == {name: expected[name] for name in GATES}


@pytest.mark.parity
def test_a_folder_saved_by_transformers_comes_back_with_its_float32_gates(release, tmp_path):
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'dsa-jax[parity]'")
    transformers = pytest.importorskip(
        "transformers", reason="needs transformers: pip install 'dsa-jax[parity]'"
    )
    source = saved(tmp_path / "source", release, GATES)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "transformers")
    expected = tensors_of(tmp_path / "transformers")
    gates = [name for name in GATES if name in expected]  # transformers has no MTP layer
    assert gates and {expected[name][0] for name in gates} == {"F32"}

    convert(tmp_path / "transformers", tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "hf")
    assert tensors_of(tmp_path / "hf") == expected
    logits = []
    for path in (tmp_path / "transformers", tmp_path / "hf"):
        again = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        with torch.no_grad():
            logits.append(again(torch.tensor(make_tokens("tiny"))).logits)
    assert torch.equal(*logits)
