"""Hugging Face folders: load_config, load_params and write_hf on a small checkpoint as released."""

import json
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from dsa_jax.checkpoint import load_config, load_params, write_hf
from dsa_jax.checkpoint.hf_reader import HfFolder
from dsa_jax.checkpoint.names import leaf_shapes, tensor_table
from dsa_jax.config import Fp8Config, tiny
from tests.vectors.weights import make_weights, write_release_checkpoint

INDEX = "model.safetensors.index.json"
RAGGED = "model.layers.2.self_attn.kv_a_proj_with_mqa.weight"


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> tuple[Path, dict[str, np.ndarray]]:
    path = tmp_path_factory.mktemp("release") / "tiny"
    return path, write_release_checkpoint(path)


@pytest.fixture(scope="module")
def stored(release) -> dict[str, np.ndarray]:
    folder = HfFolder(release[0])
    return {name: np.array(folder.read(name)) for name in folder.entries}


def write_folder(path: Path, tensors: dict[str, np.ndarray], release: Path, **changes: Any) -> Path:
    """One model.safetensors and the release's config.json with changes."""
    path.mkdir()
    save_file({name: np.ascontiguousarray(a) for name, a in tensors.items()}, path / "model.safetensors")
    values = json.loads((release / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(values))
    return path


def get(params: dict[str, Any], path: str) -> np.ndarray:
    node = params["params"]
    for key in path.split("/"):
        node = node[key]
    return np.asarray(node)


def refusal(path: Path, config=None) -> str:
    with pytest.raises(ValueError) as error:
        load_params(path, config or tiny())
    return str(error.value)


def assert_trees_equal(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), left, right)


def test_the_release_is_read_with_its_own_config(release) -> None:
    assert load_config(release[0]) == tiny()
    assert load_config(release[0], dtype="float32").dtype == "float32"


def test_every_leaf_holds_the_dequantised_tensors_transposed_and_stacked(release) -> None:
    path, values = release
    params = load_params(path, tiny())
    for name, row in tensor_table(tiny()).items():
        leaf = get(params, "/".join(row.path))
        expected = values[name].T if row.transpose else values[name]
        np.testing.assert_array_equal(leaf[row.index], expected, err_msg=name)


def test_chosen_leaves_hold_the_tensors_named_here(release) -> None:
    path, values = release
    params = load_params(path, tiny())
    layer = "model.layers.2."
    for leaf, index, name in [
        ("embed", (), "model.embed_tokens.weight"),
        ("dense_layers/attn_norm", (0,), "model.layers.0.input_layernorm.weight"),
        ("moe_layers/ffn_norm", (1,), layer + "post_attention_layernorm.weight"),
        ("dense_layers/ffn/w_up", (0,), "model.layers.0.mlp.up_proj.weight"),
        ("moe_layers/attn/wkv_a", (1,), layer + "self_attn.kv_a_proj_with_mqa.weight"),
        ("moe_layers/attn/indexer/wq_b", (1,), layer + "self_attn.indexer.wq_b.weight"),
        ("moe_layers/attn/indexer/k_norm/bias", (1,), layer + "self_attn.indexer.k_norm.bias"),
        ("moe_layers/ffn/gate_bias", (1,), layer + "mlp.gate.e_score_correction_bias"),
        ("moe_layers/ffn/experts/w_down", (1, 5), layer + "mlp.experts.5.down_proj.weight"),
        ("moe_layers/ffn/shared_experts/w_gate", (1,), layer + "mlp.shared_experts.gate_proj.weight"),
        ("mtp/embed_norm", (), "model.layers.4.enorm.weight"),
        ("mtp/hidden_norm", (), "model.layers.4.hnorm.weight"),
        ("mtp/proj", (), "model.layers.4.eh_proj.weight"),
        ("mtp/norm", (), "model.layers.4.shared_head.norm.weight"),
        ("mtp/layer/ffn/experts/w_gate", (3,), "model.layers.4.mlp.experts.3.gate_proj.weight"),
    ]:
        matrix = values[name] if leaf == "embed" else values[name].T
        np.testing.assert_array_equal(get(params, leaf)[index], matrix, err_msg=leaf)


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_leaves_have_the_shapes_and_dtypes_of_the_tree(release, param_dtype) -> None:
    config = tiny(param_dtype=param_dtype)
    params = load_params(release[0], config)
    found = {
        tuple(key.key for key in keys): leaf
        for keys, leaf in jax.tree_util.tree_flatten_with_path(params["params"])[0]
    }
    assert {path: leaf.shape for path, leaf in found.items()} == leaf_shapes(config)
    float32 = {row.path for row in tensor_table(config).values() if row.float32}
    for path, leaf in found.items():
        assert isinstance(leaf, jax.Array)
        assert leaf.dtype == jnp.dtype("float32" if path in float32 else param_dtype), path


