"""A run's folder: one training at a time, one sentence when it takes no more, the same lines after an interruption."""

import dataclasses
import errno
import json
import os
import re
import resource
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from rich.console import Console

import train.__main__ as command
from dsa_jax.checkpoint.lock import lock_folder
from tests.train.small import CONFIG, small_run
from train import export
from train.checkpoint import Checkpoints
from train.config import dense
from train.metrics import METRICS_FILE, read_lines
from train.run_folder import CannotWrite, locked, write_description
from train.runs import RUNS
from train.step import compiled_step
from train.trainer import train

MODEL = dataclasses.replace(CONFIG, n_layers=1, n_dense_layers=0, n_mtp_layers=0)
STAGES = (dense(6, lr=1e-3), dense(5, lr=1e-3, bias_step=0.01))
RUN = small_run(*STAGES, model=MODEL, checkpoint_every=4, log_every=3)


def quiet():
    return Console(quiet=True)


class Crash(BaseException):
    """Not an Exception, so that nothing handles it."""


@pytest.fixture
def before_step(monkeypatch):
    """before_step[n] is called before step n of a training."""
    calls = {}

    def watched(*of_stage):
        step_function = compiled_step(*of_stage)

        def one_step(state, batch):
            calls.get(int(state.step) + 1, lambda: None)()
            return step_function(state, batch)

        return one_step

    monkeypatch.setattr("train.trainer.compiled_step", watched)
    return calls


def raises(error):
    def fail():
        raise error

    return fail


def content(folder):
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


# -- two at once


def test_a_second_training_is_refused_before_anything_is_touched(tmp_path, before_step):
    """By every spelling of the folder, while the first one trains and has a save in progress."""
    folder = tmp_path / "run"
    (tmp_path / "link").symlink_to(folder)
    refused = []

    def second():
        (folder / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir()
        before = content(folder)
        for spelling in (folder, tmp_path / "link", str(tmp_path / "x" / ".." / "run")):
            with pytest.raises(BlockingIOError) as error:
                train(RUN, spelling, quiet())
            refused.append(str(error.value))
        assert content(folder) == before
        (folder / "checkpoints" / "9.orbax-checkpoint-tmp").rmdir()

    before_step[2] = second
    train(RUN, folder, quiet())
    assert len(refused) == 3
    assert all(
        re.search(rf"is being written by process {os.getpid()} on \S+; let it finish", s) for s in refused
    )
    assert not (folder / ".lock").exists()
    assert [line["step"] for line in read_lines(folder / METRICS_FILE)] == [1, 3, 4, 6, 7, 8, 9, 11]


def test_the_lock_is_given_up_after_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        train(small_run(*STAGES, init_from=str(tmp_path / "absent")), tmp_path / "run", quiet())
    with lock_folder(tmp_path / "run"):
        pass


@pytest.mark.parametrize("process", [0, 1])
def test_all_processes_get_the_answer_of_process_0(tmp_path, monkeypatch, process):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: process)
    sentence = (
        f"{tmp_path} is being written by process 7 on elsewhere; let it finish, or choose another place"
    )
    padded = np.frombuffer(sentence.encode().ljust(1000, b"\0"), np.uint8)
    monkeypatch.setattr(
        "train.run_folder.process_allgather",
        lambda said: said[None] if process == 0 else padded[None],
    )
    held = lock_folder(tmp_path)
    (tmp_path / ".lock").write_text("process 7 on elsewhere")
    with pytest.raises(OSError) as error, locked(tmp_path):
        pytest.fail("locked")
    held.release()
    assert str(error.value) == sentence


# -- the folder takes no more


def trained_by_the_command(monkeypatch, folder):
    monkeypatch.setitem(RUNS, "small", lambda: RUN)
    monkeypatch.setattr("train.trainer.Console", lambda **options: quiet())
    return command.main(["small", "--folder", str(folder)])


def finished_lines(folder):
    """What the folder holds once the same command has run to its end."""
    train(RUN, folder, quiet())
    return [line["step"] for line in read_lines(folder / METRICS_FILE)]


