"""The report of `compare` on made-up runs, and our model compared with transformers' on random checkpoints."""

import dataclasses
import importlib.util
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from dsa_jax.checkpoint import load_config, load_params, write_hf
from dsa_jax.config import ModelConfig, tiny
from dsa_jax.parity.compare import compare, run_ours
from dsa_jax.parity.reference import class_of, transformers_reference
from dsa_jax.parity.report import Tolerance
from dsa_jax.transformer import Transformer

BATCH, TOKENS, KEYS, VOCAB, TOP_K = 2, 12, 12, 7, 4


def made_up_run() -> dict[str, np.ndarray]:
    """One dense and one MoE layer, with causal index scores and the true top-k of them, best first."""
    rng = np.random.default_rng(0)
    visible = np.tril(np.ones((TOKENS, KEYS), bool))
    run = {
        "input_ids": rng.integers(0, VOCAB, (BATCH, TOKENS)),
        "logits": rng.standard_normal((BATCH, TOKENS, VOCAB)).astype(np.float32),
        "layer1.gate_i": np.argsort(rng.random((BATCH * TOKENS, 8)), -1)[:, :3],
        "layer1.gate_w": rng.random((BATCH * TOKENS, 3)).astype(np.float32),
    }
    for i in range(2):
        scores = rng.standard_normal((BATCH, TOKENS, KEYS)).astype(np.float32)
        run[f"layer{i}.index_scores"] = np.where(visible, scores, -np.inf).astype(np.float32)
        run[f"layer{i}.topk"] = np.argsort(-run[f"layer{i}.index_scores"], -1, kind="stable")[..., :TOP_K]
        for kind in ("attn", "mlp", "out"):
            run[f"layer{i}.{kind}"] = rng.standard_normal((BATCH, TOKENS, 5)).astype(np.float32)
    return run


@pytest.fixture
def ours() -> dict[str, np.ndarray]:
    return made_up_run()


@pytest.fixture
def reference() -> dict[str, np.ndarray]:
    return made_up_run()


def test_a_run_equals_itself(ours, reference):
    report = compare(ours, reference)
    assert report.passed and report.failures == ()
    assert (report.logits, report.top1) == (0.0, 1.0) and abs(report.kl) < 1e-12
    for row in report.layers:
        assert (row.index_scores, row.attn, row.mlp, row.out) == (0.0, 0.0, 0.0, 0.0)
        assert (row.topk_overlap, row.topk_equal, row.topk_gap) == (1.0, 1.0, None)
    assert [row.experts_equal for row in report.layers] == [None, 1.0]


def test_selected_keys_are_sets_of_visible_keys(ours, reference):
    """Order, -1, and future keys that pad short rows make no difference."""
    selected = np.sort(ours["layer0.topk"], -1)
    ours["layer0.topk"] = np.where(selected <= np.arange(TOKENS)[:, None], selected, -1)
    assert compare(ours, reference).passed
    del reference["layer0.index_scores"]  # visible keys are then the causal ones
    assert compare(ours, reference).passed


def test_one_wrong_key_fails_and_the_gap_tells_a_tie_from_a_bug(ours, reference):
    for gap in (0.0, 1.5):
        scores = np.where(np.tril(np.ones((TOKENS, KEYS), bool)), 0.0, -np.inf)
        scores = np.broadcast_to(scores, (BATCH, TOKENS, KEYS)).astype(np.float32).copy()
        scores[..., :TOP_K] += gap
        for run in (ours, reference):
            run["layer0.index_scores"] = scores
            run["layer0.topk"] = np.broadcast_to(np.arange(TOP_K), (BATCH, TOKENS, TOP_K)).copy()
        ours["layer0.topk"][1, -1] = [0, 1, 2, TOP_K]
        report = compare(ours, reference)
        row = report.layers[0]
        assert not report.passed and len(report.failures) == 1
        assert f"is at most {gap:.1e}" in report.failures[0]
        assert row.topk_gap == gap
        assert row.topk_equal == pytest.approx(1 - 1 / (BATCH * TOKENS))
        assert row.topk_overlap == pytest.approx(1 - 1 / (BATCH * TOKENS * TOP_K))
        assert compare(ours, reference, Tolerance(topk_equal=0.9)).passed


def test_experts_are_sets_and_their_weights_follow_them(ours, reference):
    for name in ("layer1.gate_i", "layer1.gate_w"):
        ours[name] = ours[name][:, ::-1]
    assert compare(ours, reference).layers[1].expert_weights == 0.0
    missing = (set(range(8)) - set(ours["layer1.gate_i"][0])).pop()
    ours["layer1.gate_i"] = ours["layer1.gate_i"].copy()
    ours["layer1.gate_i"][0, 0] = missing
    report = compare(ours, reference)
    assert report.layers[1].experts_equal == pytest.approx(1 - 1 / (BATCH * TOKENS))
    assert not report.passed and "expert sets" in report.failures[0]