def test_quantised_weights_are_close_to_the_weights_they_came_from(release) -> None:
    params = load_params(release[0], tiny())
    weights = make_weights("tiny")
    for name, row in tensor_table(tiny(n_mtp_layers=0)).items():
        leaf = get(params, "/".join(row.path))[row.index]
        expected = weights[name].T if row.transpose else weights[name]
        assert np.abs(leaf - expected).max() <= 2.0**-4 * np.abs(expected).max(), name


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_an_unsharded_unquantised_checkpoint_is_read(tmp_path, release, dtype) -> None:
    weights = {name: weight.astype(dtype) for name, weight in make_weights("tiny", mtp=True).items()}
    path = write_folder(tmp_path / "plain", weights, release[0], quantization_config=None)
    config = load_config(path)
    assert config == tiny(fp8=None)
    params = load_params(path, config)
    np.testing.assert_array_equal(
        get(params, "moe_layers/attn/wkv_a")[1], weights[RAGGED].astype(np.float32).T
    )


def test_a_stored_mtp_layer_is_left_out_when_the_config_has_none(release, caplog) -> None:
    with caplog.at_level(logging.INFO):
        params = load_params(release[0], tiny(n_mtp_layers=0))
    assert "mtp" not in params["params"]
    assert sum("MTP" in record.message for record in caplog.records) == 1


def test_an_absent_mtp_layer_is_turned_off_unless_it_was_requested(tmp_path, release, caplog) -> None:
    path = write_folder(tmp_path / "no_mtp", make_weights("tiny"), release[0], quantization_config=None)
    config = load_config(path)
    assert config == tiny(n_mtp_layers=0, fp8=None) and "n_mtp_layers is set to 0" in caplog.text
    assert "mtp" not in load_params(path, config)["params"]
    requested = load_config(path, n_mtp_layers=1)
    n_missing = len(tensor_table(requested)) - len(tensor_table(config))
    assert requested.n_mtp_layers == 1
    assert f"{n_missing} tensors missing" in refusal(path, requested)


def test_a_folder_with_config_only_keeps_its_mtp_layer(tmp_path, release) -> None:
    (tmp_path / "config.json").write_bytes((release[0] / "config.json").read_bytes())
    assert load_config(tmp_path) == tiny()


def test_shared_mtp_embeddings_need_no_copies_in_the_checkpoint(tmp_path, release, stored) -> None:
    config = tiny(mtp_shared_embeddings=True)
    with_copies = load_params(release[0], config)
    assert not {"embed", "head"} & set(with_copies["params"]["mtp"])
    without = {
        name: a for name, a in stored.items() if not name.startswith("model.layers.4.shared_head.head")
    }
    del without["model.layers.4.embed_tokens.weight"]
    assert_trees_equal(load_params(write_folder(tmp_path / "f", without, release[0]), config), with_copies)


def test_everything_wrong_is_reported_at_once(tmp_path, release, stored) -> None:
    tensors = {name: array.copy() for name, array in stored.items()}
    del tensors["model.norm.weight"]
    del tensors[RAGGED + "_scale_inv"]
    tensors["model.layers.1.self_attn.o_proj.weight_scale_inv"] = np.ones((1, 1), np.float32)
    tensors["model.layers.1.self_attn.q_a_proj.weight_scale_inv"][0, 0] = np.nan
    tensors["model.layers.1.self_attn.q_b_proj.weight_scale_inv"][0, 0] = -1.0
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:500]
    tensors["model.layers.3.mlp.gate.weight"] = np.zeros((8, 256), np.int32)
    tensors["model.embed_tokens.weight_scale_inv"] = np.ones((4, 2), np.float32)
    tensors["model.layers.9.mystery"] = np.ones(3, np.float32)
    message = refusal(write_folder(tmp_path / "f", tensors, release[0]))
    for words in [
        "1 tensors missing, so their leaves are unfilled: model.norm.weight",
        f"1 FP8 tensors without block scales: {RAGGED} needs {RAGGED}_scale_inv",
        "o_proj.weight_scale_inv [1, 1], expected [2, 1]",
        "2 block scales that are NaN, infinite or negative: model.layers.1.self_attn.q_a_proj.weight_scale",
        "lm_head.weight [500, 256], expected [512, 256]",
        "model.layers.3.mlp.gate.weight I32",
        "model.embed_tokens.weight_scale_inv (model.embed_tokens.weight is BF16)",
        "1 tensors unknown to this config: model.layers.9.mystery",
    ]:
        assert words in message, (words, message)


