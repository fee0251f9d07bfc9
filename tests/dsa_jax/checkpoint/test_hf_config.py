"""config.json: all spellings of a model give the same config, and nothing is silently dropped."""

import json
from typing import Any

import pytest

from dsa_jax.checkpoint import from_hf, to_hf
from dsa_jax.config import Fp8Config, YarnConfig, deepseek_v32, glm5, tiny
from tests.vectors.weights import CONFIGS

PRESETS = [deepseek_v32, glm5, tiny]


def released(**changes: Any) -> dict[str, Any]:
    values = json.loads(json.dumps(CONFIGS["tiny"])) | changes
    return {key: value for key, value in values.items() if value != "absent"}


def as_transformers_writes(**changes: Any) -> dict[str, Any]:
    """The spelling of transformers' save_pretrained."""
    values = released(
        rope_theta="absent",
        rope_scaling="absent",
        torch_dtype="absent",
        rope_parameters=dict(CONFIGS["tiny"]["rope_scaling"], rope_type="yarn", rope_theta=10000.0),
        dtype="float32",
        head_dim=32,
        qk_head_dim=96,
        mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
        layer_types=["indexed_attention"] * 4,
        mlp_bias=False,
        output_router_logits=False,
        pad_token_id=None,
    )
    return values | changes


@pytest.mark.parametrize("preset", PRESETS)
def test_reading_what_was_written_gives_the_same_config(preset) -> None:
    assert from_hf(json.loads(json.dumps(to_hf(preset())))) == preset()


@pytest.mark.parametrize(
    "changes",
    [
        dict(yarn=None),
        dict(fp8=None),
        dict(fp8=Fp8Config(scale_fmt=None)),
        dict(n_mtp_layers=0),
        dict(eos_token_ids=()),
        dict(eos_token_ids=(1, 5), pad_token_id=2, bos_token_id=None),
        dict(norm_eps=1e-5, norm_topk_prob=False, init_std=0.006),
        dict(yarn=YarnConfig(factor=4.0, original_seq_len=32, mscale=0.7, mscale_all_dim=0.7)),
        dict(index_rope_interleaved=True),
    ],
)
def test_a_changed_field_survives_the_round_trip(changes) -> None:
    assert from_hf(to_hf(tiny(**changes))) == tiny(**changes)


def test_the_released_spelling_is_read_and_written() -> None:
    assert from_hf(released()) == tiny()
    written = to_hf(tiny())
    for key, value in CONFIGS["tiny"].items():
        if key not in ("ep_size", "transformers_version"):
            assert written[key] == value, key


def test_old_and_new_spellings_give_the_same_config() -> None:
    assert from_hf(as_transformers_writes()) == tiny()
    yarn = CONFIGS["tiny"]["rope_scaling"]
    renamed = {"rope_type" if key == "type" else key: value for key, value in yarn.items()}
    assert from_hf(released(rope_scaling=renamed)) == tiny()
    assert from_hf(released(rope_scaling=dict(renamed, type="yarn"))) == tiny()


def test_a_default_rope_is_not_yarn() -> None:
    for values in (
        released(rope_scaling=None),
        released(rope_scaling="absent"),
        released(rope_scaling={"type": "default"}),
        as_transformers_writes(rope_parameters={"rope_type": "default", "rope_theta": 10000}),
        as_transformers_writes(rope_parameters={"rope_theta": 10000, "partial_rotary_factor": 1.0}),
    ):
        assert from_hf(values) == tiny(yarn=None)


@pytest.mark.parametrize(
    ("keys", "fields"),
    [
        ({}, dict(mscale=0.0, mscale_all_dim=0.0)),
        (dict(mscale=None, mscale_all_dim=None), dict(mscale=0.0, mscale_all_dim=0.0)),
        (dict(mscale=0.7), dict(mscale=0.7, mscale_all_dim=0.0)),
        (dict(mscale_all_dim=0.7), dict(mscale=0.0, mscale_all_dim=0.7)),
        (dict(attention_factor=1.25), dict(mscale=0.0, mscale_all_dim=0.0, attention_factor=1.25)),
        (dict(beta_fast=None, beta_slow=2), dict(mscale=0.0, mscale_all_dim=0.0, beta_slow=2.0)),
    ],
)
def test_absent_yarn_keys_are_read_and_stay_absent(keys, fields) -> None:
    rope = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 32, **keys}
    config = from_hf(released(rope_scaling=rope))
    assert config.yarn == YarnConfig(factor=4.0, original_seq_len=32, **fields)
    betas = {"beta_fast": 32.0, "beta_slow": 1.0}
    present = {key: value for key, value in rope.items() if value is not None}
    assert to_hf(config)["rope_scaling"] == betas | present
    assert from_hf(to_hf(config)) == config


