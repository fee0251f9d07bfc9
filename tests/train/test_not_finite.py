"""A number that is not finite, of the user's or of a model, is never taken for an answer: a sentence names it."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax.checkpoint import convert, write_hf
from dsa_jax.commands.cli import main
from dsa_jax.demo.model import Model
from dsa_jax.generate import Sampling, generate
from dsa_jax.parity.compare import KINDS, compare
from pallas_kernels.bench import command as bench
from tests.train.small import CONFIG, batch_of, initial, small_run
from train.config import Lora, Stage, dense
from train.data.synthetic import Needles
from train.measure import scaling
from train.measure.evaluate import indexer_quality, needle_accuracy, score
from train.measure.throughput import STEP, throughput
from train.trainer import train

NOT_FINITE = (np.nan, np.inf, -np.inf)
EXPORTED = dataclasses.replace(CONFIG, bos_token_id=0, eos_token_ids=(1,), max_seq_len=64)


def broken(value=np.nan):
    """The parameters, with one value of the head that is not finite."""
    tree = initial()["params"]
    return {"params": tree | {"head": tree["head"].at[3, 5].set(value)}}


# -- results of a model

NEEDLES = Needles(None, 30, 1, marker=0, query_marker=1, first_key=2, n_keys=3, first_value=5, n_values=3)
COMPUTED = {
    "score": lambda params: score(params, CONFIG, [batch_of([20])]),
    "needles": lambda params: needle_accuracy(params, CONFIG, NEEDLES, [30], [0.0], rows=1),
    "throughput": lambda params: throughput(CONFIG, (16,), params=params, repeats=1),
    "throughput of a step": lambda params: throughput(
        CONFIG, (16,), {"step": STEP}, params=params, attentions=("dense",), repeats=1
    ),
    "generate": lambda params: generate(params, CONFIG, [[1, 2]], max_new_tokens=1),
    "generate, sampled": lambda params: generate(
        params, CONFIG, [[1, 2]], max_new_tokens=1, sampling=Sampling(temperature=1.0, top_p=0.9, top_k=3)
    ),
    "demo": lambda params: Model(params, CONFIG, None).run("sparse", np.arange(16, dtype=np.int32) % 8),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_what_a_model_computes_is_not_reported_unless_it_is_finite(name):
    COMPUTED[name](initial())
    with pytest.raises(FloatingPointError, match=r"not finite|is nan"):
        COMPUTED[name](broken())


def test_a_run_stops_at_an_evaluation_that_is_not_finite(tmp_path):
    with pytest.raises(FloatingPointError, match="cross entropy over"):
        train(small_run(dense(1, lr=1e-3), eval_batches=1), tmp_path, params=jax.tree.map(jnp.copy, broken()))
    assert not (tmp_path / "eval.jsonl").read_text()


def test_the_quality_of_a_broken_indexer_is_not_reported():
    tree = initial()["params"]
    attn = tree["dense_layers"]["attn"]
    indexer = attn["indexer"] | {"weights_proj": attn["indexer"]["weights_proj"] * jnp.nan}
    attn = attn | {"indexer": indexer}
    params = {"params": tree | {"dense_layers": tree["dense_layers"] | {"attn": attn}}}
    with pytest.raises(FloatingPointError, match=r"layer 0: .*kl nan"):
        indexer_quality(params, dataclasses.replace(CONFIG, attention="dense"), batch_of([20]))


def test_the_losses_of_a_mesh_must_be_finite(monkeypatch):
    copied = jax.tree.map(jnp.copy, broken())  # a step donates its state
    monkeypatch.setattr(scaling, "initial_params", lambda run, sharding: copied)
    run = small_run(dense(1, lr=1e-3))
    with pytest.raises(FloatingPointError, match=r"losses must be finite .*nan"):
        scaling.measure(run, steps=2)


def test_finished_rows_do_not_stop_the_others():
    """A row's logits count while it is generating."""
    params, prompts = initial(), [[1, 2, 3], [4, 5]]
    first = generate(params, CONFIG, prompts, max_new_tokens=1)
    assert generate(params, CONFIG, prompts, max_new_tokens=3, stop_tokens=[first[0][0]])[0] == first[0]


@pytest.mark.parametrize("error", NOT_FINITE)
def test_a_benchmark_whose_error_is_not_a_number_fails(monkeypatch, capsys, error):
    monkeypatch.setattr(bench, "error", lambda *_: {"relative": error})
    assert bench.main(["select_topk", "--tiny", "--case", "rows of 8K", "--implementation", "xla"]) == 1
    assert "the result is not finite, or finite where it must not be" in capsys.readouterr().out


# -- comparisons


