"""Installs each supported environment into a virtual environment of its own and runs its tests there.

    python3 tests/environments.py               every environment that this machine has a Python for
    python3 tests/environments.py py312         one of them
    python3 tests/environments.py --slow        the tests marked slow too
    python3 tests/environments.py --lint        ruff and mypy alone

`ENVIRONMENTS` says what they are. One line names those that are left out for want of a Python; where py312 is, py311
runs all tests. Every environment runs before the exit status tells whether one failed. Imports the standard library
alone, because nothing is installed yet.
"""

from __future__ import annotations  # so that an older python3 can look for a newer one

import argparse
import dataclasses
import glob
import hashlib
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
# Fails where `python -m venv` would: Debian's python3 lacks ensurepip until python3-venv is installed.
# The real path: another spelling of the same Python must not install everything again.
PROBE = "import ensurepip, os, sys; print(*sys.version_info[:2], os.path.realpath(sys.executable))"


@dataclasses.dataclass(frozen=True)
class Environment:
    name: str
    oldest: tuple[int, int]
    newest: tuple[int, int]
    extras: str
    purpose: str
    markers: str  # pytest -m
    paths: tuple[str, ...]
    without: str = (
        ""  # the environment in whose absence this one runs everything; with --slow, all of its paths
    )

    @property
    def constraints(self) -> Path:
        return ROOT / "constraints" / f"{self.name}.txt"

    @property
    def folder(self) -> Path:
        return ROOT / f".venv-{self.name}"

    @property
    def jax(self) -> str:
        return re.findall(r"^jax==(\S+)", self.constraints.read_text(), re.MULTILINE)[0]

    @property
    def pythons(self) -> str:
        oldest, newest = (".".join(map(str, version)) for version in (self.oldest, self.newest))
        return oldest if oldest == newest else f"{oldest} or newer"


ENVIRONMENTS = (
    Environment(
        name="py312",
        oldest=(3, 12),
        newest=(3, 99),
        extras="demo,test,tpu,gpu",
        purpose="the newest JAX; Hopper kernels interpreted and compiled; TPU targets compiled",
        markers="not parity",
        paths=("tests",),
    ),
    Environment(
        name="py311",
        oldest=(3, 11),
        newest=(3, 11),
        extras="demo,test,tpu,parity",
        purpose="the oldest JAX; parity with live PyTorch",
        markers="parity",
        paths=("tests/dsa_jax",),
        without="py312",
    ),
    Environment(
        name="jax011",
        oldest=(3, 12),
        newest=(3, 99),
        extras="test,gpu",
        purpose="Hopper kernels with the JAX that they were measured with",
        markers="",
        paths=("tests/pallas_kernels",),
    ),
)


def interpreters() -> dict[tuple[int, int], str]:
    """{version: path} of the Pythons that run and can make a virtual environment; the caller's own comes first."""
    names = ["python3", *(f"python3.{minor}" for minor in range(11, 16))]
    found = [sys.executable]
    found += [shutil.which(name, path=folder) or "" for folder in os.get_exec_path() for name in names]
    if shutil.which("pyenv"):
        root = subprocess.run(["pyenv", "root"], capture_output=True, text=True).stdout.strip()
        found += sorted(glob.glob(f"{root}/versions/*/bin/python"))
    usable: dict[tuple[int, int], str] = {}
    for path in dict.fromkeys(filter(None, found)):
        # pyenv's shims exist for versions that are not switched on, and fail when they are run.
        probe = subprocess.run([path, "-c", PROBE], capture_output=True, text=True)
        if probe.returncode == 0:
            major, minor, executable = probe.stdout.strip().split(" ", 2)
            usable.setdefault((int(major), int(minor)), executable)
    return usable


def python_for(environment: Environment, usable: dict[tuple[int, int], str]) -> str | None:
    """The oldest Python that will do: the pinned versions were chosen with it."""
    fitting = [version for version in usable if environment.oldest <= version <= environment.newest]
    return usable[min(fitting)] if fitting else None


