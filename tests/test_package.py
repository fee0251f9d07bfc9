"""What the distribution says of itself."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest

import dsa_jax
from tests.environments import ENVIRONMENTS, Environment

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_version_is_stated_once():
    assert re.fullmatch(r"\d+\.\d+\.\d+", dsa_jax.__version__)
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert (ROOT / PROJECT["tool"]["hatch"]["version"]["path"]).samefile(dsa_jax.__file__)
    try:
        installed = importlib.metadata.version("dsa-jax")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("this is a checkout that is not installed")
    assert installed == dsa_jax.__version__, "install the package again"


@pytest.mark.parametrize("package", PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
def test_type_checkers_are_told_that_a_package_has_types(package: str):
    assert (ROOT / package / "py.typed").is_file()


def normal(requirement: str) -> str:
    return re.split(r"[<>=; ]", requirement)[0].replace("-", "_").lower()


@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=lambda environment: environment.name)
def test_an_environment_pins_all_that_it_installs(environment: Environment):
    text = environment.constraints.read_text()
    pins = {normal(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE)}
    needed = list(PROJECT["project"]["dependencies"])
    for extra in environment.extras.split(","):
        needed += PROJECT["project"]["optional-dependencies"][extra]
    assert {normal(requirement) for requirement in needed} <= set(pins)
    assert {pins["jax"]} == {pins[name] for name in ("jax", "jaxlib", "jax_cuda13_plugin") if name in pins}
