"""tests/skips.py: a skip that nobody expects fails the run, and so does a line that is out of date."""

import pytest

from tests import skips
from tests.environments import ENVIRONMENTS

TESTS = """
import pytest

def test_runs(): pass

@pytest.mark.parametrize("n", [1, 2])
def test_sometimes(n):
    if n == 2:
        pytest.skip("needs a GPU")
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs TESTS, where these lines are expected; returns the exit code and what was printed."""
    monkeypatch.setattr(skips, "FOLDER", tmp_path)
    (tmp_path / "test_small.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")

    def run(*lines, options=()):
        (tmp_path / "here.txt").write_text("# a comment\n\n" + "\n".join(lines))
        arguments = [
            "--rootdir",
            tmp_path,
            "-c",
            tmp_path / "pytest.ini",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
        ]
        arguments += ["--import-mode=importlib", *options, tmp_path / "test_small.py"]
        code = pytest.main([str(argument) for argument in arguments], plugins=[skips.ExpectedSkips("here")])
        return code, capsys.readouterr().out

    return run


SKIPPED = "test_small.py::test_sometimes[2]"


def test_an_expected_skip_passes(run):
    code, _ = run(SKIPPED)
    assert code == 0


def test_a_new_skip_fails_and_says_what_to_do(run):
    code, printed = run()
    assert code == 1
    assert "add these lines to tests/expected_skips/here.txt" in printed
    assert f"{SKIPPED}    (needs a GPU)\n" in printed


@pytest.mark.parametrize("line", ["test_small.py::test_runs", "test_small.py::test_that_was_renamed"])
def test_a_line_whose_test_ran_or_is_gone_fails(run, line):
    code, printed = run(SKIPPED, line)
    assert code == 1
    assert "Remove these lines" in printed and f"\n{line}\n" in printed


def test_tests_that_were_not_chosen_are_not_missed(run):
    code, _ = run(SKIPPED, "test_other.py::test_elsewhere", options=["-k", "runs"])
    assert code == 0


def test_every_environment_has_a_list():
    assert skips.names() == sorted(environment.name for environment in ENVIRONMENTS)