def test_another_mask_fails_even_if_all_common_scores_agree(ours, reference):
    ours["layer1.index_scores"] = ours["layer1.index_scores"].copy()
    ours["layer1.index_scores"][0, 3, 4] = 1.0  # query 3 must not see key 4
    report = compare(ours, reference)
    assert report.layers[1].index_scores == math.inf and not report.passed


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 1.0])
def test_a_wrong_or_undefined_logit_fails(ours, reference, wrong):
    ours["logits"] = ours["logits"].copy()
    ours["logits"][0, 0, 0] += wrong
    with np.errstate(invalid="ignore"):  # inf - inf, inside the KL of a run that is itself undefined
        report = compare(ours, reference)
    assert not report.passed and "logits" in report.failures[-1]
    assert json.loads(report.to_json())["passed"] is False


def test_kl_and_top1_have_their_definitions(ours, reference):
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.125, 0.5, 0.375])
    runs = [{"logits": np.log(x)[None, None].astype(np.float32)} for x in (q, p)]
    report = compare(*runs)
    assert report.kl == pytest.approx(float((p * np.log(p / q)).sum()), abs=1e-7)
    assert report.top1 == 0.0 and report.layers == ()


def test_the_table_has_a_row_per_layer_and_empty_cells_for_what_is_unknown(ours, reference):
    del reference["layer0.attn"]
    table = compare(ours, reference).table()
    assert table.row_count == 2
    console = Console(file=io.StringIO(), width=160)
    console.print(table)
    assert "same most likely token 100.00%" in console.file.getvalue()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ours, ref: ref.pop("logits"), "must hold 'logits'"),
        (lambda ours, ref: ours.pop("layer1.out"), "holds 'layer1.out', our run does not"),
        (lambda ours, ref: ours.update({"logits": ours["logits"][:1]}), "has shape"),
        (lambda ours, ref: ours.update({"input_ids": ours["input_ids"] + 1}), "different tokens"),
        (lambda ours, ref: ours.update({"layer0.topk": ours["layer0.topk"] + 99}), "top-k indices lie in"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(ours, reference, change, message):
    change(ours, reference)
    with pytest.raises(ValueError, match=message):
        compare(ours, reference)


def test_json_holds_the_numbers_of_the_table(ours, reference):
    ours["layer0.index_scores"] = np.zeros_like(ours["layer0.index_scores"])  # no mask at all
    content = json.loads(compare(ours, reference).to_json())
    assert content["layers"][0]["index_scores"] == "inf"
    assert content["tolerance"] == dataclasses.asdict(Tolerance())


# With transformers. Every pair of values of {seed, YaRN, dense layers, index_topk} occurs in one case.

needs_torch = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")),
    reason="needs torch and transformers: pip install 'dsa-jax[parity]'",
)
SIZES = dict(
    vocab_size=256, hidden_size=128, intermediate_size=192, moe_intermediate_size=64, num_attention_heads=4,
    num_key_value_heads=4, q_lora_rank=64, kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=16,
    v_head_dim=32, n_routed_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2, n_shared_experts=1,
    index_n_heads=32, index_head_dim=64,  # few heads give scores of exactly 0, and with them ties
)  # fmt: skip
DEFAULT = dict(rope_type="default", rope_theta=10000.0)
YARN = dict(
    rope_type="yarn", rope_theta=10000.0, factor=40.0, original_max_position_embeddings=4096,
    beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0,
)  # fmt: skip
SHORT_YARN = YARN | dict(factor=4.0, original_max_position_embeddings=32)  # the ramp lies inside the test
CASES = [
    # seed, layers, dense layers, rope, index_topk, length
    (0, 4, 1, YARN, 16, 96),
    (1, 6, 2, YARN, 64, 256),
    (1, 4, 1, DEFAULT, 64, 256),
    (1, 5, 1, SHORT_YARN, 16, 64),
    pytest.param(0, 6, 2, DEFAULT, 16, 256, marks=pytest.mark.slow),
    pytest.param(0, 4, 2, SHORT_YARN, 64, 160, marks=pytest.mark.slow),
]


def write_random_model(
    folder: Path,
    seed: int,
    *,
    model_type: str = "deepseek_v32",
    save: Mapping[str, Any] = {},
    **sizes: object,
) -> None:
    """A checkpoint written by transformers, with weights that make every part of the model matter.

    The default initialisation would hide mistakes: zero biases, unit norms, and scores almost equal to each
    other. save: options of save_pretrained.
    """
    import torch
    import transformers

    values = {"model_type": model_type}
    config = class_of(values, "Config")(**(SIZES | sizes), max_position_embeddings=4096)
    model = class_of(values, "ForCausalLM")(config).float()
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = rng.standard_normal(tuple(tensor.shape))
            if name.endswith(("e_score_correction_bias", "k_norm.bias")):
                value = 0.2 * noise
            elif "norm" in name:
                value = 1 + 0.2 * noise
            elif name.endswith("embed_tokens.weight"):
                value = noise
            else:
                gain = 1.5 if name.endswith("q_b_proj.weight") or "indexer.wq_b" in name else 0.8
                value = gain * noise / math.sqrt(tensor.shape[-1])
            tensor.copy_(torch.from_numpy(value))
    logging = transformers.utils.logging
    logging.disable_progress_bar()
    model.save_pretrained(folder, **save)
    logging.enable_progress_bar()