@pytest.mark.parametrize(
    "changes",
    [
        dict(layer_types=["deepseek_sparse_attention"] * 4),
        dict(layer_types=["indexed_attention"] * 4),
        dict(moe_router_dtype="float32"),
        dict(partial_rotary_factor=1.0),
        dict(dsa_jax_ignore=["sliding_window"], sliding_window=128),
    ],
)
def test_keys_that_state_what_is_computed_anyway_are_accepted(changes) -> None:
    assert from_hf(released(**changes)) == tiny()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("moe_router_dtype", "bfloat16"),
        ("partial_rotary_factor", 0.5),
        ("layer_types", ["indexed_attention", "deepseek_sparse_attention"] * 2),
        ("layer_types", ["deepseek_sparse_attention"] * 3),
        ("dsa_jax_ignore", "sliding_window"),
    ],
)
def test_the_same_keys_with_another_meaning_are_named(key, value) -> None:
    with pytest.raises(ValueError, match=key):
        from_hf(released(**{key: value}))


def test_transformers_keys_of_fp8_are_read() -> None:
    keys = dict(
        dequantize=False, expert_dtype="fp8", modules_to_convert=None, modules_to_not_convert=["lm_head"]
    )
    quantization = CONFIGS["tiny"]["quantization_config"] | keys
    assert from_hf(released(quantization_config=quantization)) == tiny()
    values = released(quantization_config=quantization | {"scale_fmt": "float"})
    assert from_hf(values) == tiny(fp8=Fp8Config(scale_fmt=None))


@pytest.mark.parametrize("alias", ["num_experts", "num_local_experts"])
def test_aliases_of_the_number_of_experts(alias) -> None:
    assert from_hf(released(n_routed_experts="absent", **{alias: 8})) == tiny()
    with pytest.raises(ValueError, match=f"{alias} must equal n_routed_experts, got 16 and 8"):
        from_hf(released(**{alias: 16}))


def test_dense_layers_can_come_from_the_layer_types() -> None:
    values = as_transformers_writes()
    del values["first_k_dense_replace"]
    assert from_hf(values) == tiny()


def test_eos_is_an_integer_a_list_or_absent() -> None:
    assert from_hf(released(eos_token_id=[1, 7])).eos_token_ids == (1, 7)
    assert from_hf(released(eos_token_id=7)).eos_token_ids == (7,)
    assert from_hf(released(eos_token_id="absent")).eos_token_ids == ()


def test_the_indexer_rope_follows_the_model_type_unless_stated() -> None:
    assert not from_hf(released()).index_rope_interleaved
    assert from_hf(released(model_type="glm_moe_dsa")).index_rope_interleaved
    assert from_hf(released(indexer_rope_interleave=True)).index_rope_interleaved
    assert not from_hf(
        released(model_type="glm_moe_dsa", indexer_rope_interleave=False)
    ).index_rope_interleaved


def test_no_key_of_mtp_layers_means_none() -> None:
    assert from_hf(released(num_nextn_predict_layers="absent")) == tiny(n_mtp_layers=0)


