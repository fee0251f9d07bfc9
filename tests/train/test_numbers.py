"""Every number of the training side's command lines is taken, or refused in one line, before anything is read."""

import dataclasses

import pytest

import train.__main__ as training
import train.aot as aot
import train.data.prepare as preparing
import train.export as exporting
from tests.dsa_jax.commands.test_numbers import VALUES
from train.aot.options import Options
from train.config import Lora, MeshSpec, Run, Source, Stage
from train.limits import LIMITS

LARGE, HUGE = str(2**31), str(2**63)
ALL = (*VALUES, "0.5", str(10**400))
NUMBER = ("0", "0.5", LARGE, HUGE)  # a finite number, at least 0
# Command -> option -> those of ALL that it takes.
TAKEN = {
    "train": {
        "lora-rank": (), "mesh.data": (), "mesh.expert": (), "mesh.context": (), "mesh.tensor": (),
        "run.batch": (), "run.seq-len": (), "run.seed": ("0",), "run.checkpoint-every": (), "run.keep": (),
        "run.log-every": (), "run.eval-batches": ("0",), "run.stages.0.steps": (), "run.stages.0.lr": NUMBER[1:],
        "run.stages.1.index-lr": NUMBER[1:], "run.stages.0.lr-warmup": ("0",), "run.stages.0.lr-end": NUMBER,
        "run.stages.0.clip": NUMBER[1:], "run.stages.0.weight-decay": NUMBER, "run.stages.0.mtp-weight": NUMBER,
        "run.stages.0.balance-weight": NUMBER, "run.stages.0.bias-step": NUMBER, "run.stages.0.data-seed": ("0",),
        "run.data.0.weight": NUMBER[1:], "run.model.vocab-size": (), "run.model.d-model": (),
        "run.model.route-scale": NUMBER[1:], "run.model.query-block": (),
    },
    "prepare": {"vocab-size": (), "validation-share": ("0.5",)},
    "export": {"max-shard-bytes": (LARGE, HUGE, str(10**400))},
    "aot": {"seq-len": (), "batch": (), "layers": (), "chunk": (), "query-block": (), "tries": ()},
}  # fmt: skip
CASES = [
    (command, option, value, value in taken)
    for command, options in TAKEN.items()
    for option, taken in options.items()
    for value in ALL
]


class Started(Exception):
    """Takes the place of the work."""


@pytest.fixture(autouse=True)
def work_is_noticed(monkeypatch) -> None:
    def start(*args, **kwargs):
        raise Started

    monkeypatch.delenv("DSA_JAX_TRACEBACK", raising=False)
    monkeypatch.setattr("train.trainer.train", start)
    monkeypatch.setattr("train.export.trained", start)
    monkeypatch.setattr("train.data.prepare.read_source", start)
    monkeypatch.setattr("train.aot.command.introduce", start)


def call(command: str, option: str, value: str, tmp_path) -> int:
    given = f"--{option}={value}"
    if command == "train":
        return training.main(["nano_cpu", given])
    if command == "prepare":
        return preparing.main(["stdlib", "--out", str(tmp_path / "out"), given])
    if command == "export":
        return exporting.main([str(tmp_path), str(tmp_path / "out"), given])
    needed = {
        "--config": "tiny",
        "--topology": "h200:8",
        "--mode": "prefill",
        "--seq-len": "64",
        "--batch": "8",
    }
    return aot.main([f"{name}={text}" for name, text in (needed | dict([given.split("=")])).items()])


def test_the_limits_name_every_number_that_describes_a_run() -> None:
    fields = {
        field.name
        for described in (Run, Stage, Source, Lora, MeshSpec)
        for field in dataclasses.fields(described)
        if field.type in ("int", "float", "int | None", "float | None")
    }
    assert set(LIMITS) == fields


def test_the_table_names_every_number_of_the_options() -> None:
    numbers = {field.name for field in dataclasses.fields(Options) if field.type in (int, int | None)}
    assert {option.replace("-", "_") for option in TAKEN["aot"]} == numbers


@pytest.mark.parametrize(("command", "option", "value", "taken"), CASES, ids=lambda value: str(value)[:20])
def test_a_number_is_taken_or_refused_in_one_line(tmp_path, capsys, command, option, value, taken) -> None:
    if taken:
        with pytest.raises(Started):
            call(command, option, value, tmp_path)
        return
    try:
        assert call(command, option, value, tmp_path) == 2
    except SystemExit as stopped:  # tyro's or argparse's own check of a number
        assert stopped.code == 2
        return
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(("python -m train", "dsa-jax aot: ")) and "Traceback" not in line
    assert not (tmp_path / "out").exists()
