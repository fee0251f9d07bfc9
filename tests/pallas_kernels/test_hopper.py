"""The module that holds JAX's private names for the Hopper kernels fails its import when a release removes one."""

import importlib.util
from pathlib import Path

import jax.experimental.mosaic.gpu
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

MOSAIC = Path(__file__).resolve().parents[2] / "pallas_kernels" / "hopper" / "mosaic.py"


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
