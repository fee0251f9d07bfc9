"""Skipped tests against the list of expected ones: `pytest --environment py312`.

tests/expected_skips/NAME.txt has the node ID of every test, or of every module, that environment NAME skips, one per
line. A skip that is not listed fails the run, so that no test stops running unnoticed; so does a line whose test ran,
or no longer exists. A run without --environment skips what it must and compares nothing.
"""

from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent / "expected_skips"


def names() -> list[str]:
    return sorted(file.stem for file in FOLDER.glob("*.txt"))


def expected(name: str) -> set[str]:
    lines = (FOLDER / f"{name}.txt").read_text().splitlines()
    return {line for line in lines if line and not line.startswith("#")}


class ExpectedSkips:
    """The plugin. With pytest-xdist, workers collect and the process that started them compares."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.expected = expected(name)
        self.skipped: dict[str, str] = {}  # node ID -> reason
        self.ran: set[str] = set()
        self.collected: set[str] = set()  # of the files that were looked at, whatever -m or -k left out
        self.problems: list[str] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        self.collected |= {item.nodeid for item in items}
        if hasattr(config, "workeroutput"):
            config.workeroutput["collected"] = sorted(self.collected)

    @pytest.hookimpl(optionalhook=True)  # of pytest-xdist
    def pytest_testnodedown(self, node: Any) -> None:
        self.collected |= set(getattr(node, "workeroutput", {}).get("collected", ()))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self._skip(report)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            self._skip(report)
        elif report.when == "call":
            self.ran.add(_plain(report.nodeid))

    def _skip(self, report: pytest.CollectReport | pytest.TestReport) -> None:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        self.skipped[_plain(report.nodeid)] = reason.removeprefix("Skipped: ")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workerinput"):
            return
        new = {node: reason for node, reason in self.skipped.items() if node not in self.expected}
        files = {node.partition("::")[0] for node in self.collected}
        gone = {node for node in self.expected - self.collected if node.partition("::")[0] in files}
        stale = (self.expected & self.ran) | gone
        if new:
            self.problems += [
                f"{len(new)} skipped, not expected in {self.name}. Make them run, or, where they cannot run there, "
                f"add these lines to tests/expected_skips/{self.name}.txt and say in the commit why:",
                *(f"{node}    ({reason})" for node, reason in sorted(new.items())),
            ]
        if stale:
            self.problems += [
                f"{len(stale)} expected to be skipped in {self.name}, but they ran or no longer exist. Remove these "
                f"lines from tests/expected_skips/{self.name}.txt:",
                *sorted(stale),
            ]
        if self.problems and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.problems:
            terminalreporter.section("expected skips", red=True, bold=True)
            for line in self.problems:
                terminalreporter.write_line(line)


def _plain(node: str) -> str:
    """With `--dist loadgroup`, pytest-xdist appends the group to a node ID: test_x@group."""
    name, group, _ = node.rpartition("@")
    return name if group and "]" not in node[len(name) :] else node