def test_a_long_list_of_faults_is_counted_not_printed(tmp_path, release, stored) -> None:
    few = {name: stored[name] for name in ("model.norm.weight", "lm_head.weight")}
    message = refusal(write_folder(tmp_path / "f", few, release[0]))
    assert f"{len(tensor_table(tiny())) - 2} tensors missing" in message and "more" in message
    assert len(message) < 2000


def copy_release(path: Path, release: Path) -> Path:
    path.mkdir()
    for file in release.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


def test_a_missing_shard_is_named_once(tmp_path, release) -> None:
    path = copy_release(tmp_path / "f", release[0])
    (path / "model-00002-of-00003.safetensors").unlink()
    message = refusal(path)
    assert "shards missing, download them: model-00002-of-00003.safetensors with 115 tensors" in message
    assert "tensors missing" not in message and "without block scales" not in message


def test_a_truncated_shard_is_named(tmp_path, release) -> None:
    path = copy_release(tmp_path / "f", release[0])
    shard = path / "model-00003-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    message = refusal(path)
    assert "1 unreadable shards" in message and "truncated" in message and shard.name in message


def test_a_tensor_stored_twice_is_named(tmp_path, release, stored) -> None:
    path = copy_release(tmp_path / "f", release[0])
    index = json.loads((path / INDEX).read_text())
    extra = {"model.norm.weight": stored["model.norm.weight"], "x": np.ones(1, np.float32)}
    save_file(extra, path / "extra.safetensors")
    index["weight_map"]["x"] = "extra.safetensors"
    (path / INDEX).write_text(json.dumps(index))
    message = refusal(path)
    assert "tensors stored twice: model.norm.weight in extra.safetensors and model-0000" in message
    assert "unknown to this config: x" in message


def test_an_index_that_disagrees_with_its_shards_is_named(tmp_path, release) -> None:
    path = copy_release(tmp_path / "f", release[0])
    index = json.loads((path / INDEX).read_text())
    home = index["weight_map"]["model.norm.weight"]
    index["weight_map"]["model.norm.weight"] = next(s for s in index["weight_map"].values() if s != home)
    (path / INDEX).write_text(json.dumps(index))
    message = refusal(path)
    assert "tensors not in the shard the index names: model.norm.weight in" in message
    assert f"tensors in another shard than the index names: model.norm.weight in {home}" in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "JSON object"),
        ("{}", "weight_map"),
        ('{"weight_map": {}}', "weight_map"),
        ('{"weight_map": {"a": "../b.safetensors"}}', "not a .safetensors file"),
        ('{"weight_map": {"a": ".."}}', "not a .safetensors file"),
        ('{"weight_map": {"a": 1}}', "not a .safetensors file"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path, release, text, words) -> None:
    (tmp_path / INDEX).write_text(text)
    (tmp_path / "config.json").write_bytes((release[0] / "config.json").read_bytes())
    assert words in refusal(tmp_path) and INDEX in refusal(tmp_path)
    with pytest.raises(ValueError, match=words):
        load_config(tmp_path)


def test_a_folder_without_weights_or_with_two_sets_is_refused(tmp_path, release) -> None:
    assert "neither model.safetensors nor" in refusal(tmp_path)
    path = copy_release(tmp_path / "f", release[0])
    save_file({"x": np.ones(1, np.float32)}, path / "model.safetensors")
    assert "both model.safetensors and" in refusal(path)


