"""FLOPs against XLA's count, the number of active parameters, and V3.2's numbers by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from dsa_jax.config import deepseek_v32, tiny
from dsa_jax.transformer import Transformer
from train.measure.flops import forward_flops, training_flops

V32 = deepseek_v32()
K = V32.index_topk


def per_layer(part, length, **changes):
    return forward_flops(dataclasses.replace(V32, **changes), length)[part] / V32.n_layers


def test_a_dense_layer_counts_what_xla_counts():
    """XLA also multiplies masked pairs and counts a scan's body once, hence one layer and T pairs per query."""
    config = tiny(
        n_layers=1, n_dense_layers=1, n_mtp_layers=0, attention="dense", attention_form="mha", dtype="float32"
    )
    T, model = 64, Transformer(config)
    tokens = jax.ShapeDtypeStruct((1, T), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    forward = jax.jit(lambda params, tokens: model.apply(params, tokens)[0])
    counted = forward.lower(params, tokens).compile().cost_analysis()["flops"]
    parts = forward_flops(config, T)
    parts["attention"] *= T / ((T + 1) / 2)
    assert sum(parts.values()) <= counted == pytest.approx(T * sum(parts.values()), rel=0.03)


@pytest.mark.parametrize("config", [V32, tiny()], ids=["v32", "tiny"])
def test_without_pairs_it_is_two_operations_per_active_parameter(config):
    parts = forward_flops(dataclasses.replace(config, attention="sparse"), config.index_topk + 1, mtp=True)
    c, pairs = config, (config.index_topk + 2) / 2
    n_layers = c.n_layers + 1
    attention = parts["attention"] / c.n_layers + 2 * c.index_n_heads * c.index_head_dim * pairs
    counted = sum(parts.values()) - n_layers * attention

    inactive = 3 * c.d_model * c.d_expert * (c.n_routed_experts - c.n_activated_experts)
    vectors = 2 * c.d_model + c.q_lora_rank + c.kv_lora_rank + 2 * c.index_head_dim
    active = c.param_count() - 2 * c.vocab_size * c.d_model - (c.n_moe_layers + 1) * inactive
    active -= n_layers * vectors + (c.n_moe_layers + 1) * c.n_routed_experts + 4 * c.d_model
    assert counted == pytest.approx(2 * active, rel=1e-12)


class TestV32:
    """By hand, per dense pair 2 * 128 (192 + 128), index dot 2 * 64 * 128, selected key 2 * 128 (2 * 512 + 64)."""

    T = 131072

    def test_dense(self):
        assert per_layer("attention", self.T, attention="dense", attention_form="mha") == pytest.approx(
            81920 * (self.T + 1) / 2
        )
        assert per_layer("indexer", self.T, attention="dense") == 0

    def test_sparse(self):
        full = 278528 * K  # 570 million
        assert per_layer("attention", self.T) == pytest.approx(full, rel=K / self.T)
        assert per_layer("attention", self.T) < full
        scored = 16384 * (self.T + 1) / 2
        projected = 2 * (1536 * 64 * 128 + 7168 * (128 + 64))
        assert per_layer("indexer", self.T) == pytest.approx(scored + projected)

    def test_break_even_is_near_17_thousand_tokens(self):
        def difference(length):
            dense = per_layer("attention", length, attention="dense", attention_form="mha")
            sparse = per_layer("attention", length, attention_form="mqa")
            return dense - sparse - 16384 * (length + 1) / 2

        # Queries that see fewer than K keys cost less: slightly below the 17.4K of 570M / (65536 / 2).
        assert difference(15_000) < 0 < difference(17_500)

    def test_rows_no_longer_than_index_topk_score_nothing(self):
        assert per_layer("indexer", K) == 0 < per_layer("indexer", K + 1)

    def test_short_sparse_rows_cost_dense_attention_plus_the_indexer(self):
        sparse, dense = forward_flops(V32, 4096), forward_flops(deepseek_v32(attention="dense"), 4096)
        assert sparse | {"indexer": 0.0} == dense


class TestTraining:
    T = 32768

    def test_the_model_costs_three_times_its_forward_pass(self):
        config = deepseek_v32(attention="dense")
        forward = forward_flops(config, self.T, mtp=True)
        training = training_flops(config, self.T, "model")
        assert sum(training.values()) == pytest.approx(3 * sum(forward.values()))

    def test_selection_has_no_backward_pass(self):
        forward, training = forward_flops(V32, self.T), training_flops(V32, self.T, "model")
        assert training["indexer"] == forward["indexer"]

    def test_warmup_runs_the_model_forward_once_and_its_head_never(self):
        config = deepseek_v32(attention="dense", n_mtp_layers=0)
        forward, training = forward_flops(config, self.T), training_flops(config, self.T, "indexer")
        for part in ("projections", "attention", "feed_forward"):
            assert training[part] == forward[part]
        assert training["head"] == 0
        # Per visible pair: target 2 * 128 * 192, dots and their two gradients 3 * 2 * 64 * 128.
        assert training["index_kl"] == pytest.approx(61 * (49152 + 49152) * (self.T + 1) / 2)

    def test_the_sparse_kl_touches_the_selected_keys_only(self):
        short, long = (training_flops(V32, length)["index_kl"] for length in (self.T, 4 * self.T))
        assert long == pytest.approx(short, rel=K / self.T)
        assert long == pytest.approx(61 * K * (2 * 128 * 576 + 49152), rel=K / self.T)

    def test_both_is_model_and_index_learning(self):
        model, both = training_flops(V32, self.T, "model"), training_flops(V32, self.T, "both")
        projections = 2 * (1536 * 64 * 128 + 7168 * (128 + 64))
        assert both["indexer"] - model["indexer"] == pytest.approx(61 * projections)
        learning = (both["index_kl"] + both["indexer"] - model["indexer"]) / 61
        assert both["mtp"] - model["mtp"] == pytest.approx(learning)
        same = ("projections", "attention", "feed_forward", "head")
        assert {part: both[part] for part in same} == {part: model[part] for part in same}


@pytest.mark.parametrize(
    "length, mtp, message",
    [(0, False, "within 1 .. max_seq_len"), (8, True, "n_mtp_layers=1, got n_mtp_layers=0")],
)
def test_impossible_requests_are_refused(length, mtp, message):
    with pytest.raises(ValueError, match=message):
        forward_flops(tiny(n_mtp_layers=0), length, mtp=mtp)