def run_of_two_layers():
    rng = np.random.default_rng(0)
    run = {"input_ids": np.zeros((1, 4), int), "logits": rng.standard_normal((1, 4, 5)).astype(np.float32)}
    for kind in KINDS:
        shape = {"index_scores": (1, 4, 4), "topk": (1, 4, 2), "gate_i": (4, 2), "gate_w": (4, 2)}.get(
            kind, (1, 4, 3)
        )
        run[f"layer0.{kind}"] = rng.standard_normal(shape).astype(np.float32)
    run["layer0.index_scores"] = np.where(np.tril(np.ones((4, 4), bool)), run["layer0.index_scores"], -np.inf)
    run["layer0.topk"] = np.tile([0, -1], (1, 4, 1))
    run["layer0.gate_i"] = np.tile([0, 1], (4, 1))
    return run


@pytest.mark.parametrize("value", NOT_FINITE[:2])
@pytest.mark.parametrize("sides", ["ours", "reference", "both"])
@pytest.mark.parametrize(
    "name", ["logits", *(f"layer0.{kind}" for kind in KINDS if kind not in ("topk", "gate_i"))]
)
def test_a_comparison_fails_where_a_number_is_not_finite(name, sides, value):
    runs = {"ours": run_of_two_layers(), "reference": run_of_two_layers()}
    assert compare(**runs).passed
    for side in runs if sides == "both" else [sides]:
        runs[side][name] = runs[side][name].copy()
        runs[side][name].reshape(-1)[0] = value
    report = compare(**runs)
    assert not report.passed and len(report.failures) >= 1
    assert json.loads(report.to_json())["passed"] is False


# -- checkpoints


def tensor_in(folder, name):
    """(file, offset of its first byte, dtype) of a tensor in a folder of safetensors files."""
    for path in sorted(folder.glob("*.safetensors")):
        raw = path.read_bytes()
        size = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + size])
        if name in header:
            return path, 8 + size + header[name]["data_offsets"][0], header[name]["dtype"]
    raise KeyError(name)


BYTES = {
    ("F32", "nan"): b"\x00\x00\xc0\x7f", ("F32", "inf"): b"\x00\x00\x80\xff",
    ("BF16", "nan"): b"\xc0\x7f", ("BF16", "inf"): b"\x80\xff", ("F8_E4M3", "nan"): b"\xff",
}  # fmt: skip
WEIGHT = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"


def write_broken(folder, dtype, value):
    cast = jnp.bfloat16 if dtype == "BF16" else jnp.float32
    params = jax.tree.map(lambda x: x.astype(cast), initial())
    write_hf(folder, params, EXPORTED, quantize="fp8" if dtype == "F8_E4M3" else None)
    path, at, stored = tensor_in(folder, WEIGHT)
    assert stored == dtype
    content = bytearray(path.read_bytes())
    content[at : at + len(BYTES[dtype, value])] = BYTES[dtype, value]
    path.write_bytes(content)


@pytest.mark.parametrize(("dtype", "value"), BYTES)
def test_weights_that_are_not_finite_are_named_and_not_converted(tmp_path, capsys, dtype, value):
    source, out = tmp_path / "source", tmp_path / "out"
    write_broken(source, dtype, value)
    assert main(["verify", str(source)]) == 1
    assert f"{WEIGHT}: holds NaN or infinity (rows 0 .. 23)" in capsys.readouterr().out
    assert main(["convert", str(source), str(out)]) == 2
    assert f"{WEIGHT} holds NaN or infinity (rows 0 .. 23)" in capsys.readouterr().err
    assert main(["verify", str(out)]) == 2  # incomplete
    capsys.readouterr()
    arguments = [
        "--token-ids=1,2",
        "--max-new-tokens=2",
        "--dtype=float32",
        f"--json={tmp_path / 'out.json'}",
    ]
    assert main(["generate", f"--model={source}", *arguments]) == 1
    assert "row 0, new token 1: the logits are not finite" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def test_parameters_that_are_not_finite_are_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"lm_head.weight holds NaN or infinity"):
        write_hf(tmp_path / "out", broken(), EXPORTED)
    assert list(tmp_path.iterdir()) == []


def test_weights_at_the_ends_of_their_range_are_converted(tmp_path):
    largest = jax.tree.map(lambda x: jnp.full_like(x, jnp.finfo(x.dtype).max), initial())
    write_hf(tmp_path / "hf", largest, EXPORTED)
    convert(tmp_path / "hf", tmp_path / "orbax")
    assert main(["verify", str(tmp_path / "orbax")]) == 0


# -- numbers of the user's


@pytest.mark.parametrize("value", [*NOT_FINITE, -1.0])
@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Stage) if f.type.startswith("float")])
def test_a_number_of_a_stage_is_finite_and_not_negative(field, value):
    stage = dense(3, lr=1e-3)
    with pytest.raises(ValueError, match=rf"{field} .*got {value}"):
        dataclasses.replace(stage, **{field: value})


@pytest.mark.parametrize("value", [*NOT_FINITE, 0.0])
def test_alpha_is_finite_and_positive(value):
    with pytest.raises(ValueError, match=f"alpha positive, got 16 and {value}"):
        Lora(alpha=value)
    assert math.isfinite(Lora().alpha)
