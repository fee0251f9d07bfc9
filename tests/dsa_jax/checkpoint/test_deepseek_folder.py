"""DeepSeek's converted files, and dense checkpoints that get an indexer: both load as the parameters they stand for."""

import functools
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from dsa_jax.checkpoint import convert, load_config, load_params
from dsa_jax.checkpoint.deepseek_folder import DeepSeekFolder, deepseek_name
from dsa_jax.checkpoint.hf_reader import HfFolder
from dsa_jax.config import tiny
from tests.vectors.weights import write_release_checkpoint

RANKS = 2
wide = functools.partial(tiny, n_heads=8, v_head_dim=64, d_expert=256)
# Written out from DeepSeek's converter, not taken from our table: name in its files -> axis it splits.
SPLIT = {"embed": 0, "attn.wq_b": 0, "attn.wkv_b": 0, "attn.wo": 1, "ffn.w1": 0, "ffn.w3": 0, "ffn.w2": 1,
         "ffn.shared_experts.w1": 0, "ffn.shared_experts.w3": 0, "ffn.shared_experts.w2": 1, "head": 0}  # fmt: skip
RENAMED = [
    ("model.", ""), ("self_attn", "attn"), ("mlp", "ffn"), ("weight_scale_inv", "scale"),
    ("e_score_correction_bias", "bias"), ("embed_tokens", "embed"), ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"), ("q_a_proj", "wq_a"), ("q_a_layernorm", "q_norm"),
    ("q_b_proj", "wq_b"), ("kv_a_proj_with_mqa", "wkv_a"), ("kv_a_layernorm", "kv_norm"),
    ("kv_b_proj", "wkv_b"), ("o_proj", "wo"), ("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"),
    ("lm_head", "head"),
]  # fmt: skip


def convert_as_deepseek(release: Path, path: Path) -> dict[str, np.ndarray]:
    """Every released tensor except the MTP layer's, under its new name, split into files of RANKS ranks."""
    folder = HfFolder(release)
    ranks: list[dict[str, np.ndarray]] = [{} for _ in range(RANKS)]
    whole = {}
    for name in folder.entries:
        if name.startswith("model.layers.4."):
            continue
        new = name
        for old, short in RENAMED:
            new = new.replace(old, short)
        whole[new] = array = np.array(folder.read(name))
        module = ".".join(part for part in new.split(".")[:-1] if part != "layers" and not part.isdigit())
        for rank in range(RANKS):
            if ".experts." in new:
                if int(new.split(".")[4]) // (8 // RANKS) == rank:
                    ranks[rank][new] = array
            elif module in SPLIT:
                parts = np.split(array, RANKS, axis=SPLIT[module])
                ranks[rank][new] = np.ascontiguousarray(parts[rank])
            else:
                ranks[rank][new] = array
    path.mkdir()
    for rank, tensors in enumerate(ranks):
        save_file(tensors, path / f"model{rank}-mp{RANKS}.safetensors")
    return whole


CONFIG = {
    "vocab_size": 512, "dim": 256, "inter_dim": 512, "moe_inter_dim": 256, "n_layers": 4, "n_dense_layers": 1,
    "n_heads": 8, "n_routed_experts": 8, "n_shared_experts": 1, "n_activated_experts": 3,
    "n_expert_groups": 4, "n_limited_groups": 2, "route_scale": 2.5, "score_func": "sigmoid",
    "q_lora_rank": 128, "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64,
    "index_n_heads": 32, "index_head_dim": 128, "index_topk": 16, "dtype": "fp8", "scale_fmt": "ue8m0",
}  # fmt: skip


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    """The small model with every split size a multiple of a block, as in the released model."""
    path = tmp_path_factory.mktemp("release") / "fp8"
    write_release_checkpoint(path, "tiny_two_ranks")
    return path


@pytest.fixture(scope="module")
def converted(release, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("deepseek") / "mp2"
    convert_as_deepseek(release, path)
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def assert_same(left, right) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), left, right)


@pytest.mark.parametrize(
    ("released", "stored", "axis"),
    [
        ("model.layers.3.self_attn.q_b_proj.weight", "layers.3.attn.wq_b.weight", 0),
        ("model.layers.3.self_attn.indexer.wq_b.weight", "layers.3.attn.indexer.wq_b.weight", None),
        ("model.layers.3.self_attn.indexer.wk.weight_scale_inv", "layers.3.attn.indexer.wk.scale", None),
        ("model.layers.3.self_attn.indexer.k_norm.bias", "layers.3.attn.indexer.k_norm.bias", None),
        ("model.layers.3.mlp.gate.e_score_correction_bias", "layers.3.ffn.gate.bias", None),
        ("model.layers.3.mlp.experts.7.down_proj.weight_scale_inv", "layers.3.ffn.experts.7.w2.scale", None),
        ("model.layers.3.mlp.shared_experts.down_proj.weight", "layers.3.ffn.shared_experts.w2.weight", 1),
        ("model.embed_tokens.weight", "embed.weight", 0),
        ("model.norm.weight", "norm.weight", None),
        ("lm_head.weight", "head.weight", 0),
    ],
)
def test_names_and_split_axes_are_those_of_the_converter(released, stored, axis) -> None:
    assert deepseek_name(released) == (stored, axis)


