"""ModelConfig: derived numbers of the released models, and errors for contradictory values."""

import dataclasses
import math

import jaxtyping
import pytest

from dsa_jax.config import Fp8Config, ModelConfig, YarnConfig, deepseek_v32, glm5, tiny


@pytest.fixture
def no_type_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As users run it: without the tests' type checks, our own code must raise on a value of the wrong type."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def test_v32_has_the_published_number_of_parameters() -> None:
    # 685,396,921,376 published, of which 41,591,584 are FP8 scales.
    assert deepseek_v32().param_count() == 685_396_921_376 - 41_591_584


def test_v32_softmax_scale_includes_the_squared_yarn_temperature() -> None:
    config = deepseek_v32()
    assert config.qk_head_dim == 192
    assert config.softmax_scale == pytest.approx(0.1352338, abs=1e-7)
    assert dataclasses.replace(config, yarn=None).softmax_scale == 192**-0.5


def test_yarn_without_mscale_all_dim_leaves_the_softmax_scale_alone() -> None:
    yarn = YarnConfig(factor=40.0, original_seq_len=4096, mscale_all_dim=0.0)
    assert tiny(yarn=yarn).softmax_scale == tiny(yarn=None).softmax_scale


def test_glm5_differs_from_v32_where_its_release_does() -> None:
    config = glm5()
    assert (config.n_moe_layers, config.qk_head_dim, config.n_expert_groups) == (75, 256, 1)
    assert (config.norm_eps, config.latent_norm_eps, config.index_norm_eps) == (1e-5, 1e-6, 1e-6)
    assert config.index_rope_interleaved and not deepseek_v32().index_rope_interleaved
    assert config.softmax_scale == 256**-0.5


def test_sharing_the_mtp_embeddings_saves_two_embeddings() -> None:
    saved = tiny().param_count() - tiny(mtp_shared_embeddings=True).param_count()
    assert saved == 2 * tiny().vocab_size * tiny().d_model


def test_configs_are_hashable_and_equal_by_value() -> None:
    assert tiny() == tiny() and hash(tiny()) == hash(tiny())
    assert tiny(index_topk=8) != tiny()


@pytest.mark.parametrize("preset", [deepseek_v32, glm5, tiny])
def test_both_dense_and_moe_only_models_are_allowed(preset) -> None:
    assert preset(n_dense_layers=0).n_moe_layers == preset().n_layers
    assert preset(n_dense_layers=preset().n_layers).n_moe_layers == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(n_routed_experts=9), ["n_routed_experts", "n_expert_groups", "9", "4"]),
        (dict(n_limited_groups=5), ["n_limited_groups", "n_expert_groups", "5", "4"]),
        (dict(n_activated_experts=5), ["n_activated_experts", "5", "4"]),
        (dict(n_routed_experts=4, n_activated_experts=2), ["two best experts", "8", "4"]),
        (dict(n_dense_layers=5), ["n_dense_layers", "n_layers", "5", "4"]),
        (dict(qk_rope_head_dim=31), ["qk_rope_head_dim", "even", "31"]),
        (dict(qk_rope_head_dim=256), ["index_head_dim", "qk_rope_head_dim", "256", "128"]),
        (dict(index_head_dim=96, index_fp8=True), ["index_head_dim", "power of two", "96"]),
        (dict(index_head_dim=64, index_fp8=True), ["index_head_dim", "multiple of 128", "64"]),
        (dict(vocab_size=2**31), ["vocab_size", "below 2**31", "32 bits"]),
        (dict(d_model=10**400), ["d_model", "below 2**31"]),
        (dict(kv_lora_rank=192, kv_fp8=True), ["kv_lora_rank", "128", "192"]),
        (dict(n_mtp_layers=2), ["n_mtp_layers", "0 or 1", "2"]),
        (dict(n_mtp_layers=-1), ["n_mtp_layers", "-1"]),
        (dict(d_model=0), ["d_model", "positive", "0"]),
        (dict(d_model=-256), ["d_model", "positive", "-256"]),
        (dict(n_heads=2.0), ["n_heads", "int", "2.0"]),
        (dict(n_heads=True), ["n_heads", "True"]),
        (dict(n_dense_layers=-1), ["n_dense_layers", "at least 0"]),
        (dict(norm_eps=0.0), ["norm_eps", "positive"]),
        (dict(route_scale=math.nan), ["route_scale", "finite"]),
        (dict(rope_theta="10000"), ["rope_theta", "float"]),
        (dict(norm_topk_prob=1), ["norm_topk_prob", "True or False"]),
        (dict(attention="flash"), ["attention", "sparse", "dense", "flash"]),
        (dict(attention_form="gqa"), ["attention_form", "mqa", "gqa"]),
        (dict(implementation="triton"), ["implementation", "mosaic_gpu", "triton"]),
        (dict(dtype="float16"), ["dtype", "bfloat16", "float16"]),
        (dict(param_dtype="fp8"), ["param_dtype", "float32", "fp8"]),
        (dict(remat="full"), ["remat", "layer", "full"]),
        (dict(mtp_hidden="none"), ["mtp_hidden", "post_norm", "none"]),
        (dict(query_block=0), ["query_block", "positive"]),
        (dict(bos_token_id=512), ["vocab_size=512", "512"]),
        (dict(pad_token_id=-1), ["vocab_size=512", "-1"]),
        (dict(eos_token_ids=(1, 999)), ["vocab_size=512", "999"]),
        (dict(eos_token_ids=[1]), ["eos_token_ids", "tuple"]),
    ],
)
def test_a_contradiction_is_refused_with_both_values(changes, words, no_type_checks) -> None:
    with pytest.raises(ValueError) as error:
        tiny(**changes)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: YarnConfig(factor=0.5, original_seq_len=4096), ["factor", "yarn=None", "0.5"]),
        (lambda: YarnConfig(factor=4.0, original_seq_len=0), ["original_seq_len", "positive"]),
        (lambda: YarnConfig(factor=4.0, original_seq_len=8, beta_fast=0.5), ["beta_fast", "0.5", "1.0"]),
        (lambda: YarnConfig(factor=math.inf, original_seq_len=8), ["factor", "finite"]),
        (lambda: Fp8Config(block=(64, 64)), ["(128, 128)", "(64, 64)"]),
        (lambda: Fp8Config(scale_fmt="e8m0"), ["scale_fmt", "ue8m0", "e8m0"]),
    ],
)
def test_yarn_and_fp8_refuse_impossible_values(make, words, no_type_checks) -> None:
    with pytest.raises(ValueError) as error:
        make()
    assert all(word in str(error.value) for word in words), str(error.value)


def test_the_sizes_have_no_defaults() -> None:
    with pytest.raises(TypeError, match="missing"):
        ModelConfig(vocab_size=512)
