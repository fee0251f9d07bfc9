"""Conversions killed at any point, on a full disk, by two processes: resumed to the same bits, or refused."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsa_jax.checkpoint import conversion, convert, load_config, load_params, verify
from dsa_jax.checkpoint.job import JOURNAL, MARKER, Job
from dsa_jax.checkpoint.orbax_folder import OrbaxReader

ROOT = Path(__file__).resolve().parents[3]
# Small pieces and commits with a pause after each leave time to kill the process in the middle.
SLOW_CONVERT = """
import sys, time
from dsa_jax.checkpoint import conversion, pieces
pieces.PIECE_BYTES, conversion._LARGEST_BATCH = 100_000, 500_000
conversion.convert(sys.argv[1], sys.argv[2], max_shard_bytes=300_000,
                   on_progress=lambda done, total: time.sleep(0.02))
"""


@pytest.fixture
def small_steps(monkeypatch) -> None:
    monkeypatch.setattr("dsa_jax.checkpoint.pieces.PIECE_BYTES", 100_000)
    monkeypatch.setattr(conversion, "_LARGEST_BATCH", 500_000)


def content(path: Path) -> dict[str, bytes]:
    """Arrays of an Orbax checkpoint, or the files of a Hugging Face folder."""
    if not (path / "manifest.ocdbt").is_file():
        return {file.name: file.read_bytes() for file in path.iterdir()}
    reader = OrbaxReader(path)
    whole = {}
    for leaf in reader.leaves:
        region = tuple(slice(0, size) for size in reader.spec(leaf).shape)
        whole["/".join(leaf)] = reader.read(leaf, region).tobytes()
    return whole | {"checksums": (path / "dsa_jax_tensors.json").read_bytes()}


class Crash(BaseException):
    """Not an Exception, so that nothing handles it: as abrupt as a kill, but inside one process."""


def crash_at(monkeypatch, n: int, *, before: bool) -> None:
    record, calls = Job.record, iter(range(10**6))

    def crashing(self: Job, step: dict[str, Any]) -> None:
        if next(calls) == n:
            if not before:
                record(self, step)
            raise Crash
        record(self, step)

    monkeypatch.setattr(Job, "record", crashing)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("at", [0, 5])
def test_a_crash_around_any_step_is_resumed(release, tmp_path, monkeypatch, small_steps, at, before) -> None:
    """before: the step is on disk and not in the journal, as when the process dies between the two."""
    source = release
    for name in ("orbax", "hf"):
        convert(source, tmp_path / f"{name}-whole", max_shard_bytes=500_000)
        with monkeypatch.context() as patch:
            crash_at(patch, at, before=before)
            with pytest.raises(Crash):
                convert(source, tmp_path / name, max_shard_bytes=500_000)
        with pytest.raises(
            ValueError, match=r"unfinished conversion; rerun the same command.*dsa-jax convert"
        ):
            load_config(tmp_path / name)
        outcome = convert(source, tmp_path / name, max_shard_bytes=500_000)
        assert outcome.resumed and outcome.bytes_written <= outcome.total_bytes
        assert content(tmp_path / name) == content(tmp_path / f"{name}-whole")
        assert verify(tmp_path / name).faults == ()
        source = tmp_path / "orbax"


def test_a_crash_leaves_nothing_behind(release, tmp_path, monkeypatch, small_steps) -> None:
    convert(release, tmp_path / "whole")
    with monkeypatch.context() as patch:
        crash_at(patch, 5, before=True)
        with pytest.raises(Crash):
            convert(release, tmp_path / "orbax")
    convert(release, tmp_path / "orbax")
    sizes = [
        sum(file.stat().st_size for file in (tmp_path / name / "d").iterdir()) for name in ("whole", "orbax")
    ]
    assert abs(sizes[0] - sizes[1]) < 0.05 * sizes[0]
    assert not any((tmp_path / "orbax" / name).exists() for name in (MARKER, JOURNAL))


@pytest.mark.parametrize("direction", ["to orbax", "to hf"])
def test_kill_9_at_three_random_points_is_resumed(release, tmp_path, direction, small_steps) -> None:
    source = release
    if direction == "to hf":
        convert(release, tmp_path / "source")
        source = tmp_path / "source"
    convert(source, tmp_path / "whole", max_shard_bytes=300_000)
    command = [sys.executable, "-c", SLOW_CONVERT, str(source), str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    journal, generator = tmp_path / "out" / JOURNAL, random.Random(direction)
    target = 0
    for _ in range(3):
        target += generator.randint(1, 4)
        with subprocess.Popen(command, env=environment) as process:
            while not journal.is_file() or len(journal.read_bytes().splitlines()) < target:
                assert process.poll() is None, "the conversion ended before it was killed"
                time.sleep(0.002)
            time.sleep(generator.uniform(0, 0.05))
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        with pytest.raises(ValueError, match="unfinished conversion"):
            load_params(tmp_path / "out", load_config(release))
    subprocess.run(command, env=environment, check=True)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert verify(tmp_path / "out").faults == ()


def interrupt(release: Path, path: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        crash_at(patch, 2, before=False)
        with pytest.raises(Crash):
            convert(release, path)


def test_another_request_does_not_resume(release, tmp_path, monkeypatch, small_steps) -> None:
    interrupt(release, tmp_path / "out", monkeypatch)
    with pytest.raises(ValueError, match=r"of another kind \(dtype was None, now 'bfloat16'\)"):
        convert(release, tmp_path / "out", dtype="bfloat16")
    changed = tmp_path / "changed"
    shutil.copytree(release, changed)
    with pytest.raises(ValueError, match=r"of another kind \(source was"):
        convert(changed, tmp_path / "out")
    (release / "config.json").touch()
    with pytest.raises(ValueError, match=r"of another kind \(fingerprint was"):
        convert(release, tmp_path / "out")


def test_an_unfinished_conversion_is_refused_as_a_source(release, tmp_path, monkeypatch, small_steps) -> None:
    interrupt(release, tmp_path / "out", monkeypatch)
    for use in (lambda p: convert(p, tmp_path / "next"), verify, load_config):
        with pytest.raises(ValueError, match="unfinished conversion"):
            use(tmp_path / "out")


def test_a_second_process_is_refused(release, tmp_path) -> None:
    request = {"source": "a"}
    with Job(tmp_path / "out", request, ["dsa-jax"]):
        with pytest.raises(
            BlockingIOError, match=f"out is being written by process {os.getpid()} on .*; let it finish"
        ):
            Job(tmp_path / "out", request, ["dsa-jax"])


def test_a_crash_before_the_marker_leaves_the_destination_free(release, tmp_path, monkeypatch) -> None:
    def crash(path: Path, content: bytes) -> None:
        path.with_name(path.name + ".partial").write_bytes(content[:5])
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr("dsa_jax.checkpoint.job.write_atomically", crash)
        with pytest.raises(Crash):
            convert(release, tmp_path / "out")
    assert not convert(release, tmp_path / "out").resumed
    assert sorted(file.name for file in (tmp_path / "out").iterdir() if "INCOMPLETE" in file.name) == []


def test_verify_uses_the_piece_size_of_the_checksums(release, tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("dsa_jax.checkpoint.pieces.PIECE_BYTES", 100_000)
        convert(release, tmp_path / "orbax")
    assert verify(tmp_path / "orbax").faults == ()


def test_a_disk_too_small_is_refused_before_writing(release, tmp_path, monkeypatch) -> None:
    usage = type(shutil.disk_usage(tmp_path))(1000, 990, 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"has 10 bytes free and [\d,]+ are still to be written"):
        convert(release, tmp_path / "out")


@pytest.mark.parametrize("direction", ["to orbax", "to hf"])
def test_a_full_disk_is_reported_and_the_conversion_resumed(release, tmp_path, direction) -> None:
    """A limit on the size of files stands in for the full disk: the write fails half way."""
    source = release
    if direction == "to hf":
        convert(release, tmp_path / "source")
        source = tmp_path / "source"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, before[1]))
        with pytest.raises(OSError, match="same command again"):
            convert(source, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, previous)
    assert json.loads((tmp_path / "out" / MARKER).read_text())["command"]
    assert convert(source, tmp_path / "out").resumed
    assert verify(tmp_path / "out").faults == ()


def test_a_flipped_bit_is_found_by_verify(release, tmp_path) -> None:
    convert(release, tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "hf")
    for path, file in (("orbax", max((tmp_path / "orbax" / "d").iterdir(), key=lambda f: f.stat().st_size)),
                       ("hf", tmp_path / "hf" / "model.safetensors")):  # fmt: skip
        content = np.fromfile(file, np.uint8)
        content[len(content) // 2] ^= 1
        content.tofile(file)
        faults = verify(tmp_path / path).faults
        assert len(faults) == 1 and (
            "differs from its checksum" in faults[0] or "cannot be read" in faults[0]
        )
