"""A run killed with SIGKILL resumes to the same bits as an uninterrupted run."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from train.metrics import METRICS_FILE, read_lines

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


def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    step = random.randrange(8, STEPS)  # after the first checkpoint
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
