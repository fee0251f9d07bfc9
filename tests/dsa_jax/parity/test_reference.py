"""transformers as the reference: which of its classes runs a folder, and folders that it saved in another layout."""

import json
from pathlib import Path

import numpy as np
import pytest

from dsa_jax.checkpoint import verify
from dsa_jax.checkpoint.hf_reader import HfFolder
from dsa_jax.commands.cli import main
from dsa_jax.parity.compare import compare, run_ours
from dsa_jax.parity.reference import CLASSES, class_of, transformers_reference
from tests.dsa_jax.parity.test_compare import (
    DEFAULT,
    load_float32,
    needs_torch,
    random_tokens,
    write_random_model,
)

pytestmark = [needs_torch, pytest.mark.parity]
SMALL = dict(num_hidden_layers=3, first_k_dense_replace=1, rope_parameters=DEFAULT, index_topk=16)


def set_type(folder: Path, model_type: str) -> None:
    values = json.loads((folder / "config.json").read_text()) | {"model_type": model_type}
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("model_type", CLASSES)
def test_the_class_follows_model_type(tmp_path, model_type):
    """Each type agrees with its own class and not with the other one, which rotates the indexer otherwise."""
    write_random_model(tmp_path, 3, model_type=model_type, **SMALL)
    tokens = random_tokens(3, 64)
    params, config = load_float32(tmp_path)
    assert config.index_rope_interleaved is (model_type == "glm_moe_dsa")
    ours = run_ours(params, config, tokens)
    reference = transformers_reference(tmp_path, tokens)
    report = compare(ours, reference)
    assert report.failures == () and report.top1 == 1.0 and len(report.layers) == 3
    assert np.abs(ours["logits"] - reference["logits"]).max() < 5e-5
    assert all(f"layer{i}.{kind}" in reference for i in range(3) for kind in ("index_scores", "topk"))

    (other,) = set(CLASSES) - {model_type}
    set_type(tmp_path, other)
    assert np.abs(ours["logits"] - transformers_reference(tmp_path, tokens)["logits"]).max() > 0.1


def test_the_command_compares_a_glm_folder_with_its_own_class(tmp_path, capsys):
    write_random_model(tmp_path, 0, model_type="glm_moe_dsa", **SMALL)
    assert main(["compare", "--model", str(tmp_path), "--reference", "transformers", "--seq-len", "48"]) == 0
    assert "within tolerance" in capsys.readouterr().out


@pytest.mark.parametrize("model_type", ["deepseek_v3", None, "", 3])
def test_a_model_type_without_a_class_is_one_sentence(model_type):
    with pytest.raises(ValueError, match="model_type must be deepseek_v32 or glm_moe_dsa to compare with"):
        class_of({"model_type": model_type}, "Config")


def test_a_transformers_that_is_too_old_is_named(monkeypatch):
    monkeypatch.setitem(CLASSES, "glm_moe_dsa", "GlmMoeDsaTwo")
    with pytest.raises(
        ValueError, match=r"transformers \S+ has no GlmMoeDsaTwoConfig .* install a newer one"
    ):
        class_of({"model_type": "glm_moe_dsa"}, "Config")


def test_a_folder_that_is_not_hugging_faces_is_refused(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="has no config.json, and transformers reads .*dsa-jax convert"
    ):
        transformers_reference(tmp_path, random_tokens(0, 8))


@pytest.mark.parametrize("model_type", CLASSES)
def test_experts_that_transformers_stacked_are_read(tmp_path, model_type):
    """What save_pretrained(save_original_format=False) writes holds the same model as what it writes by default."""
    write_random_model(tmp_path / "released", 1, model_type=model_type, **SMALL)
    write_random_model(
        tmp_path / "stacked", 1, model_type=model_type, save={"save_original_format": False}, **SMALL
    )
    raw = (tmp_path / "stacked" / "model.safetensors").read_bytes()
    assert b"mlp.experts.gate_up_proj" in raw and b"mlp.experts.0." not in raw
    released, stacked = HfFolder(tmp_path / "released"), HfFolder(tmp_path / "stacked")
    assert set(stacked.entries) == set(released.entries) and not stacked.faults
    for name in released.entries:
        np.testing.assert_array_equal(stacked.read(name), released.read(name))
    assert verify(tmp_path / "stacked").faults == ()
    tokens = random_tokens(1, 64)
    report = compare(
        run_ours(*load_float32(tmp_path / "stacked"), tokens),
        transformers_reference(tmp_path / "stacked", tokens),
    )
    assert report.failures == ()