def load_float32(folder: Path, **switches: object) -> tuple[object, ModelConfig]:
    config = load_config(folder, dtype="float32", param_dtype="float32", **switches)
    return load_params(folder, config), config


def random_tokens(seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, SIZES["vocab_size"], (2, length))


@needs_torch
@pytest.mark.parity
@pytest.mark.parametrize(("seed", "layers", "dense", "rope", "top_k", "length"), CASES)
def test_v32_matches_transformers(tmp_path, seed, layers, dense, rope, top_k, length):
    write_random_model(
        tmp_path,
        seed,
        num_hidden_layers=layers,
        first_k_dense_replace=dense,
        rope_parameters=rope,
        index_topk=top_k,
    )
    tokens = random_tokens(seed, length)
    report = compare(run_ours(*load_float32(tmp_path), tokens), transformers_reference(tmp_path, tokens))
    assert report.failures == ()
    assert len(report.layers) == layers
    assert max(row.out for row in report.layers) < 5e-5 and report.kl < 1e-8 and report.top1 == 1.0


YARN_VARIANTS = {
    # What is left out of, or added to, SHORT_YARN; None leaves the key out.
    "mscale differs": dict(mscale=0.7, mscale_all_dim=1.3),
    "both absent": dict(mscale=None, mscale_all_dim=None),
    "mscale alone": dict(mscale=0.7, mscale_all_dim=None),
    "mscale_all_dim alone": dict(mscale=None, mscale_all_dim=0.7),
    "attention_factor": dict(attention_factor=1.3),
    "beta_fast and beta_slow": dict(beta_fast=8.0, beta_slow=2.0),
}


@needs_torch
@pytest.mark.parity
@pytest.mark.parametrize("variant", YARN_VARIANTS)
def test_yarn_variants_match_transformers(tmp_path, variant):
    rope = {key: value for key, value in (SHORT_YARN | YARN_VARIANTS[variant]).items() if value is not None}
    write_random_model(
        tmp_path, 2, num_hidden_layers=3, first_k_dense_replace=1, rope_parameters=rope, index_topk=16
    )
    tokens = random_tokens(2, 64)
    ours, reference = run_ours(*load_float32(tmp_path), tokens), transformers_reference(tmp_path, tokens)
    report = compare(ours, reference)
    assert report.failures == () and report.top1 == 1.0
    assert np.abs(ours["logits"] - reference["logits"]).max() < 5e-5


@needs_torch
@pytest.mark.parity
@pytest.mark.parametrize("interleaved", [False, True], ids=["deepseek_v32", "glm_moe_dsa"])
def test_fp8_blocks_match_transformers(tmp_path, interleaved):
    """The released layout: FP8 with a ragged block (144 rows), shards, and an MTP layer."""
    config = tiny(
        vocab_size=256, d_model=128, d_ff=192, d_expert=64, q_lora_rank=64, kv_lora_rank=128,
        qk_nope_head_dim=32, qk_rope_head_dim=16, init_std=0.08, index_rope_interleaved=interleaved,
    )  # fmt: skip
    params = jax.jit(Transformer(config).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    folder = tmp_path / "fp8"
    write_hf(folder, params, config, quantize="fp8", max_shard_bytes=500_000)
    assert len(list(folder.glob("*.safetensors"))) > 2
    tokens = random_tokens(0, 96)
    report = compare(run_ours(*load_float32(folder), tokens), transformers_reference(folder, tokens))
    assert report.failures == ()


@needs_torch
@pytest.mark.parity
def test_a_wrong_indexer_rope_does_not_match_transformers(tmp_path):
    """The comparison itself can fail: DeepSeek's own first release had this mistake."""
    write_random_model(
        tmp_path,
        0,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        rope_parameters=DEFAULT,
        index_topk=16,
    )
    tokens = random_tokens(0, 96)
    params, config = load_float32(tmp_path, index_rope_interleaved=True)
    report = compare(run_ours(params, config, tokens), transformers_reference(tmp_path, tokens))
    assert report.layers[0].index_scores > 0.01 and report.layers[0].topk_overlap < 0.99
    assert not report.passed


@needs_torch
@pytest.mark.parity
def test_a_checkpoint_that_does_not_fill_the_reference_is_refused(tmp_path):
    write_random_model(
        tmp_path,
        0,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        rope_parameters=DEFAULT,
        index_topk=16,
    )
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("layer_types", "mlp_layer_types"):
        config[key].append(config[key][-1])
    config["num_hidden_layers"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="could not fill"):
        transformers_reference(tmp_path, random_tokens(0, 8))
