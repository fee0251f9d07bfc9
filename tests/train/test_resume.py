"""A run killed with SIGKILL resumes to the same bits as an uninterrupted run."""

import dataclasses
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from tests.train.small import small_run
from train.config import dense
from train.metrics import METRICS_FILE, read_lines
from train.trainer import train

REPOSITORY = Path(__file__).parents[2]
STEPS = 50


def start(folder: Path) -> subprocess.Popen:
    """The small run of 50 steps through all stages, in its own process."""
    folder.mkdir(exist_ok=True)
    with (folder / "log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.train.small", str(folder)],
            cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip


def finish(process: subprocess.Popen, folder: Path) -> None:
    assert process.wait(timeout=400) == 0, (folder / "log").read_text()[-4000:]


def steps_done(folder: Path) -> int:
    lines = read_lines(folder / METRICS_FILE) if (folder / METRICS_FILE).is_file() else []
    return lines[-1]["step"] if lines else 0


def kill_at(process: subprocess.Popen, folder: Path, step: int) -> None:
    while steps_done(folder) < step:
        assert process.poll() is None, (folder / "log").read_text()[-4000:]
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()


TIMING = {"tokens_per_s", "flops_per_s", "memory_bytes"}


def curve(folder: Path) -> list[dict]:
    """All metrics of every step except timings."""
    lines = read_lines(folder / METRICS_FILE)
    return [{name: value for name, value in line.items() if name not in TIMING} for line in lines]


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    step = random.randrange(1, STEPS)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(whole), whole)  # first, so that the others find the compilation cache filled
    victim = start(killed)
    try:
        kill_at(victim, killed, step)
        left_at = steps_done(killed)
        finish(start(killed), killed)
    finally:
        victim.kill()
        victim.wait()

    said = f"killed at step {left_at}"
    if left_at > 21:  # checkpoints are written every seven steps and after each stage
        assert "resuming after step" in (killed / "log").read_text(), said
    assert [line["step"] for line in curve(killed)] == list(range(1, STEPS + 1)), said
    assert curve(killed) == curve(whole), said
    with np.load(whole / "final.npz") as ours, np.load(killed / "final.npz") as theirs:
        assert set(ours) == set(theirs) and len(ours) > 40
        different = [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()]
    assert not different, said


def test_a_stage_resumed_in_the_middle_continues_with_the_batch_that_followed(tmp_path, monkeypatch):
    seen: list[np.ndarray] = []
    stop_at = None

    def recorded(*of_stage):
        def step(state, batch):
            if len(seen) == stop_at:
                raise InterruptedError
            seen.append(np.asarray(batch["tokens"]))
            metrics = {"finite": jnp.bool_(True), "loss": jnp.float32(0.0), "max_load_ratio": jnp.zeros(0)}
            return dataclasses.replace(state, step=state.step + 1), metrics

        return step

    monkeypatch.setattr("train.trainer.compiled_step", recorded)
    run, quiet = small_run(dense(9, lr=1e-3), checkpoint_every=4), Console(quiet=True)
    train(run, tmp_path / "whole", quiet)
    whole, seen, stop_at = seen, [], 6
    with pytest.raises(InterruptedError):
        train(run, tmp_path / "killed", quiet)
    seen, stop_at = [], None
    train(run, tmp_path / "killed", quiet)  # from the checkpoint of step 4
    np.testing.assert_array_equal(seen, whole[4:])
    assert len({batch.tobytes() for batch in whole}) == 9