def test_a_folder_without_a_config_or_with_a_broken_one_is_refused(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        load_config(tmp_path)


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_written_parameters_are_read_back_bit_for_bit(tmp_path, release, param_dtype) -> None:
    config = tiny(param_dtype=param_dtype, fp8=None)
    params = load_params(release[0], config)
    write_hf(tmp_path / "out", params, config)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert load_config(tmp_path / "out", param_dtype=param_dtype) == config
    assert_trees_equal(load_params(tmp_path / "out", config), params)


def test_release_to_parameters_to_release_gives_the_same_values_and_types(tmp_path, release) -> None:
    params = load_params(release[0], tiny())
    write_hf(tmp_path / "out", params, tiny(), quantize="fp8", max_shard_bytes=2_000_000)
    before, after = HfFolder(release[0]), HfFolder(tmp_path / "out")
    assert set(before.entries) == set(after.entries)
    for name in before.entries:
        assert before.entries[name].dtype == after.entries[name].dtype, name
        if name in tensor_table(tiny()):
            np.testing.assert_array_equal(before.read_weight(name), after.read_weight(name), err_msg=name)
    assert load_config(tmp_path / "out") == tiny()


def test_quantising_without_a_quantised_config_uses_power_of_two_scales(tmp_path, release) -> None:
    write_hf(tmp_path / "out", load_params(release[0], tiny()), tiny(fp8=None), quantize="fp8")
    assert load_config(tmp_path / "out").fp8 == Fp8Config(scale_fmt="ue8m0")
    plain = tiny(fp8=Fp8Config(scale_fmt=None))
    write_hf(tmp_path / "plain", load_params(release[0], plain), plain, quantize="fp8")
    assert load_config(tmp_path / "plain").fp8 == Fp8Config(scale_fmt=None)


def test_shards_stay_below_their_limit_and_the_index_lists_every_tensor(tmp_path, release) -> None:
    params = load_params(release[0], tiny())
    limit = 1_000_000
    write_hf(tmp_path / "out", params, tiny(), max_shard_bytes=limit)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 10 and shards[-1].name.endswith(f"-of-{len(shards):05d}.safetensors")
    assert set(index["weight_map"]) == set(tensor_table(tiny()))
    folder = HfFolder(tmp_path / "out")
    assert index["metadata"]["total_size"] == sum(entry.size for entry in folder.entries.values())
    for shard in shards:
        held = [folder.entries[n].size for n, place in index["weight_map"].items() if place == shard.name]
        assert sum(held) <= limit or len(held) == 1
        assert shard.stat().st_mode == (tmp_path / "out" / "config.json").stat().st_mode


def test_shared_mtp_embeddings_are_written_as_the_copies_the_release_has(tmp_path, release) -> None:
    config = tiny(mtp_shared_embeddings=True)
    write_hf(tmp_path / "out", load_params(release[0], config), config)
    params = load_params(tmp_path / "out", tiny())
    np.testing.assert_array_equal(get(params, "mtp/embed"), get(params, "embed"))
    np.testing.assert_array_equal(get(params, "mtp/head"), get(params, "head"))


def test_an_occupied_destination_is_refused_and_left_alone(tmp_path, release) -> None:
    params = load_params(release[0], tiny())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(ValueError, match="not an empty folder"):
        write_hf(tmp_path / "out", params, tiny())
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["precious"]
    with pytest.raises(ValueError, match="not an empty folder"):
        write_hf(tmp_path / "out" / "precious", params, tiny())
    (tmp_path / "empty").mkdir()
    write_hf(tmp_path / "empty", params, tiny())
    assert load_config(tmp_path / "empty") == tiny(fp8=None)


def test_a_failed_write_leaves_nothing_behind(tmp_path, release) -> None:
    params = load_params(release[0], tiny())
    params["params"]["moe_layers"]["attn"]["wo"] = params["params"]["moe_layers"]["attn"]["wo"] * jnp.nan
    with pytest.raises(ValueError, match="finite"):
        write_hf(tmp_path / "out", params, tiny(), quantize="fp8", max_shard_bytes=100_000)
    assert list(tmp_path.iterdir()) == []


def test_parameters_that_do_not_fit_the_config_are_listed_together(tmp_path, release) -> None:
    params = load_params(release[0], tiny())
    tree = params["params"]
    del tree["norm"]
    tree["extra"] = jnp.zeros(3)
    tree["head"] = tree["head"].T
    tree["embed"] = tree["embed"].astype(jnp.int32)
    with pytest.raises(ValueError) as error:
        write_hf(tmp_path / "out", params, tiny())
    for words in ["norm is missing", "extra is unknown", "head is [512, 256], expected [256, 512]", "int32"]:
        assert words in str(error.value)
    with pytest.raises(ValueError, match='"params": tree'):
        write_hf(tmp_path / "out", tree, tiny())


@pytest.mark.parametrize(("option", "value"), [("quantize", "int8"), ("max_shard_bytes", 0)])
def test_unknown_options_of_the_writer_are_refused(tmp_path, option, value) -> None:
    with pytest.raises(ValueError, match=option):
        write_hf(tmp_path / "out", {"params": {}}, tiny(), **{option: value})
