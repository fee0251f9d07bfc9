"""A training step and the decode step are traced once, however many steps, prompts and tokens follow."""

import dataclasses

import chex
import pytest
from rich.console import Console

import train.step
from dsa_jax.generate import compiled_steps, generate
from dsa_jax.transformer import Transformer
from tests.train.small import CONFIG, STAGES, initial, small_run
from train.config import MeshSpec
from train.step import compiled_step
from train.trainer import train as run_all

SHORT = tuple(dataclasses.replace(stage, steps=4, lr_warmup=1) for stage in STAGES)
eight = pytest.mark.devices(8)


@pytest.fixture(autouse=True)
def no_earlier_traces():
    """Neither counted nor compiled by another test, and none left to one."""
    for forget in (chex.clear_trace_counter, compiled_step.cache_clear, compiled_steps.cache_clear):
        forget()
    yield
    compiled_step.cache_clear()
    compiled_steps.cache_clear()


@pytest.mark.parametrize(
    ("stages", "mesh"),
    [(SHORT, None), pytest.param(SHORT[2:], MeshSpec(expert=2), marks=[eight, pytest.mark.slow])],
    ids=["one device", "mesh"],
)
def test_a_run_traces_the_step_of_each_stage_once(tmp_path, monkeypatch, stages, mesh):
    traced = []
    step = chex.assert_max_traces(train.step.train_step, n=len(stages))

    def counted(state, batch, config, stage, *options):
        traced.append(stage.name)
        return step(state, batch, config, stage, *options)

    monkeypatch.setattr("train.step.train_step", counted)
    run_all(small_run(*stages, mesh=mesh, batch=8 if mesh else 2), tmp_path, Console(quiet=True))
    assert traced == [stage.name for stage in stages]


def test_prompts_of_one_padded_shape_trace_prefill_and_decode_once(monkeypatch):
    """21 and 25 tokens are padded alike, and so are their caches: two traces of the model for all calls."""
    apply = Transformer.apply

    def counted(self, *arguments, **options):
        return apply(self, *arguments, **options)

    monkeypatch.setattr(Transformer, "apply", chex.assert_max_traces(counted, n=2))
    config = dataclasses.replace(CONFIG, max_seq_len=64, n_mtp_layers=0)
    params = {"params": {name: leaf for name, leaf in initial()["params"].items() if name != "mtp"}}
    for length in (21, 25):
        prompts = [[token % CONFIG.vocab_size for token in range(start, start + length)] for start in (0, 7)]
        (first, second) = generate(params, config, prompts, max_new_tokens=6)
        assert len(first) == len(second) == 6
