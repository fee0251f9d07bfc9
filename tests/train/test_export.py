"""`python -m train.export`: what it writes is the newest checkpoint, with adapters merged at alpha / rank."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from dsa_jax.checkpoint import load_config, load_params
from tests.train.small import initial, same_bits, small_run
from train.checkpoint import Checkpoints
from train.config import Lora, dense, to_json
from train.export import main
from train.lora import with_adapters
from train.step import begin_stage

STAGES = (dense(2, lr=1e-3),)


def write_run(folder, params, **changes):
    """A run's folder as training leaves it after step 1."""
    run = small_run(*STAGES, **changes)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_json(run)))
    checkpoints = Checkpoints(folder / "checkpoints", run.keep)
    checkpoints.save(begin_stage(jnp.int32(1), params, run.stages[0]), {"position": 0}, run)
    checkpoints.close()
    return run


def adapted(lora):
    """The initial parameters with adapters that matter: B is random too."""
    params = with_adapters(initial(), lora, jax.random.key(1))
    params["lora"] = jax.tree.map(lambda leaf: leaf + 0.1, params["lora"])
    return params


def exported(folder, out):
    assert main([str(folder), str(out), "--dtype", "float32"]) == 0
    config = load_config(out, dtype="float32", param_dtype="float32")
    return traverse_util.flatten_dict(load_params(out, config)["params"], sep=".")


@pytest.mark.parametrize(("rank", "alpha"), [(4, 8.0), (4, 1.0), (2, 32.0)])
def test_adapters_are_merged_with_alpha_over_rank(tmp_path, rank, alpha):
    lora = Lora(rank=rank, alpha=alpha)
    params = adapted(lora)
    write_run(tmp_path / "run", params, lora=lora)
    found = exported(tmp_path / "run", tmp_path / "out")
    base, adapters = (traverse_util.flatten_dict(params[name], sep=".") for name in ("params", "lora"))
    assert set(found) == set(base)
    for path, leaf in base.items():
        expected = np.asarray(leaf, np.float64)
        if f"{path}.a" in adapters:
            a, b = (np.asarray(adapters[f"{path}.{name}"], np.float64) for name in "ab")
            expected = expected + alpha / rank * a @ b
        np.testing.assert_allclose(found[path], expected, rtol=1e-5, atol=1e-6, err_msg=path)


def test_without_adapters_the_parameters_are_exported_to_the_last_bit(tmp_path):
    write_run(tmp_path / "run", initial())
    found = exported(tmp_path / "run", tmp_path / "out")
    expected = traverse_util.flatten_dict(initial()["params"], sep=".")
    assert set(found) == set(expected)
    assert all(same_bits(found[path], leaf) for path, leaf in expected.items())


def test_a_folder_that_is_no_run_gives_one_line(tmp_path, capsys):
    assert main([str(tmp_path), str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "has no config.json: give the folder of a run" in line
