"""Which implementation runs, and what a JAX release that breaks a kernel does to the default."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels as pk
from pallas_kernels import dispatch as module
from pallas_kernels.dispatch import Kernel, dispatch, has_kernel

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


# Names that a JAX release removed


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("jax.numpy.NO_SUCH_NAME", "failed with AttributeError: "),
        ("from jax._src import no_such_name", "cannot: broken_kernel cannot be imported: "),
        ("jax.jit(no_such_option=1)", "failed with TypeError: "),
    ],
)
def test_a_kernel_module_that_breaks_when_imported_falls_back(
    on_gpu, monkeypatch, tmp_path, caplog, line, message
):
    (tmp_path / "broken_kernel.py").write_text(f"import jax\n\n{line}\n\nkernel = abs\n")
    monkeypatch.syspath_prepend(tmp_path)
    kernel = Kernel("broken_kernel", "kernel", tested=ALL_VERSIONS)
    for _ in range(2):
        assert dispatch("operation", {"xla": abs, "mosaic_gpu": kernel}, None, -3) == 3
        assert not has_kernel("operation", {"mosaic_gpu": kernel}, None, -3)
    (found,) = messages(caplog)
    assert found.startswith(f"operation: using 'xla', because 'mosaic_gpu' {message}")
    with pytest.raises((NotImplementedError, AttributeError, TypeError)):
        dispatch("operation", {"xla": abs, "mosaic_gpu": kernel}, "mosaic_gpu", -3)


@pytest.fixture
def without_pallas_for_gpus(monkeypatch):
    """``jax.experimental.pallas.mosaic_gpu`` has moved, and none of our kernels is imported yet."""
    monkeypatch.setenv(module.ANY_JAX_VERSION, "1")
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.mosaic_gpu", None)
    monkeypatch.delattr("jax.experimental.pallas.mosaic_gpu", raising=False)
    imported = remove_kernels()
    yield
    remove_kernels()
    for name, kernel in imported.items():
        sys.modules[name] = kernel
        package, _, child = name.rpartition(".")
        setattr(sys.modules[package], child, kernel)


def remove_kernels():
    """Forgets the imported Hopper kernels, as if the process had just started, and returns their modules by name."""
    ours = [n for n in sys.modules if n.startswith("pallas_kernels.")]
    names = [n for n in ours if "mosaic_gpu" in n or ".hopper." in n]
    for name in names:
        package, _, child = name.rpartition(".")
        vars(sys.modules[package]).pop(child, None)
    return {name: sys.modules.pop(name) for name in names}


def test_the_real_kernels_fall_back_where_their_imports_fail(on_gpu, without_pallas_for_gpus, caplog):
    scores, bfloat16 = jnp.asarray([[[3.0, 1.0, 2.0]]]), jnp.dtype(jnp.bfloat16)
    for _ in range(2):
        assert pk.select_topk(scores, 2).tolist() == [[[0, 2]]]
        assert not pk.sparse_mla_has_kernel(512, 64, bfloat16)
        assert not pk.index_scores_has_kernel(64, 128, bfloat16)
    found = [message.partition(" cannot: ") for message in messages(caplog)]
    operations = ("select_topk", "sparse_mla", "index_scores")
    assert [start for start, _, _ in found] == [f"{o}: using 'xla', because 'mosaic_gpu'" for o in operations]
    assert all("cannot be imported" in reason for _, _, reason in found)
    with pytest.raises(NotImplementedError, match="cannot be imported"):
        pk.select_topk(scores, 2, implementation="mosaic_gpu")


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
