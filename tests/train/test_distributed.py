"""Two processes with four devices each match one process with eight, and neither waits for the other forever."""

import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

import train.__main__ as command
from tests.train.worker import small
from train.config import MeshSpec
from train.distributed import AGAIN, Hosts, check_shared
from train.metrics import METRICS_FILE, read_lines
from train.trainer import train

pytestmark = [
    pytest.mark.xdist_group("processes"),  # one at a time: each test uses both cores
    pytest.mark.devices(8),
]

REPOSITORY = Path(__file__).parents[2]
MESH = {"expert": 2, "tensor": 2}
MESH_FLAGS = ["--mesh.expert", "2", "--mesh.tensor", "2"]
WATCHES = """
import sys, time
from train.distributed import Hosts, connected
hosts = Hosts(coordinator=sys.argv[1], num_processes=2, process_id=int(sys.argv[2]), heartbeat_timeout=5)
with connected(hosts, {}):
    print("connected", flush=True)
    if sys.argv[3] == "fails" and hosts.process_id == 1:
        raise OSError("the disk is full")
    time.sleep(60)
"""


STARTED: list["Process"] = []


@pytest.fixture(autouse=True)
def no_process_is_left_running():
    yield
    while STARTED:
        STARTED.pop().kill()


class Process:
    """A Python program with four simulated devices; its standard output and errors go to ``log``."""

    def __init__(self, log: Path, *arguments: str) -> None:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4", "XLA_FLAGS": "--xla_backend_optimization_level=0",
        }  # fmt: skip
        self.log = log
        with log.open("w") as file:
            self.running = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=REPOSITORY,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def output(self) -> str:
        return self.log.read_text()

    def ends(self, code: int, within: float, *patterns: str) -> None:
        """It exits by itself in time, and the last line of its output matches these patterns."""
        try:
            ended_with = self.running.wait(timeout=within)
        except subprocess.TimeoutExpired:
            ended_with = None
        assert ended_with == code, self.output()[-4000:]
        last = self.output().strip().splitlines()[-1] if patterns else ""
        for pattern in patterns:
            assert re.search(pattern, last), self.output()[-4000:]

    def kill(self) -> None:
        self.running.send_signal(signal.SIGKILL)
        self.running.wait()

    def wait_until(self, condition, within: float = 200) -> None:
        deadline = time.monotonic() + within
        while not condition():
            assert self.running.poll() is None and time.monotonic() < deadline, self.output()[-4000:]
            time.sleep(0.02)