def test_converted_files_hold_the_parameters_of_the_release(release, converted, tmp_path) -> None:
    config = load_config(converted)
    assert config == wide(n_mtp_layers=0)
    expected = load_params(release, config)
    assert_same(load_params(converted, config), expected)
    convert(converted, tmp_path / "orbax")
    assert_same(load_params(tmp_path / "orbax", load_config(tmp_path / "orbax")), expected)
    convert(tmp_path / "orbax", tmp_path / "hf")
    before, after = HfFolder(release), HfFolder(tmp_path / "hf")
    assert set(after.entries) == {name for name in before.entries if not name.startswith("model.layers.4.")}
    for name in after.entries:
        assert after.read(name).tobytes() == before.read(name).tobytes(), name


def test_rows_and_columns_across_ranks_are_joined(release, converted) -> None:
    folder, whole = DeepSeekFolder(converted, wide(n_mtp_layers=0)), HfFolder(release)
    for name in ("model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.down_proj.weight"):
        rows = folder.read_rows(name, 100, 250, slice(30, 200)).astype(np.float32)
        np.testing.assert_array_equal(rows, whole.read(name)[100:250, 30:200].astype(np.float32))


def test_a_missing_rank_is_named_once(converted, tmp_path) -> None:
    shutil.copytree(converted, tmp_path / "cut")
    (tmp_path / "cut" / "model1-mp2.safetensors").unlink()
    with pytest.raises(ValueError, match="1 shards missing, download them: model1-mp2.safetensors") as error:
        load_params(tmp_path / "cut", wide(n_mtp_layers=0))
    assert "tensors missing" not in str(error.value)
    shutil.copy(converted / "model1-mp2.safetensors", tmp_path / "cut" / "model1-mp4.safetensors")
    with pytest.raises(ValueError, match="mixes files of several conversions"):
        load_params(tmp_path / "cut", wide(n_mtp_layers=0))


def test_a_config_with_unknown_or_missing_keys_is_refused(converted, tmp_path) -> None:
    for change, message in (
        ({"mystery": 1}, "does not know: mystery"),
        ({"score_func": "softmax"}, "score_func"),
    ):
        (tmp_path / "c.json").write_text(json.dumps(CONFIG | change))
        with pytest.raises(ValueError, match=message):
            load_config(converted, config_file=tmp_path / "c.json")
    (tmp_path / "c.json").write_text(json.dumps({"dim": 256}))
    with pytest.raises(ValueError, match="lacks the keys index_head_dim"):
        load_config(converted, config_file=tmp_path / "c.json")


@pytest.fixture(scope="module")
def dense(release, tmp_path_factory) -> Path:
    """The release as V3.1 would be: no indexer anywhere, another model_type."""
    path = tmp_path_factory.mktemp("dense") / "v31"
    path.mkdir()
    folder = HfFolder(release)
    tensors = {name: np.array(folder.read(name)) for name in folder.entries if ".indexer." not in name}
    save_file(tensors, path / "model.safetensors")
    values = json.loads((release / "config.json").read_text())
    values |= {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}
    values = {key: value for key, value in values.items() if not key.startswith("index_")}
    (path / "config.json").write_text(json.dumps(values | {"index_n_heads": 32, "index_topk": 16}))
    return path


def test_a_dense_checkpoint_gets_fresh_indexers_and_keeps_the_rest(release, dense, tmp_path) -> None:
    with pytest.raises(ValueError, match="deepseek_v3"):
        convert(dense, tmp_path / "refused")
    outcome = convert(dense, tmp_path / "orbax", add_indexer=True)
    assert len(outcome.added) == 5 * 5
    config = load_config(tmp_path / "orbax")
    assert config == wide()
    ours, theirs = load_params(tmp_path / "orbax", config)["params"], load_params(release, config)["params"]
    for part in ("dense_layers", "moe_layers"):
        indexer, _ = ours[part]["attn"].pop("indexer"), theirs[part]["attn"].pop("indexer")
        assert np.all(np.asarray(indexer["k_norm"]["scale"]) == 1) and not np.any(indexer["k_norm"]["bias"])
        wk = np.asarray(indexer["wk"])
        assert abs(wk.std() - config.init_std) < 0.1 * config.init_std and abs(wk.mean()) < 1e-3
    ours["mtp"]["layer"]["attn"].pop("indexer"), theirs["mtp"]["layer"]["attn"].pop("indexer")
    assert_same(ours, theirs)
    convert(dense, tmp_path / "again", add_indexer=True)
    assert_same(load_params(tmp_path / "again", config), load_params(tmp_path / "orbax", config))


def test_a_checkpoint_that_has_indexers_gets_no_others(release, tmp_path) -> None:
    with pytest.raises(ValueError, match="already has .* indexer tensors .* without --add-indexer"):
        convert(release, tmp_path / "out", add_indexer=True)


def test_unknown_keys_of_a_config_in_hugging_faces_spelling_can_be_accepted(
    release, converted, tmp_path
) -> None:
    values = json.loads((release / "config.json").read_text()) | {"sliding_window": 128}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"{tmp_path / 'config.json'}: .*pass --ignore sliding_window"):
        load_config(converted, config_file=tmp_path / "config.json")
    accepted = load_config(converted, config_file=tmp_path / "config.json", ignore=("sliding_window",))
    assert accepted == load_config(converted, config_file=release / "config.json")