def install(environment: Environment, python: str, pinned: bool) -> Path:
    """Python of the environment's folder, which is made anew when what it should hold has changed."""
    stamp = environment.folder / "installed"
    wanted = hashlib.sha256(f"{python} {environment.extras} {pinned}".encode())
    for file in (ROOT / "pyproject.toml", environment.constraints):
        wanted.update(file.read_bytes())
    own = environment.folder / "bin" / "python"
    if not stamp.exists() or stamp.read_text() != wanted.hexdigest():
        subprocess.run([python, "-m", "venv", "--clear", environment.folder], check=True)
        pip = [own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        pins = ["-c", environment.constraints] if pinned else []
        subprocess.run([*pip, *pins, "-e", f".[{environment.extras}]"], cwd=ROOT, check=True)
        stamp.write_text(wanted.hexdigest())
    return own


def lint(python: Path) -> bool:
    commands = (("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",))
    return all([subprocess.run([python, "-m", *command], cwd=ROOT).returncode == 0 for command in commands])


def run(environment: Environment, python: Path, everything: bool, slow: bool) -> tuple[bool, str]:
    """(whether all tests passed, a line with the counts)."""
    whole = everything or (slow and bool(environment.without))
    markers = [] if whole else [environment.markers]
    markers = " and ".join(filter(None, [*markers, "" if slow else "not slow"]))
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        command = [python, "-m", "pytest", "-n", "2", "--dist", "loadgroup", "--timeout", "600"]
        command += ["--durations", "25", "--environment", environment.name, "--junit-xml", results]
        command += [*(["-m", markers] if markers else []), *(("tests",) if everything else environment.paths)]
        code = subprocess.run(command, cwd=ROOT).returncode
        suite = ElementTree.parse(results).getroot().find("testsuite") if results.exists() else None
    if suite is None:
        return False, f"{environment.name}: pytest ended with exit status {code} and without results"
    count = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    passed = count["tests"] - failed - count["skipped"]
    return code == 0, f"{environment.name}: {passed} passed, {failed} failed, {count['skipped']} skipped"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [environment.name for environment in ENVIRONMENTS]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}; all by default")
    parser.add_argument("--slow", action="store_true", help="run the tests marked slow too")
    parser.add_argument("--lint", action="store_true", help="check style and types alone")
    parser.add_argument(
        "--newest", action="store_true", help="install the newest versions, not the pinned ones"
    )
    asked = parser.parse_args()
    if unknown := set(asked.names) - set(names):
        parser.error(f"the environments are {', '.join(names)}, got {', '.join(sorted(unknown))}")

    usable = interpreters()
    chosen = [environment for environment in ENVIRONMENTS if environment.name in (asked.names or names)]
    pythons = {environment.name: python_for(environment, usable) for environment in ENVIRONMENTS}
    ready = [environment for environment in chosen if pythons[environment.name]]
    stand_ins = {e.name for e in ready if e.without and not pythons[e.without]}
    if left_out := [environment for environment in chosen if environment not in ready]:
        parts = [f"{e.name} ({e.purpose}), no Python {e.pythons} with ensurepip found" for e in left_out]
        parts += [f"{name} runs all tests instead" for name in sorted(stand_ins)]
        print("left out:", "; ".join(parts), flush=True)
    if not ready:
        return 1

    start, failed, summary = time.monotonic(), [], []
    for number, environment in enumerate(ready[:1] if asked.lint else ready):
        began, cpu = time.monotonic(), cpu_seconds()
        python = install(environment, str(pythons[environment.name]), pinned=not asked.newest)
        print(f"{environment.name}: {environment.purpose} (jax {environment.jax})", flush=True)
        if number == 0 and not lint(python):
            failed.append("lint")
        if asked.lint:
            break
        passed, line = run(environment, python, environment.name in stand_ins, asked.slow)
        failed += [] if passed else [environment.name]
        minutes = [f"{seconds / 60:.1f}" for seconds in (time.monotonic() - began, cpu_seconds() - cpu)]
        summary += [line, f"{environment.name} took {minutes[0]} minutes, {minutes[1]} minutes of CPU time"]
    print(*summary, sep="\n")
    print(
        f"failed: {', '.join(failed)}"
        if failed
        else f"all passed in {(time.monotonic() - start) / 60:.1f} minutes"
    )
    return 1 if failed else 0


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    sys.exit(main())