def coordinator() -> str:
    """HOST:PORT with a free port."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return f"localhost:{probe.getsockname()[1]}"


def start(folder: Path, *flags: str, ids=(0, 1), counts=(2, 2), flags_of=((), ())) -> list[Process]:
    """Two processes of `python -m train small`."""
    at = coordinator()
    return [
        Process(
            folder.with_name(f"{at}-{process}.log"), "-m", "tests.train.worker", "small",
            "--folder", str(folder), "--coordinator", at, "--num-processes", str(count),
            "--process-id", str(process), *flags, *own,
        )
        for process, count, own in zip(ids, counts, flags_of, strict=True)
    ]  # fmt: skip


def curve(folder: Path) -> dict[str, np.ndarray]:
    """All metrics of every step."""
    lines = read_lines(folder / METRICS_FILE)
    assert [line["step"] for line in lines] == list(range(1, 21))
    names = [name for name in lines[0] if name != "stage"]
    return {name: np.array([line[name] for line in lines]) for name in names}


def alone(folder: Path, **changes) -> dict[str, np.ndarray]:
    """The curve of a run in this process, which has eight devices."""
    train(dataclasses.replace(small(), **changes), folder, Console(quiet=True))
    return curve(folder)


def close(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], rtol: float) -> None:
    assert set(ours) == set(theirs)
    for name in ours:
        scale = np.abs(theirs[name]).max()
        np.testing.assert_allclose(ours[name], theirs[name], rtol=rtol, atol=rtol * scale, err_msg=name)


@pytest.mark.slow
def test_two_processes_match_one_even_when_one_of_them_is_killed(tmp_path):
    folder = tmp_path / "run"
    flags = (*MESH_FLAGS, "--heartbeat-timeout", "10")
    first, second = start(folder, *flags)
    metrics = folder / METRICS_FILE
    first.wait_until(lambda: metrics.is_file() and len(read_lines(metrics)) >= 10)
    second.kill()
    first.ends(1, 40, f"^python -m train: process 1 of 2 sent no heartbeat for 10 s; {AGAIN}")

    first, second = start(folder, *flags)
    first.wait_until(lambda: re.search("resuming after step (4|8|12|16) of 20", first.output()))
    second.running.send_signal(signal.SIGTERM)  # arrives while the step compiles
    saved = "a process was asked to end; the checkpoint of step ([0-9]+) is in"
    for process in (first, second):
        process.ends(1, 200, f"^python -m train: .*{saved}")
    assert "resuming" not in second.output() and "KL " not in second.output()  # only process 0 prints

    for process in (again := start(folder, *flags)):
        process.ends(0, 200)
    assert f"resuming after step {re.search(saved, first.output())[1]} of 20" in again[0].output()
    together = curve(folder)
    close(together, alone(tmp_path / "mesh", mesh=MeshSpec(**MESH)), rtol=1e-6)
    close(together, alone(tmp_path / "one"), rtol=1e-5)


def test_a_process_that_does_not_start_is_waited_for_until_the_timeout(tmp_path):
    first, *_ = start(tmp_path / "run", "--start-timeout", "2", ids=(0,), counts=(2,), flags_of=((),))
    first.ends(1, 40, r"process \(0 of 2, process 0 at localhost:\d+\) waited 2 s for all others; start")


def test_processes_with_different_options_name_the_differences(tmp_path):
    flags_of = (("--mesh.tensor", "2"), ("--mesh.tensor", "4", "--run.batch", "16"))
    first, second = start(tmp_path / "run", "--heartbeat-timeout", "5", flags_of=flags_of)
    alike = "^python -m train: all processes of a run must be started with the same options: "
    first.ends(
        2,
        40,
        alike + "batch is 8 in process 0 and 16 in process 1; mesh.tensor is 2 in .* 0 and 4 in process 1$",
    )
    second.ends(
        2,
        20,
        alike + "batch is 16 in process 1 and 8 in process 0; mesh.tensor is 4 in .* 1 and 2 in process 0$",
    )


def test_processes_with_different_process_counts_say_so(tmp_path):
    first, second = start(tmp_path / "run", "--heartbeat-timeout", "5", counts=(2, 3))
    first.ends(2, 40, "the number of processes is 2 in process 0 and 3 in process 1$")
    second.ends(2, 20, "the number of processes is 3 in process 1 and 2 in process 0$")


def test_an_id_that_the_coordinator_does_not_expect_is_refused(tmp_path):
    first, second = start(tmp_path / "run", "--start-timeout", "10", ids=(0, 2), counts=(2, 3))
    second.ends(1, 40, "^python -m train: the coordinator refused this process for the reason above: do all")
    first.ends(1, 40, "waited 10 s for all others")


def watching(tmp_path, what: str) -> list[Process]:
    at = coordinator()
    pair = [Process(tmp_path / str(i), "-c", WATCHES, at, str(i), what) for i in (0, 1)]
    for process in pair:
        process.wait_until(lambda output=process.output: "connected" in output())
    return pair


def test_the_others_exit_when_the_coordinator_is_killed(tmp_path):
    first, second = watching(tmp_path, "sleeps")
    first.kill()
    second.ends(1, 20, f"^python -m train: process 0, the coordinator at localhost:.*, is gone; {AGAIN}")


def test_the_others_say_why_one_stopped(tmp_path):
    first, second = watching(tmp_path, "fails")
    first.ends(1, 20, f"^python -m train: process 1 of 2 stopped: the disk is full; {AGAIN}")
    second.ends(1, 20, "OSError: the disk is full")


def test_a_folder_that_one_host_does_not_see_is_refused_on_all(tmp_path, monkeypatch):
    """Seen from process 1 of two, while process 0 writes to a disk of its own."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr("train.distributed.sync_global_devices", lambda name: None)
    monkeypatch.setattr("train.distributed.process_allgather", lambda seen: np.array([1, seen]))
    with pytest.raises(ValueError, match=r"must be on a disk that all .* share; processes \[1\] do not see"):
        check_shared(tmp_path)


def test_flags_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="belong together, got host:1 and None and 0"):
        Hosts(coordinator="host:1", process_id=0)
    with pytest.raises(ValueError, match="must be HOST:PORT, got host"):
        Hosts(coordinator="host", num_processes=2, process_id=1)
    with pytest.raises(ValueError, match="must be in 0 ... --num-processes - 1, got 2 of 2"):
        Hosts(coordinator="host:1", num_processes=2, process_id=2)
    with pytest.raises(ValueError, match="at least 1 second, got 300 and 0"):
        Hosts(heartbeat_timeout=0)


def test_several_slurm_processes_without_the_flag_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert command.main(["nano_cpu"]) == 2
    assert (
        "srun started 4 processes, each of which would train the whole run: give --distributed"
        in capsys.readouterr().err
    )


def test_without_an_environment_the_missing_flags_are_named(tmp_path):
    process = Process(tmp_path / "log", "-m", "tests.train.worker", "small", "--distributed")
    process.ends(2, 40, "no TPU pod, SLURM or MPI environment was found; give --coordinator HOST:PORT")
