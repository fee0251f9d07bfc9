"""Block scales keep the dtype that they came with, through Orbax and back."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from dsa_jax import write_hf
from dsa_jax.checkpoint import convert, load_config, load_params, verify
from dsa_jax.checkpoint.hf_reader import HfFolder
from tests.train.small import CONFIG, initial

SUFFIX = "_scale_inv"


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """A folder in FP8 whose scales are not powers of two, as V3's are not."""
    folder = tmp_path_factory.mktemp("made") / "fp8"
    write_hf(folder, jax.device_get(initial()), CONFIG, quantize="fp8")
    return folder


def read(path):
    folder = HfFolder(path)
    return {name: folder.read(name) for name in folder.entries}


def with_scales_in(quantised, folder, dtype):
    """A copy with scales of this dtype, and what it holds."""
    folder.mkdir()
    tensors = read(quantised)
    rng = np.random.default_rng(0)
    for name, array in tensors.items():
        if name.endswith(SUFFIX):
            tensors[name] = (array * rng.uniform(1, 2, array.shape)).astype(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"].pop("scale_fmt", None)
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_scales_come_back_in_their_own_dtype_with_the_same_bits(quantised, tmp_path, dtype):
    tensors = with_scales_in(quantised, tmp_path / "source", dtype)
    convert(tmp_path / "source", tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "back")
    back = read(tmp_path / "back")
    assert set(back) == set(tensors)
    assert {back[name].dtype for name in back if name.endswith(SUFFIX)} == {np.dtype(dtype)}
    for name, array in tensors.items():
        assert back[name].dtype == array.dtype and back[name].tobytes() == array.tobytes(), name
    for folder in ("orbax", "back"):
        assert verify(tmp_path / folder).faults == ()
    trees = [
        load_params(tmp_path / name, load_config(tmp_path / name)) for name in ("source", "orbax", "back")
    ]
    for tree in trees[1:]:
        jax.tree.map(np.testing.assert_array_equal, tree, trees[0])


def test_the_released_layout_has_float32_scales_whatever_the_source(quantised, tmp_path):
    tensors = with_scales_in(quantised, tmp_path / "source", ml_dtypes.bfloat16)
    convert(tmp_path / "source", tmp_path / "released", format="hf", quantize="fp8")
    found = read(tmp_path / "released")
    for name, array in tensors.items():
        if name.endswith(SUFFIX):
            assert found[name].dtype == np.float32
            np.testing.assert_array_equal(found[name], array.astype(np.float32))
