"""Locks: one holder, by any spelling of the path; none is left over; nothing is touched by who is refused."""

import os
import signal
import subprocess
import sys

import pytest

from dsa_jax.checkpoint import job
from dsa_jax.checkpoint.job import JOURNAL, MARKER, Job
from dsa_jax.checkpoint.lock import WriteLock, lock_folder, lock_output

HOLDS = """
import fcntl, sys, time
stream = open(sys.argv[1], "w")
fcntl.flock(stream, fcntl.LOCK_EX)
print("process 7 on elsewhere", file=stream, end="", flush=True)
print("held", flush=True)
time.sleep(60)
"""


def test_a_folder_is_locked_by_every_spelling_of_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    with lock_folder(folder):
        (tmp_path / "link").symlink_to(folder)
        for spelling in (folder, tmp_path / "x" / ".." / "run", tmp_path / "link", type(folder)("run")):
            with pytest.raises(BlockingIOError, match=f"is being written by process {os.getpid()} on "):
                lock_folder(spelling)
        lock_folder(folder, ".report.lock").release()  # of another name
    assert list(folder.iterdir()) == []
    lock_folder(tmp_path / "link").release()


def test_an_output_is_locked_whether_it_exists_or_not_and_through_a_link(tmp_path):
    file = tmp_path / "new" / "numbers.json"
    (tmp_path / "link").symlink_to(tmp_path / "new")
    with lock_output(file):
        with pytest.raises(BlockingIOError, match=r"link/numbers.json is being written by"):
            lock_output(tmp_path / "link" / "numbers.json")
        lock_output(tmp_path / "new" / "others.json").release()
    assert list(file.parent.iterdir()) == []


def test_the_lock_of_a_killed_process_does_not_hold(tmp_path):
    file = tmp_path / ".lock"
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(file)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(
            BlockingIOError, match="is being written by process 7 on elsewhere; let it finish"
        ):
            lock_folder(tmp_path)
        holder.send_signal(signal.SIGKILL)
    with lock_folder(tmp_path):
        assert f"process {os.getpid()}" in file.read_text()


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_again(tmp_path, monkeypatch):
    """The last holder removes the file between our opening and locking it: what we hold then is no lock."""
    opened, calls = os.open, []

    def removed_once(path, *rest, **named):
        descriptor = opened(path, *rest, **named)
        calls.append(path)
        if len(calls) == 1:
            os.unlink(path)
        return descriptor

    monkeypatch.setattr(os, "open", removed_once)
    with lock_folder(tmp_path):
        assert len(calls) == 2 and (tmp_path / ".lock").is_file()
        with pytest.raises(BlockingIOError):
            lock_folder(tmp_path)


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    for lock, path in ((lock_folder, tmp_path / "file"), (lock_output, tmp_path / "file" / "out")):
        with pytest.raises(OSError) as error:
            lock(path)
        assert str(error.value).startswith(f"{path} cannot be written: ")
        assert "is a file, not a folder" in str(error.value)
    with pytest.raises(OSError, match="cannot be written: its name is too long"):
        lock_folder(tmp_path / ("x" * 300))


def test_a_file_system_without_locks_is_written_with_a_warning(tmp_path, monkeypatch, caplog):
    def unsupported(descriptor, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("dsa_jax.checkpoint.lock.fcntl.flock", unsupported)
    with lock_folder(tmp_path):
        assert "cannot be locked (Operation not supported): do not write it from two processes" in caplog.text


def test_a_conversion_that_another_process_finished_meanwhile_is_not_begun_again(tmp_path, monkeypatch):
    """It is unfinished when we look, finished when we have the lock: the marker counts that is there then."""
    request, out = {"source": "a"}, tmp_path / "out"
    first = Job(out, request, ["dsa-jax"])

    def finished_meanwhile(folder, name) -> WriteLock:
        (folder / "model.safetensors").touch()
        first.finish()
        return lock_folder(folder, name)

    monkeypatch.setattr(job, "lock_folder", finished_meanwhile)
    with pytest.raises(ValueError, match="out exists and is not an unfinished conversion"):
        Job(out, request, ["dsa-jax"])
    assert [file.name for file in out.iterdir()] == ["model.safetensors"]
    assert not (out / MARKER).exists() and not (out / JOURNAL).exists()
