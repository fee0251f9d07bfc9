"""Where the tests run and what is checked while they run.

JAX runs on CPU with eight simulated devices, unless JAX_PLATFORMS names another platform: on a GPU machine run
`JAX_PLATFORMS=cuda,cpu python -m pytest tests`. Both settings must be made before JAX is imported. A test marked
`devices(8)` is skipped where there are not that many.

With jaxtyping and beartype installed, every annotated function of the three packages checks the types and
shapes of its arguments and results. Where beartype is missing the tests run without these checks and the
header says so.
"""

import importlib.util
import os
import tempfile

import pytest

from tests import skips

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS") or "cpu"
if os.environ["JAX_PLATFORMS"] == "cpu":
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        # Level 0: hundreds of small programs are compiled and run once, and LLVM's optimiser is most of that.
        flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()

# The tolerances are those of float32 products; a GPU would use TF32 and a TPU bfloat16 by default.
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")

# Compiling for a TPU that is not there: ask no metadata server, and let two test workers load libtpu.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

# A program that several processes of one test run compile is compiled once.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="dsa-jax-compiled-")  # removed at exit
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

CHECKED_PACKAGES = ["pallas_kernels", "dsa_jax", "train"]
MISSING_CHECKERS = [name for name in ("jaxtyping", "beartype") if importlib.util.find_spec(name) is None]

if not MISSING_CHECKERS:
    from jaxtyping import install_import_hook

    install_import_hook(CHECKED_PACKAGES, "beartype.beartype")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--environment",
        choices=skips.names(),
        help="compare the skipped tests with those that tests/expected_skips lists for this environment",
    )


def pytest_configure(config: pytest.Config) -> None:
    if name := config.getoption("environment"):
        config.pluginmanager.register(skips.ExpectedSkips(name), "expected skips")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if marker := item.get_closest_marker("devices"):
        import jax

        if jax.device_count() not in marker.args:
            numbers = " or ".join(map(str, marker.args))
            pytest.skip(f"needs {numbers} devices, here {jax.device_count()} (see tests/conftest.py)")


def pytest_report_header() -> str:
    if MISSING_CHECKERS:
        return f"shape checks: off, {' and '.join(MISSING_CHECKERS)} not installed"
    return f"shape checks: on for {', '.join(CHECKED_PACKAGES)}"


@pytest.fixture
def shape_checks() -> None:
    """Skips a test that is about the shape checks themselves where they are off."""
    if MISSING_CHECKERS:
        pytest.skip(f"shape checks are off: {' and '.join(MISSING_CHECKERS)} not installed")
