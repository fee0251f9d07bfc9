"""Whole runs: results of the quick run, and messages about bad input and failed training."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

import train.__main__ as command
from dsa_jax.checkpoint import write_hf
from tests.train.same import assert_same_bits
from tests.train.small import CONFIG, OPTIONS, STAGES, initial, small_run
from train.checkpoint import Checkpoints
from train.config import Lora, MeshSpec, Source, dense
from train.data.sources import rows_of, training_batches, validation_batches
from train.evaluation import summarise
from train.initial import from_checkpoint, initial_params
from train.metrics import METRICS_FILE, JsonLines, read_lines
from train.runs import RUNS
from train.step import compiled_step
from train.trainer import train as run_all

REPOSITORY = Path(__file__).parents[2]
SHORT = (dense(6, lr=1e-3), dataclasses.replace(STAGES[1], steps=6))


def quiet() -> Console:
    return Console(quiet=True)


# -- the quick run


@pytest.fixture(scope="module")
def nano_cpu(tmp_path_factory):
    """(exit code, standard output, lines of eval.jsonl) of `python -m train nano_cpu`."""
    folder = tmp_path_factory.mktemp("nano_cpu")
    done = subprocess.run(
        [sys.executable, "-m", "train", "nano_cpu", "--folder", str(folder)],
        cwd=REPOSITORY, env=os.environ | {"XLA_FLAGS": "", "COLUMNS": "80"}, capture_output=True, text=True,
        timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout, read_lines(folder / "eval.jsonl")


@pytest.mark.slow
@pytest.mark.xdist_group("quick run")  # its fixture trains for minutes: once, not once per worker
class TestQuickRun:
    def test_it_prints_the_evaluation_of_each_stage(self, nano_cpu):
        printed, evaluations = nano_cpu
        rows = {words[0]: words[1:] for words in map(str.split, printed.splitlines()) if len(words) == 9}
        for line in evaluations:
            numbers = [line["ce_dense"], line["ce_sparse"], line["accuracy_dense"], line["accuracy_sparse"]]
            expected = [f"{number:.4f}" for number in numbers[:2]] + [
                f"{number:.3f}" for number in numbers[2:]
            ]
            assert rows[line["after"]][:5] == [str(line["step"]), *expected]

    def test_the_dense_model_learns_the_task_and_an_untrained_indexer_loses_it(self, nano_cpu):
        start, after_dense, after_warmup, end = nano_cpu[1]
        assert [line["step"] for line in nano_cpu[1]] == [0, 200, 350, 400]
        assert start["accuracy_dense"] < 0.3
        assert after_dense["accuracy_dense"] > 0.98
        assert after_dense["accuracy_sparse"] < 0.5
        assert after_warmup["accuracy_sparse"] > 0.9
        assert end["accuracy_sparse"] > 0.97 and end["accuracy_dense"] > 0.97

    def test_the_warm_up_changes_no_bit_of_the_model(self, nano_cpu):
        _, before, after, end = nano_cpu[1]
        assert after["ce_dense"] == before["ce_dense"]
        assert after["model_sha256"] == before["model_sha256"] != end["model_sha256"]

    def test_after_the_warm_up_each_indexer_beats_recency(self, nano_cpu):
        _, before, after, _ = nano_cpu[1]
        assert len(after["indexer"]) == 3  # two layers and the MTP layer
        for was, now in zip(before["indexer"], after["indexer"], strict=True):
            assert now["kl"] < 0.5 * min(was["kl"], now["kl_recency"], now["kl_uniform"])
            assert now["recall"] > 0.9 * now["recall_oracle"] > 1.1 * was["recall"]


# -- data


def test_stages_with_equal_seeds_see_the_same_batches():
    run = small_run()
    first, second = (next(training_batches(run, stage)) for stage in STAGES[:2])
    other = next(training_batches(run, dataclasses.replace(STAGES[0], data_seed=1)))
    assert all((first[name] == second[name]).all() for name in first)
    assert (first["tokens"] != other["tokens"]).any()


def test_validation_is_always_the_same_and_never_trained_on():
    run = small_run(eval_batches=3)
    ours, again = validation_batches(run), validation_batches(run)
    assert len(ours) == 3
    assert all((a["tokens"] == b["tokens"]).all() for a, b in zip(ours, again, strict=True))
    rows = [rows_of(run.data[0], run.seq_len, split) for split in ("train", "validation")]
    assert all((rows[0][i]["tokens"] != rows[1][i]["tokens"]).any() for i in range(20))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Source(kind="text"), "needs the folder that `python -m train.data.prepare` wrote"),
        (Source(kind="text", folder="/nowhere"), "/nowhere has no manifest.json"),
        (Source(kind="associative_recall"), "'associative_recall': missing a required argument: 'n_keys'"),
        (Source(kind="associative_recall", options=(*OPTIONS, ("keys", 3))), "unexpected keyword argument 'keys'"),
        (Source(kind="associative_recall", options=(*OPTIONS[:2], ("n_pairs", 9))), "n_pairs must not exceed n_keys"),
        (
            Source(kind="associative_recall", options=(("n_keys", 50), *OPTIONS[1:])),
            "vocab_size must hold the ids of its data, got 42 < 272 of a source of kind 'associative_recall'",
        ),
        (
            Source(
                kind="needles",
                options=(("n_needles", 2), ("first_key", 9), ("n_keys", 9), ("first_value", 40), ("n_values", 8)),
            ),
            "got 42 < 48 of a source of kind 'needles'",
        ),
    ],
)  # fmt: skip
def test_data_that_do_not_fit_are_refused(source, message):
    with pytest.raises(ValueError) as error:
        training_batches(small_run(data=(source,)), STAGES[0])
    assert message in str(error.value)


# -- metrics


def test_a_resumed_run_drops_later_lines_and_a_cut_line(tmp_path):
    """A killed process may leave an incomplete line; the next line must not be appended to it."""
    path = tmp_path / METRICS_FILE
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)) + '{"step": 4, "lo')
    lines = JsonLines(path, resume_at=3)
    lines.add({"step": 4})
    lines.close()
    assert read_lines(path) == [{"step": 1}, {"step": 2}, {"step": 3}, {"step": 4}]

    again = JsonLines(path, resume_at=2)
    assert again.lines == [{"step": 1}, {"step": 2}] == read_lines(path)
    again.close()
    JsonLines(path, resume_at=-1).close()
    assert read_lines(path) == []


def test_a_line_that_is_not_json_is_named(tmp_path):
    path = tmp_path / METRICS_FILE
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(ValueError, match="metrics.jsonl, line 2 is not JSON"):
        read_lines(path)


def test_the_table_of_a_run_fits_eighty_columns():
    layer = {"kl": 0.1234, "recall": 0.4, "recall_oracle": 0.5}
    line = {"after": "indexer_warmup", "step": 12000, "indexer": [layer, layer | {"recall": 0.3}]}
    line |= dict.fromkeys(("ce_dense", "ce_sparse"), 5.76543) | dict.fromkeys(
        ("accuracy_dense", "accuracy_sparse"), 1.0
    )
    console = Console(record=True, width=80, quiet=False, file=open(os.devnull, "w"))
    with console.file:
        summarise([line], console)
    (row,) = [row for row in console.export_text().splitlines() if "indexer_warmup" in row]
    assert row.split() == [
        "indexer_warmup",
        "12000",
        "5.7654",
        "5.7654",
        "1.000",
        "1.000",
        "0.1234",
        "0.700",
        "0.600",
    ]


# -- failures


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """The folder of a run of two short stages, evaluated on one batch."""
    folder = tmp_path_factory.mktemp("short")
    trained = run_all(small_run(*SHORT, eval_batches=1, checkpoint_every=4), folder, quiet())
    return folder, trained


def test_a_finished_run_has_an_evaluation_per_stage_and_rerunning_changes_nothing(short_run):
    folder, trained = short_run
    run = small_run(*SHORT, eval_batches=1, checkpoint_every=4)
    files = {name: (folder / name).read_bytes() for name in ("eval.jsonl", "metrics.jsonl", "config.json")}
    again = run_all(run, folder, quiet())
    assert_same_bits(again, trained)
    assert files == {name: (folder / name).read_bytes() for name in files}

    evaluations = read_lines(folder / "eval.jsonl")
    assert [(line["step"], line["after"]) for line in evaluations] == [
        (0, "before"), (6, "dense"), (12, "indexer_warmup"),
    ]  # fmt: skip
    assert evaluations[1]["ce_dense"] == evaluations[2]["ce_dense"]
    assert [line["step"] for line in read_lines(folder / METRICS_FILE)] == list(range(1, 13))


def test_a_folder_of_another_run_is_refused_and_left_alone(short_run):
    folder, _ = short_run
    config = (folder / "config.json").read_bytes()
    with pytest.raises(ValueError, match=r"written by another run; .*stages\[0\].lr: then 0.001, now 0.002"):
        run_all(small_run(dense(6, lr=2e-3), SHORT[1], eval_batches=1), folder, quiet())
    assert (folder / "config.json").read_bytes() == config


def test_a_loss_that_is_not_finite_stops_the_run_and_is_located(tmp_path, monkeypatch):
    """Step 5 uses parameters that are not finite. It is noticed at step 6, because only every third step is checked."""

    def poisoned(*of_stage):
        step = compiled_step(*of_stage)

        def one_step(state, batch):
            if int(state.step) == 4:
                params = jax.tree.map(lambda leaf: leaf * np.nan, state.params)
                state = dataclasses.replace(state, params=params)
            return step(state, batch)

        return one_step

    monkeypatch.setattr("train.trainer.compiled_step", poisoned)
    run = small_run(*SHORT, checkpoint_every=2, log_every=3)
    with pytest.raises(FloatingPointError) as error:
        run_all(run, tmp_path, quiet())
    message = str(error.value)
    assert message.startswith("step 5: ") and "loss" in message and "ce" in message
    assert f"the last good checkpoint is step 4 in {tmp_path}" in message
    assert [line["step"] for line in read_lines(tmp_path / METRICS_FILE)] == [1, 2, 3, 4]

    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    kept = checkpoints.restore(run, initial())
    checkpoints.close()
    assert int(kept.state.step) == 4
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(kept.state.params))


# -- a checkpoint to start from, and the command line


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A small model as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("released") / "model"
    write_hf(folder, jax.device_get(initial()), dataclasses.replace(CONFIG, fp8=None))
    return folder


def test_a_run_from_a_checkpoint_starts_with_its_sizes_and_bits(released):
    bigger = dataclasses.replace(CONFIG, d_model=64, n_layers=3, query_block=16, remat="layer")
    run = from_checkpoint(small_run(model=bigger, init_from=str(released)))
    assert (run.model.d_model, run.model.n_layers) == (CONFIG.d_model, CONFIG.n_layers)
    assert (run.model.query_block, run.model.remat, run.model.dtype) == (16, "layer", "float32")
    params = initial_params(run)
    assert jax.tree.structure(params) == jax.tree.structure(initial())
    assert_same_bits(params, initial())

    with_lora = initial_params(dataclasses.replace(run, lora=Lora(rank=2)))
    assert set(with_lora) == {"params", "lora"}
    assert_same_bits(with_lora["params"], initial()["params"])


def test_without_a_checkpoint_a_run_stays_as_it_is():
    run = small_run()
    assert from_checkpoint(run) is run


@pytest.fixture
def calls(monkeypatch):
    """The arguments that the command passes to train(), which is replaced."""
    found = []
    monkeypatch.setattr("train.trainer.train", lambda run, folder: found.append((run, folder)))
    return found


def test_the_command_takes_overrides_at_any_depth(calls):
    overrides = (
        "--run.stages.0.steps 30 --run.stages.2.lr 0.5 --run.batch 4 --run.model.index-topk 16 --run.seed 3"
    )
    assert (
        command.main(["nano_cpu", *overrides.split(), "--run.data.0.options", "n_keys", "8", "n_values", "2"])
        == 0
    )
    ((run, folder),) = calls
    expected = RUNS["nano_cpu"]()
    stages = (
        dataclasses.replace(expected.stages[0], steps=30),
        expected.stages[1],
        dataclasses.replace(expected.stages[2], lr=0.5),
    )
    data = (dataclasses.replace(expected.data[0], options=(("n_keys", 8), ("n_values", 2))),)
    model = dataclasses.replace(expected.model, index_topk=16)
    assert run == dataclasses.replace(expected, stages=stages, data=data, model=model, batch=4, seed=3)
    assert folder == Path("runs/nano_cpu")


def test_the_command_takes_a_mesh_and_otherwise_keeps_the_runs(calls, monkeypatch):
    assert command.main(["nano_cpu", "--mesh.expert", "2", "--mesh.data", "1"]) == 0
    monkeypatch.setitem(RUNS, "meshed", lambda: small_run(mesh=MeshSpec(tensor=2)))
    assert command.main(["meshed"]) == command.main(["nano_cpu"]) == 0
    assert command.main(["meshed", "--run.mesh.context", "2"]) == 0
    assert [run.mesh for run, _ in calls] == [
        MeshSpec(data=1, expert=2), MeshSpec(tensor=2), None, MeshSpec(tensor=2, context=2),
    ]  # fmt: skip


def test_the_command_starts_from_a_checkpoint_with_adapters(calls, released, tmp_path):
    arguments = ["nano_cpu", "--init-from", str(released), "--lora-rank", "4", "--folder", str(tmp_path)]
    assert command.main([*arguments, "--run.seq-len", "16"]) == 0
    ((run, folder),) = calls
    assert (run.model.d_model, run.lora, run.init_from) == (
        CONFIG.d_model,
        Lora(rank=4, alpha=8.0),
        str(released),
    )
    assert folder == tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--init-from", "/nowhere"], "no folder /nowhere"),
        (["--lora-rank", "0"], "rank must be at least 1 and alpha positive, got 0"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(calls, capsys, arguments, message):
    assert command.main(["nano_cpu", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"python -m train: {message}")
    with pytest.raises((ValueError, OSError), match=message):
        command.main(["nano_cpu", *arguments, "--traceback"])
    assert not calls


def test_training_that_stops_is_exit_code_1(monkeypatch, capsys):
    def stop(run, folder):
        raise FloatingPointError("step 7: loss not finite")

    monkeypatch.setattr("train.trainer.train", stop)
    assert command.main(["nano_cpu"]) == 1
    assert capsys.readouterr().err == "python -m train: step 7: loss not finite\n"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--help"], 0, ["nano_cpu", "Examples:", "python -m train nano_cpu", "--init-from CHECKPOINT"]),
        (
            ["nano_cpu", "--help"],
            0,
            [
                "under four minutes",
                "--run.stages.0.steps",
                "--folder",
                "--lora-rank",
                "--mesh.expert",
                "--distributed",
                "--coordinator",
                "--num-processes",
                "--process-id",
                "--heartbeat-timeout",
            ],
        ),
        ([], 2, ["nano_cpu"]),
        (["nano_cpu", "--run.stages.0.stepz", "3"], 2, ["--run.stages.0.stepz", "--run.stages.0.steps"]),
        (["nano_cpu", "--run.stages.0.steps", "-3"], 2, ["needs steps >= 1"]),
    ],
)
def test_the_command_explains_itself(capsys, monkeypatch, arguments, code, words):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == code
    printed = capsys.readouterr()
    assert not [word for word in words if word not in printed.out + printed.err], printed
