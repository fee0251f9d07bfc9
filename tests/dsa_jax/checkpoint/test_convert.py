"""Round trips through `convert`: nothing is lost, in either direction, sharded or not, interrupted or not."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import save_file

from dsa_jax.checkpoint import convert, load_config, load_params, verify, write_hf
from dsa_jax.checkpoint.hf_reader import HfFolder
from dsa_jax.checkpoint.names import tensor_table
from dsa_jax.config import tiny
from dsa_jax.fp8.weight import Fp8Weight
from tests.vectors.weights import make_tokens, make_weights, write_release_checkpoint

FLOAT32_NAMES = ("e_score_correction_bias", "indexer.k_norm.weight", "indexer.k_norm.bias")


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("release") / "fp8"
    write_release_checkpoint(path)
    (path / "tokenizer.json").write_text('{"version": "1.0"}')
    (path / "tokenizer_config.json").write_text("{}")
    return path


@pytest.fixture(scope="module")
def plain(release, tmp_path_factory) -> Path:
    """The same model in bfloat16, as transformers or a fine-tuning run would save it."""
    path = tmp_path_factory.mktemp("plain") / "bf16"
    path.mkdir()
    weights = {
        name: weight if name.endswith(FLOAT32_NAMES) else weight.astype(ml_dtypes.bfloat16)
        for name, weight in make_weights("tiny", mtp=True).items()
    }
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((release / "config.json").read_text()) | {"quantization_config": None}
    (path / "config.json").write_text(json.dumps(values))
    return path


@pytest.fixture(scope="module")
def kept(release, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("kept") / "orbax"
    convert(release, path)
    return path


def tensors_of(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    folder = HfFolder(path)
    return {name: (e.dtype, e.shape, folder.read(name).tobytes()) for name, e in folder.entries.items()}


def assert_trees_equal(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)

    def compare(a: Any, b: Any) -> None:
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()

    jax.tree.map(compare, left, right)


def test_bfloat16_to_orbax_and_back_keeps_every_bit(plain, tmp_path) -> None:
    convert(plain, tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "hf", max_shard_bytes=1_000_000)
    assert tensors_of(tmp_path / "hf") == tensors_of(plain)
    assert load_config(tmp_path / "hf") == load_config(plain)


def test_the_release_to_orbax_and_back_keeps_values_and_scales(release, kept, tmp_path) -> None:
    convert(kept, tmp_path / "hf", max_shard_bytes=1_000_000)
    assert tensors_of(tmp_path / "hf") == tensors_of(release)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "hf" / file).read_bytes() == (release / file).read_bytes()
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == json.loads(
        (release / "config.json").read_text()
    )


def test_orbax_itself_restores_what_was_written(release, kept) -> None:
    restored = ocp.StandardCheckpointer().restore(kept)
    expected = load_params(release, tiny(param_dtype="bfloat16"), keep_fp8=True)

    def as_dict(leaf: Any) -> Any:
        return {"values": leaf.values, "scales": leaf.scales} if isinstance(leaf, Fp8Weight) else leaf

    expected = jax.tree.map(as_dict, expected, is_leaf=lambda leaf: isinstance(leaf, Fp8Weight))
    assert_trees_equal(jax.tree.map(np.asarray, expected), restored)


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_orbax_and_hugging_face_load_the_same_parameters(release, kept, param_dtype) -> None:
    config = load_config(kept, param_dtype=param_dtype)
    assert config == load_config(release, param_dtype=param_dtype)
    assert_trees_equal(load_params(kept, config), load_params(release, config))


def test_dequantised_and_quantised_again_the_values_are_the_same(release, tmp_path) -> None:
    """So are the scales, except in blocks whose largest value was rounded down to a power of two times 224."""
    convert(release, tmp_path / "orbax", dtype="bfloat16")
    convert(tmp_path / "orbax", tmp_path / "hf", quantize="fp8")
    before, after = HfFolder(release), HfFolder(tmp_path / "hf")
    assert set(before.entries) == set(after.entries)
    n_blocks = n_halved = 0
    for name in tensor_table(tiny()):
        assert before.entries[name].dtype == after.entries[name].dtype
        np.testing.assert_array_equal(before.read_weight(name), after.read_weight(name), err_msg=name)
        if name + "_scale_inv" in before.entries:
            ratio = after.read(name + "_scale_inv") / before.read(name + "_scale_inv")
            values = np.abs(before.read(name).astype(np.float32))
            for (i, j), factor in np.ndenumerate(ratio):
                largest = values[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)].max()
                assert factor == (0.5 if largest == 224 else 1.0), (name, largest)
                n_blocks, n_halved = n_blocks + 1, n_halved + (factor == 0.5)
    assert 0 <= n_halved < n_blocks / 10


def test_bfloat16_quantised_on_export_is_what_write_hf_writes(plain, tmp_path) -> None:
    convert(plain, tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "hf", quantize="fp8")
    write_hf(tmp_path / "direct", load_params(plain, tiny()), tiny(), quantize="fp8")
    assert tensors_of(tmp_path / "hf") == tensors_of(tmp_path / "direct")
    shard = "model.safetensors"  # the order of the tensors is the same, too
    assert (tmp_path / "hf" / shard).read_bytes() == (tmp_path / "direct" / shard).read_bytes()
    assert load_config(tmp_path / "hf") == tiny()


def test_a_checkpoint_saved_by_orbax_itself_is_exported(plain, tmp_path) -> None:
    """A training run's checkpoint has none of our metadata, so config.json is given."""
    params = load_params(plain, tiny(fp8=None))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "trained", params)
    with pytest.raises(ValueError, match="its config is unknown"):
        convert(tmp_path / "trained", tmp_path / "hf")
    convert(tmp_path / "trained", tmp_path / "hf", config_file=plain / "config.json", dtype="bfloat16")
    assert tensors_of(tmp_path / "hf") == tensors_of(plain)


def test_pieces_of_tensors_are_put_together_again(release, plain, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("dsa_jax.checkpoint.pieces.PIECE_BYTES", 40_000)
    monkeypatch.setattr("dsa_jax.checkpoint.conversion._LARGEST_BATCH", 200_000)
    for source in (release, plain):
        convert(source, tmp_path / source.name)
        assert verify(tmp_path / source.name).faults == ()
        convert(tmp_path / source.name, tmp_path / f"{source.name}-hf")
        assert tensors_of(tmp_path / f"{source.name}-hf") == tensors_of(source)
    params = load_params(tmp_path / "fp8", tiny())
    assert_trees_equal(params, load_params(release, tiny()))


def test_the_destination_must_be_free(release, kept, tmp_path) -> None:
    with pytest.raises(ValueError, match="exists and is not an unfinished conversion"):
        convert(release, kept)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="exists and is not"):
        convert(release, tmp_path / "file")
    with pytest.raises(ValueError, match="must not be the source"):
        convert(release, release / "inside")


def test_every_fault_of_the_source_is_found_before_anything_is_written(release, tmp_path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(release, damaged)
    (damaged / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match="shards missing"):
        convert(damaged, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parity
def test_transformers_computes_the_same_after_the_round_trip(plain, tmp_path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    convert(plain, tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "hf", max_shard_bytes=1_000_000)
    tokens = torch.tensor(make_tokens("tiny"))
    logits = []
    for path in (plain, tmp_path / "hf"):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True
        )
        assert not info["missing_keys"] and not info["mismatched_keys"]
        with torch.no_grad():
            logits.append(model(tokens).logits)
    assert torch.equal(*logits)
