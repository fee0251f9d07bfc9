"""The one place that turns an exception into one line and an exit code."""

import errno
import os

import pytest

from dsa_jax.commands.errors import run_command


def raises(error: BaseException):
    def command() -> int:
        raise error

    return command


@pytest.fixture(autouse=True)
def no_traceback_variable(monkeypatch) -> None:
    monkeypatch.delenv("DSA_JAX_TRACEBACK", raising=False)


def test_an_exit_code_passes_through(capsys) -> None:
    assert [run_command("prog", lambda code=code: code) for code in (0, 1, 2)] == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("kind", [ValueError, NotImplementedError, OSError, FileNotFoundError, ImportError])
def test_bad_input_is_one_line_and_exit_code_2(capsys, kind) -> None:
    assert run_command("prog", raises(kind("first line\n  second   line"))) == 2
    assert capsys.readouterr() == ("", "prog: first line second line\n")


def test_an_exception_without_words_is_named(capsys) -> None:
    assert run_command("prog", raises(NotImplementedError())) == 2
    assert capsys.readouterr().err == "prog: NotImplementedError\n"


def test_a_failed_run_has_exit_code_1(capsys) -> None:
    command = raises(FloatingPointError("the loss is NaN"))
    assert run_command("prog", command, failures=(FloatingPointError,)) == 1
    assert capsys.readouterr().err == "prog: the loss is NaN\n"
    with pytest.raises(FloatingPointError):
        run_command("prog", command)


@pytest.mark.parametrize("error", [TypeError("ours"), AssertionError("ours"), KeyboardInterrupt()])
def test_mistakes_of_our_own_and_interrupts_are_not_hidden(error) -> None:
    with pytest.raises(type(error)):
        run_command("prog", raises(error))


def test_a_traceback_is_shown_on_request(monkeypatch) -> None:
    with pytest.raises(ValueError, match="why"):
        run_command("prog", raises(ValueError("why")), traceback=True)
    monkeypatch.setenv("DSA_JAX_TRACEBACK", "1")
    with pytest.raises(ValueError, match="why"):
        run_command("prog", raises(ValueError("why")))


def test_an_error_of_the_operating_system_is_a_sentence_with_the_path(tmp_path, capsys) -> None:
    """Root may read every file, so that a test cannot take the permission away."""

    def command() -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / "config.json"))

    assert run_command("prog", command) == 2
    assert (
        capsys.readouterr().err
        == f"prog: {tmp_path / 'config.json'} cannot be read or written: permission denied\n"
    )