def test_glm_without_index_sharing_is_read() -> None:
    sharing = dict(index_topk_freq=1, index_skip_topk_offset=2, indexer_types=["full"] * 4)
    assert from_hf(released(model_type="glm_moe_dsa", **sharing)) == tiny(index_rope_interleaved=True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention_bias", True),
        ("attention_dropout", 0.1),
        ("mlp_bias", True),
        ("scoring_func", "softmax"),
        ("topk_method", "greedy"),
        ("hidden_act", "gelu"),
        ("tie_word_embeddings", True),
        ("moe_layer_freq", 2),
        ("rope_interleave", False),
        ("num_key_value_heads", 2),
        ("head_dim", 96),
        ("qk_head_dim", 64),
        ("layer_types", ["full_attention"] * 4),
        ("layer_types", ["indexed_attention"] * 3),
        ("mlp_layer_types", ["sparse", "dense", "sparse", "sparse"]),
        ("mlp_layer_types", ["dense", "sparse"]),
        ("model_type", "deepseek_v3"),
        ("hidden_size", 256.0),
        ("hidden_size", "256"),
        ("rms_norm_eps", "1e-6"),
        ("q_lora_rank", True),
        ("norm_topk_prob", "yes"),
        ("indexer_rope_interleave", 1),
        ("rope_scaling", "yarn"),
        ("quantization_config", "fp8"),
    ],
)
def test_what_the_model_does_not_support_is_named(key, value) -> None:
    with pytest.raises(ValueError) as error:
        from_hf(released(**{key: value}))
    assert key in str(error.value) and repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(type="linear"), ["rope type", "linear"]),
        (dict(rope_type="llama3"), ["rope type", "llama3", "yarn"]),
        (dict(attention_factor=0.0), ["attention_factor", "positive", "0.0"]),
        (dict(attention_factor="1.2"), ["attention_factor", "'1.2'"]),
        (dict(partial_rotary_factor=0.5), ["partial_rotary_factor"]),
        (dict(truncate=False), ["truncate"]),
        (dict(short_factor=[1.0]), ["short_factor"]),
        (dict(factor=None), ["factor"]),
        (dict(mscale="1"), ["mscale", "'1'"]),
    ],
)
def test_an_unsupported_rope_is_named(change, words) -> None:
    with pytest.raises(ValueError) as error:
        from_hf(released(rope_scaling=CONFIGS["tiny"]["rope_scaling"] | change))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_two_ropes_must_agree() -> None:
    with pytest.raises(ValueError, match="contradict"):
        from_hf(as_transformers_writes(rope_scaling={"type": "yarn", "factor": 2.0}))
    with pytest.raises(ValueError, match=r"rope_theta must equal.*5000.*10000"):
        from_hf(as_transformers_writes(rope_theta=5000))
    both = as_transformers_writes()
    assert from_hf(both | {"rope_scaling": CONFIGS["tiny"]["rope_scaling"]}) == tiny()  # type and rope_type
    with pytest.raises(ValueError, match="default takes no factor"):
        from_hf(released(rope_scaling={"type": "default", "factor": 4.0}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(weight_block_size=[64, 64]), ["weight_block_size", "[64, 64]"]),
        (dict(weight_block_size=None), ["weight_block_size", "None"]),
        (dict(quant_method="awq"), ["quant_method", "awq"]),
        (dict(fmt="e5m2"), ["fmt", "e5m2"]),
        (dict(activation_scheme="static"), ["activation_scheme", "static"]),
        (dict(scale_fmt="e4m3"), ["scale_fmt", "e4m3"]),
        (dict(expert_dtype="fp4"), ["expert_dtype", "fp4"]),
        (dict(bits=4), ["bits"]),
    ],
)
def test_an_unsupported_quantisation_is_named(change, words) -> None:
    with pytest.raises(ValueError) as error:
        from_hf(released(quantization_config=CONFIGS["tiny"]["quantization_config"] | change))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_unknown_keys_are_listed_together_and_can_be_accepted() -> None:
    values = released(index_compression=4, sliding_window=128)
    with pytest.raises(ValueError, match=r'index_compression, sliding_window.*ignore=\("index_compression",'):
        from_hf(values)
    with pytest.raises(ValueError, match="know: sliding_window;"):
        from_hf(values, ignore=("index_compression",))
    assert from_hf(values, ignore=("index_compression", "sliding_window")) == tiny()


def test_ignore_does_not_hide_a_key_that_matters() -> None:
    with pytest.raises(ValueError, match="ignore= .* attention_bias"):
        from_hf(released(attention_bias=True), ignore=("attention_bias",))


def test_missing_keys_are_listed_together() -> None:
    with pytest.raises(ValueError, match=r"lacks the keys hidden_size, index_topk, rope_theta"):
        from_hf(released(hidden_size="absent", index_topk=None, rope_theta="absent"))


def test_switches_replace_fields_and_must_be_fields() -> None:
    assert from_hf(released(), dtype="float32", index_topk=8) == tiny(dtype="float32", index_topk=8)
    with pytest.raises(ValueError, match="ModelConfig fields, got flash"):
        from_hf(released(), flash=True)


@pytest.mark.parametrize("name", ["latent_norm_eps", "index_norm_eps"])
def test_an_eps_without_a_key_is_not_written(name) -> None:
    with pytest.raises(ValueError, match=f"{name} must be 1e-6.*1e-05"):
        to_hf(tiny(**{name: 1e-5}))
