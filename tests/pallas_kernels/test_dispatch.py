"""Which implementation runs, and what a JAX release that breaks a kernel does to the default."""

import importlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels as pk
from pallas_kernels import dispatch as module
from pallas_kernels.dispatch import Kernel, dispatch, has_kernel

BROKEN = "broken_kernel"  # a module that stands in for a kernel's
ALL_VERSIONS = ("0.1", "9999")


@pytest.fixture
def on_gpu(monkeypatch):
    """Dispatch as on a machine with a GPU; every message is new."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.delenv(module.ANY_JAX_VERSION, raising=False)
    module._log_once.cache_clear()


def messages(caplog):
    return [record.message for record in caplog.records]


def test_a_named_implementation_runs_or_raises():
    with pytest.raises(ValueError, match="must be None or one of"):
        pk.select_topk(jnp.zeros((1, 1, 2)), 1, implementation="cuda")
    with pytest.raises(NotImplementedError, match="has no 'mosaic_tpu' implementation yet"):
        dispatch("operation", {"xla": int}, "mosaic_tpu")


def test_none_falls_back_to_xla_and_logs_the_reason_once(on_gpu, caplog):
    def refuse(x):
        raise NotImplementedError("only multiples of 64")

    for _ in range(2):
        assert dispatch("an operation", {"xla": abs, "mosaic_gpu": refuse}, None, -3) == 3
    assert messages(caplog) == [
        "an operation: using 'xla', because 'mosaic_gpu' cannot: only multiples of 64"
    ]
    with pytest.raises(NotImplementedError, match="only multiples of 64"):
        dispatch("an operation", {"xla": abs, "mosaic_gpu": refuse}, "mosaic_gpu", -3)


def test_a_kernel_that_was_not_tested_on_hardware_runs_only_when_named(on_gpu, caplog):
    table = {"xla": abs, "mosaic_gpu": Kernel("builtins", "float", tested=None)}
    assert dispatch("new operation", table, None, -3) == 3
    assert "has not passed its tests on hardware yet" in caplog.text
    assert dispatch("new operation", table, "mosaic_gpu", -3) == -3.0


def test_a_module_that_cannot_be_imported_is_not_implemented_here(on_gpu, caplog):
    kernel = Kernel("pallas_kernels.no_such_module", "forward", tested=ALL_VERSIONS)
    with pytest.raises(NotImplementedError, match="no_such_module cannot be imported: No module named"):
        kernel(1)
    assert dispatch("operation", {"xla": abs, "mosaic_gpu": kernel}, None, -3) == 3
    assert not has_kernel("operation", {"mosaic_gpu": kernel}, None, -3)
    assert len(messages(caplog)) == 1


@pytest.mark.parametrize(
    "error",
    [
        AttributeError("no attribute _WGMMA"),
        TypeError("unexpected keyword argument"),
        ValueError("no transfer plan"),
        KeyError("primitive"),
        AssertionError("layout"),
        jax.errors.JaxRuntimeError("INTERNAL: ptxas"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_every_failure_to_build_a_kernel_falls_back(on_gpu, caplog, error):
    def build(x):
        raise error

    table = {"xla": abs, "mosaic_gpu": build}
    assert dispatch("an operation", table, None, -3) == 3
    assert not has_kernel("an operation", {"mosaic_gpu": build}, None, -3)
    assert messages(caplog) == [
        f"an operation: using 'xla', because 'mosaic_gpu' failed with {type(error).__name__}: {error}"
    ]
    for named in (lambda: dispatch("an operation", table, "mosaic_gpu", -3),
                  lambda: has_kernel("an operation", {"mosaic_gpu": build}, "mosaic_gpu", -3)):  # fmt: skip
        with pytest.raises(type(error)):
            named()


def test_an_error_of_mlir_falls_back(on_gpu, caplog):
    from jax.extend.mlir import ir

    def build(x):
        with ir.Context():
            ir.Module.parse("not mlir")

    assert dispatch("an operation", {"xla": abs, "mosaic_gpu": build}, None, -3) == 3
    (message,) = messages(caplog)
    assert "failed with MLIRError" in message and "\n" not in message


# A private name that a release removed, in the real kernels


@pytest.fixture
def without_thread_code(monkeypatch):
    """``jax.experimental.pallas.mosaic_gpu`` without the names that our kernels use; the kernels not imported yet."""
    monkeypatch.setenv(module.ANY_JAX_VERSION, "1")
    for name in [n for n in sys.modules if n.startswith("pallas_kernels.") and "mosaic_gpu" in n]:
        monkeypatch.delitem(sys.modules, name)
        package, _, child = name.rpartition(".")
        monkeypatch.delattr(importlib.import_module(package), child, raising=False)
    empty = types.ModuleType("jax.experimental.pallas.mosaic_gpu")
    monkeypatch.setitem(sys.modules, empty.__name__, empty)
    monkeypatch.setattr("jax.experimental.pallas.mosaic_gpu", empty, raising=False)


def test_a_private_name_that_is_gone_falls_back(on_gpu, without_thread_code, caplog):
    """Whether the name is missed while the module is imported or while the kernel is built."""
    scores, k = jnp.asarray([[[3.0, 1.0, 2.0]]]), 2
    for _ in range(2):
        assert pk.select_topk(scores, k).tolist() == [[[0, 2]]]
    (message,) = messages(caplog)
    assert message.startswith("select_topk: using 'xla', because 'mosaic_gpu'")
    with pytest.raises((NotImplementedError, AttributeError)):
        pk.select_topk(scores, k, implementation="mosaic_gpu")


@pytest.mark.parametrize(
    ("operation", "check"),
    [
        ("sparse_mla", lambda name: pk.sparse_mla_has_kernel(512, 64, jnp.dtype(jnp.bfloat16), name)),
        ("index_scores", lambda name: pk.index_scores_has_kernel(64, 128, jnp.dtype(jnp.bfloat16), name)),
    ],
)
def test_the_model_is_told_that_a_broken_kernel_does_not_run(
    on_gpu, without_thread_code, caplog, operation, check
):
    assert not check(None)
    assert messages(caplog)[0].startswith(f"{operation}: using 'xla', because 'mosaic_gpu'")


# Versions


@pytest.mark.parametrize(
    ("version", "runs"),
    [
        ("0.10.2", False),
        ("0.11.0", True),
        ("0.11.2", True),
        ("0.12.0.1", True),
        ("0.12.9", True),
        ("0.12.1.dev20260101+abc", True),
        ("0.13.0", False),
        ("1.0", False),
    ],
)
def test_a_kernel_runs_by_default_with_the_versions_it_was_tested_with(
    on_gpu, monkeypatch, caplog, version, runs
):
    monkeypatch.setattr(jax, "__version__", version)
    kernel = Kernel("builtins", "float", tested=("0.11", "0.12"))
    table, checks = {"xla": abs, "mosaic_gpu": kernel}, {"mosaic_gpu": kernel}
    assert dispatch("operation", table, None, -3) == (-3 if runs else 3)
    assert has_kernel("operation", checks, None, -3) == runs
    expected = (
        f"was tested with JAX 0.11 to 0.12 and this is {version}; DSA_JAX_ANY_JAX_VERSION=1 lifts this limit"
    )
    assert messages(caplog) == ([] if runs else [f"operation: using 'xla', because 'mosaic_gpu' {expected}"])
    assert dispatch("operation", table, "mosaic_gpu", -3) == -3  # named: it just runs
    assert has_kernel("operation", checks, "mosaic_gpu", -3)
    monkeypatch.setenv(module.ANY_JAX_VERSION, "1")
    assert dispatch("operation", table, None, -3) == -3
    assert has_kernel("operation", checks, None, -3)


def test_a_bound_may_name_a_patch_release(on_gpu, monkeypatch):
    table = {"xla": abs, "mosaic_gpu": Kernel("builtins", "float", tested=("0.11.2", "0.12.0.1"))}
    for version, runs in (("0.11.1", False), ("0.11.2", True), ("0.12.0.1", True), ("0.12.0.2", False)):
        monkeypatch.setattr(jax, "__version__", version)
        assert dispatch("operation", table, None, -3) == (-3 if runs else 3)


@pytest.mark.parametrize("package", ["dsa_jax", "train", "train.trainer", "train.aot"])
def test_importing_the_packages_imports_no_kernel(package):
    program = f"""
import sys, {package}
parts = ("jax.experimental.mosaic", "jax.experimental.pallas", "megablox", "mosaic_gpu", "mosaic_tpu")
found = [n for n in sys.modules if n.startswith(parts[:2]) or n.rpartition(".")[2] in parts[2:]]
print([n for n in found if not n.startswith(("jax._src.pallas", "jaxlib"))])
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr
