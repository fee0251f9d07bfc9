"""What the Hopper kernels share: private names are in one module; one that JAX removes fails its import."""

import ast
import importlib.util
from pathlib import Path

import jax.experimental.mosaic.gpu
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

ROOT = Path(__file__).resolve().parents[2] / "pallas_kernels"
MOSAIC = ROOT / "hopper" / "mosaic.py"
FILES = [p for p in (*ROOT.glob("hopper/*.py"), *ROOT.glob("*/mosaic_gpu*.py")) if p != MOSAIC]
PRIVATE = ("jax._src", "jax.experimental", "jax.extend", "jaxlib")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_mosaic_imports_experimental_and_private_names(path):
    assert [name for name in imports(path) if name.startswith(PRIVATE)] == []


def test_a_name_that_jax_removed_fails_the_import(monkeypatch):
    spec = importlib.util.spec_from_file_location("mosaic_again", MOSAIC)
    run = lambda: spec.loader.exec_module(importlib.util.module_from_spec(spec))  # noqa: E731
    run()
    with monkeypatch.context() as patch:
        patch.delattr(jax.experimental.mosaic.gpu, "optimization_barrier")
        with pytest.raises(ImportError, match="optimization_barrier"):
            run()
    monkeypatch.setattr(plgpu, "Layout", type("Layout", (), {}))
    with pytest.raises(AttributeError, match="_WGMMA_ACC_32BIT"):
        run()