def saved(folder, step):
    """Waits until the save of this step, in the background, is finished."""
    deadline = time.monotonic() + 60
    while not (folder / "checkpoints" / str(step)).is_dir():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def steps_in(folder):
    """Of complete checkpoints: what Orbax began and could not finish has another name."""
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())


@pytest.fixture
def limited_files():
    """The size that a file may reach can be set; writing beyond it then fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)  # or its files would be cut off too
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, previous)


def test_a_disk_that_fills_up_during_a_save_is_one_line_and_the_checkpoint_before_stays(
    tmp_path, monkeypatch, capfd, caplog, before_step, limited_files
):
    """The second save fails inside Orbax and tensorstore, in the background."""
    folder = tmp_path / "run"

    def fill():
        saved(folder, 4)
        limited_files(5_000)

    before_step[6] = fill
    assert trained_by_the_command(monkeypatch, folder) == 1
    limited_files(resource.RLIM_INFINITY)
    before_step.clear()
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(
        f"python -m train: {folder} cannot be written: the limit on the size of a file is reached ("
    )
    assert re.search(
        r"a checkpoint needs [\d,]+ bytes and [\d,]+ are free\); free some and run the same command", line
    )
    assert line.endswith("again: the last good checkpoint is step 4")
    assert "os_error_code" not in line and "orbax" not in line
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    assert steps_in(folder) == [4]
    assert finished_lines(folder) == [1, 3, 4, 6, 7, 8, 9, 11]


def test_a_disk_without_room_for_a_checkpoint_is_said_before_the_save_begins(
    tmp_path, monkeypatch, capfd, before_step
):
    folder = tmp_path / "run"

    def fill():
        monkeypatch.setattr("train.checkpoint.free_bytes", lambda path: 12)
        monkeypatch.setattr("train.run_folder.free_bytes", lambda path: 12)

    before_step[5] = fill
    assert trained_by_the_command(monkeypatch, folder) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert re.search(r"no space left on its disk \(a checkpoint needs [\d,]+ bytes and 12 are free\)", line)
    assert "the last good checkpoint is step 4" in line
    assert steps_in(folder) == [4]


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOSPC, "no space left on its disk"),
        (errno.EDQUOT, "its disk quota is used up"),
        (errno.EROFS, "its file system is read-only"),
        (errno.EACCES, "this user may not write there"),
        (errno.EIO, "its disk reports an input/output error"),
    ],
)
def test_a_line_that_cannot_be_logged_ends_the_run_in_one_sentence(tmp_path, monkeypatch, number, reason):
    import train.metrics as metrics

    opened = metrics.Path.open

    class Full:
        """A file that takes nothing."""

        def __init__(self, stream):
            self.fileno, self.close = stream.fileno, stream.close

        def write(self, text):
            raise OSError(number, os.strerror(number))

    def full(path, mode="r", **options):
        stream = opened(path, mode, **options)
        return Full(stream) if path.name == METRICS_FILE and mode == "a" else stream

    monkeypatch.setattr(metrics.Path, "open", full)
    with pytest.raises(CannotWrite) as error:
        train(RUN, tmp_path / "run", quiet())
    assert str(error.value).startswith(f"{tmp_path / 'run'} cannot be written: {reason}")
    assert str(error.value).endswith("run the same command again: no checkpoint was written yet")


@pytest.mark.parametrize("how", ["removed", "renamed"])
def test_a_folder_that_goes_away_ends_the_run_in_one_sentence(tmp_path, monkeypatch, capfd, before_step, how):
    folder = tmp_path / "run"

    def goes():
        saved(folder, 4)
        shutil.rmtree(folder) if how == "removed" else folder.rename(tmp_path / "elsewhere")

    before_step[6] = goes
    assert trained_by_the_command(monkeypatch, folder) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert f"{folder} cannot be written: the folder was removed or moved away; put that right" in line
    assert not folder.exists()


def test_a_place_where_no_folder_can_be_is_bad_input(tmp_path, monkeypatch, capfd):
    (tmp_path / "file").touch()
    assert trained_by_the_command(monkeypatch, tmp_path / "file") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line == f"python -m train: {tmp_path / 'file'} cannot be written: it is a file, not a folder"


def test_an_error_of_the_data_is_not_taken_for_one_of_the_folder(tmp_path, before_step):
    before_step[2] = raises(FileNotFoundError(errno.ENOENT, "No such file or directory", "/data/train.npy"))
    with pytest.raises(FileNotFoundError, match="/data/train.npy"):
        train(RUN, tmp_path / "run", quiet())


# -- the same lines


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train(RUN, folder, quiet())
    return lines_without_times(folder)


def lines_without_times(folder):
    timing = {"tokens_per_s", "flops_per_s", "memory_bytes"}
    return [{k: v for k, v in line.items() if k not in timing} for line in read_lines(folder / METRICS_FILE)]


@pytest.mark.parametrize("at", [6, 7])  # inside a stage, and after a boundary
def test_a_crashed_run_resumes_to_the_lines_of_an_uninterrupted_one(tmp_path, before_step, uninterrupted, at):
    before_step[at] = raises(Crash())
    with pytest.raises(Crash):
        train(RUN, tmp_path, quiet())
    before_step.clear()
    train(RUN, tmp_path, quiet())
    assert lines_without_times(tmp_path) == uninterrupted


def test_a_stopped_run_resumes_to_the_lines_of_an_uninterrupted_one(tmp_path, monkeypatch, uninterrupted):
    """SIGTERM among several processes: step 5 is saved, and is no step that is logged."""
    from train.trainer import Stopped

    with monkeypatch.context() as patch:
        patch.setattr("train.trainer.reached_preemption_sync_point", lambda step: step == 5)
        with pytest.raises(Stopped):
            train(RUN, tmp_path, quiet())
    assert steps_in(tmp_path) == [4, 5]
    train(RUN, tmp_path, quiet())
    assert lines_without_times(tmp_path) == uninterrupted


# -- config.json


def test_config_json_is_whole_or_as_it_was(tmp_path, monkeypatch):
    write_description(tmp_path, RUN)
    before = (tmp_path / "config.json").read_bytes()
    monkeypatch.setattr("dsa_jax.checkpoint.files.os.fsync", raises_on_call)
    with pytest.raises(Crash):
        write_description(tmp_path, small_run(batch=4))
    assert (tmp_path / "config.json").read_bytes() == before


def raises_on_call(descriptor):
    raise Crash


@pytest.mark.parametrize(
    "damaged",
    ['{"model": ', "[1]", "{}", '{"model": 3}', "\x00" * 40, None],
    ids=lambda text: repr(text)[:12],
)
def test_a_damaged_config_json_is_named(tmp_path, capsys, damaged):
    write_description(tmp_path, RUN)
    if damaged is None:  # one key of the model is another
        damaged = (tmp_path / "config.json").read_text().replace('"d_model"', '"d_mode1"')
    (tmp_path / "config.json").write_text(damaged)
    assert export.main([str(tmp_path), str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "config.json") in line
    assert line.endswith("start the run again with its folder, and training writes it anew")


def test_a_run_may_be_exported_while_it_trains(tmp_path, before_step):
    """The reader neither waits for the lock nor removes the save in progress."""

    def read():
        saved(tmp_path, 4)
        (tmp_path / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir()
        params = export.trained(tmp_path)[1]
        assert params["params"]["embed"].shape[1] == CONFIG.d_model
        assert (tmp_path / "checkpoints" / "9.orbax-checkpoint-tmp").is_dir()
        (tmp_path / "checkpoints" / "9.orbax-checkpoint-tmp").rmdir()

    before_step[6] = read
    train(RUN, tmp_path, quiet())
    assert json.loads((tmp_path / "config.json").read_text())["batch"] == RUN.batch


def test_saves_under_way_when_a_run_fails_are_finished(tmp_path, before_step):
    before_step[5] = raises(FloatingPointError("not finite"))
    with pytest.raises(FloatingPointError):
        train(RUN, tmp_path, quiet())
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2, read_only=True)
    assert checkpoints.steps() == [4]
    checkpoints.close()
