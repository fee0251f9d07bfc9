"""Speed and memory: one row per combination, with consistent numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from dsa_jax.config import tiny
from dsa_jax.transformer import Transformer
from train.measure.flops import forward_flops
from train.measure.throughput import FORWARD, Pass, throughput

CONFIG = tiny(
    n_layers=1, n_dense_layers=1, n_mtp_layers=0, d_model=64, vocab_size=64, d_ff=64, attention_form="mqa"
)


@functools.cache
def params():
    shapes = jax.eval_shape(Transformer(CONFIG).init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    return jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)


def simple(function):
    return Pass(make=lambda config: function, flops=lambda config, length: 7.0)


def test_there_is_one_row_per_length_pass_and_attention():
    passes = {
        "more": simple(lambda params, batch: batch["tokens"] + 1),
        "sum": simple(lambda params, batch: (params["params"]["head"] ** 2).sum()),
    }
    rows = throughput(CONFIG, (32, 64), passes, params=params(), batch=2, repeats=1)
    assert [(row["length"], row["pass"], row["attention"]) for row in rows] == [
        (length, name, attention)
        for length in (32, 64)
        for name in passes
        for attention in ("dense", "sparse")
    ]
    for row in rows:
        assert row["tokens_per_s"] == pytest.approx(2 * row["length"] / row["seconds"])
        assert row["flops_per_s"] == pytest.approx(7.0 * row["tokens_per_s"])


def test_forward_is_dense_and_sparse_with_their_own_operations():
    dense, sparse = throughput(CONFIG, (32,), params=params(), repeats=1)
    for row in (dense, sparse):
        assert row["pass"] == "forward" and row["implementation"] == "default"
        assert row["temporary_bytes"] > 0 and row["argument_bytes"] > 0
        operations = FORWARD.flops(dataclasses.replace(CONFIG, attention=row["attention"]), 32)
        assert row["flops_per_s"] == pytest.approx(operations * row["tokens_per_s"])


def test_a_prefill_computes_one_row_of_logits():
    parts = forward_flops(CONFIG, 64)
    assert FORWARD.flops(CONFIG, 64) == pytest.approx(sum(parts.values()) - parts["head"] * 63 / 64)

    def logits():
        tokens = jnp.zeros((2, 32), jnp.int32)
        return FORWARD.make(CONFIG)(params(), {"tokens": tokens})

    assert jax.eval_shape(logits).shape == (2, 1, CONFIG.vocab_size)


def test_out_of_memory_is_reported_in_its_row():
    def make(config):
        def run(params, batch):
            if config.attention == "dense":
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte")
            return batch["tokens"] + 1

        return run

    rows = throughput(
        CONFIG, (8,), {"step": Pass(make=make, flops=lambda *_: 1.0)}, params=params(), repeats=1
    )
    assert rows[0]["out_of_memory"] and "seconds" not in rows[0]
    assert "out_of_memory" not in rows[1] and rows[1]["seconds"] > 0


def test_other_errors_are_not_swallowed():
    def make(config):
        def run(params, batch):
            raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

        return run

    config = dataclasses.replace(CONFIG, attention="dense")
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        throughput(config, (8,), {"step": Pass(make=make, flops=lambda *_: 1.0)}, params=params(), repeats=1)
