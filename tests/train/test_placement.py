"""A run on a mesh of eight simulated devices matches one device, from initial parameters to resuming."""

import dataclasses

import chex
import jax
import numpy as np
import pytest
from rich.console import Console

from dsa_jax.checkpoint import write_hf
from dsa_jax.sharding import batch_sharding, make_mesh, param_shardings
from tests.train.same import assert_same_bits
from tests.train.small import CONFIG, initial, small_run
from tests.train.worker import small
from train.checkpoint import Checkpoints
from train.config import Lora, MeshSpec, contradictions, from_json, sparse, to_json
from train.data.sources import validation_batches
from train.evaluation import fingerprint
from train.initial import initial_params
from train.measure.evaluate import indexer_quality, score
from train.metrics import METRICS_FILE, read_lines
from train.placement import RunSharding, rows_on
from train.trainer import train

pytestmark = pytest.mark.devices(8)

RUN = dataclasses.replace(small(), mesh=MeshSpec(expert=2, context=2))  # and so data=2
STAGE = sparse(3, lr=1e-3, index_lr=1e-3)


def quiet() -> Console:
    return Console(quiet=True)


def has_its_shardings(tree, mesh) -> bool:
    shardings = param_shardings(tree, RUN.model, mesh)
    return jax.tree.all(jax.tree.map(lambda x, at: x.sharding.is_equivalent_to(at, x.ndim), tree, shardings))


@pytest.mark.parametrize("lora", [None, Lora(rank=2)], ids=["whole", "adapters"])
def test_parameters_and_moments_are_created_sharded(lora):
    run = dataclasses.replace(RUN, lora=lora)
    sharding = RunSharding(run)
    with sharding.use_mesh():
        params = initial_params(run, sharding=sharding)
        state = sharding.begin_stage(7, params, STAGE)
        assert has_its_shardings(state, sharding.mesh) and int(state.step) == 7
    chex.assert_trees_all_close(
        jax.device_get(params), jax.device_get(initial_params(run)), rtol=1e-6, atol=1e-7
    )
    assert state.params is params and not any(leaf.any() for leaf in jax.tree.leaves(state.opt_state))


def test_a_checkpoint_to_start_from_is_read_sharded(tmp_path):
    alone = initial_params(RUN)
    write_hf(tmp_path / "released", jax.device_get(alone), dataclasses.replace(RUN.model, fp8=None))
    run = dataclasses.replace(RUN, init_from=str(tmp_path / "released"))
    sharding = RunSharding(run)
    params, given = initial_params(run, sharding=sharding), sharding.place(jax.device_get(alone), alone)
    for tree in (params, given):
        assert has_its_shardings(tree, sharding.mesh)
        assert_same_bits(tree, alone)
    assert fingerprint(given) == fingerprint(params) != fingerprint(jax.tree.map(lambda x: x + 1, given))


@pytest.mark.parametrize("mesh", [None, RUN.mesh], ids=["one device", "mesh"])
def test_parameters_of_another_model_are_refused(mesh):
    """What a caller gives to train() is compared with the run's model before anything is placed."""
    run = dataclasses.replace(RUN, mesh=mesh)
    shapes = jax.eval_shape(lambda: initial_params(run))
    wider = dataclasses.replace(run, model=dataclasses.replace(run.model, d_model=64))
    with pytest.raises(ValueError, match=r"leaves of the run's model: .*shapes: \(.*64.*\) != \(.*32.*\)"):
        RunSharding(run).place(jax.eval_shape(lambda: initial_params(wider)), shapes)
    without_head = {"params": {name: leaf for name, leaf in shapes["params"].items() if name != "head"}}
    with pytest.raises(ValueError, match="leaves of the run's model: .*tree structs"):
        RunSharding(run).place(without_head, shapes)


def test_a_global_batch_is_assembled_from_the_rows_of_each_process():
    sharding, rows = RunSharding(RUN), np.arange(8 * 32, dtype=np.int32).reshape(8, 32)
    assert sharding.rows == list(range(8))
    whole = sharding.global_batch({"tokens": rows})["tokens"]
    np.testing.assert_array_equal(whole, rows)
    assert {part.data.shape for part in whole.addressable_shards} == {(2, 16)}


@pytest.mark.parametrize(
    ("mesh", "halves"),
    [
        ({"data": 8}, ([0, 1, 2, 3], [4, 5, 6, 7])),
        ({"expert": 2, "tensor": 2}, ([0, 1, 2, 3], [4, 5, 6, 7])),
        (
            {"context": 8},
            (list(range(8)), list(range(8))),
        ),  # each process reads all rows, and holds half of each
    ],
)
def test_a_process_reads_the_rows_that_its_devices_hold(mesh, halves):
    where, devices = batch_sharding(RUN.model, make_mesh(**mesh), 8, 32), jax.devices()
    assert (rows_on(devices[:4], where, (8, 32)), rows_on(devices[4:], where, (8, 32))) == halves


@pytest.mark.parametrize(
    ("mesh", "changes", "message"),
    [
        ({"data": 3}, {}, "the mesh data=3, .* has 3 devices, but there are 8; .* would work"),
        ({"data": 8}, {"batch": 4}, "the batch must be a multiple of .* = 8, got 4; .* would work"),
        ({"context": 8}, {"seq_len": 12}, "the sequence length .* context=8, got 12; .* would work"),
        ({"tensor": 4}, {}, "n_heads must be a multiple of the mesh's tensor=4, got 2; .* would work"),
        ({"expert": 0}, {}, "expert must be at least 1, got 0"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_before_anything_is_written(tmp_path, mesh, changes, message):
    with pytest.raises(ValueError, match=message):
        train(dataclasses.replace(RUN, mesh=MeshSpec(**mesh), **changes), tmp_path / "run", quiet())
    assert not (tmp_path / "run").exists()


def test_a_run_may_resume_on_another_mesh():
    stored = to_json(RUN)
    assert from_json(stored) == RUN
    assert contradictions(stored, dataclasses.replace(RUN, mesh=MeshSpec(tensor=2))) == []
    assert contradictions(stored, dataclasses.replace(RUN, mesh=None)) == []
    older = {name: value for name, value in stored.items() if name != "mesh"}
    assert from_json(older).mesh is None and contradictions(older, RUN) == []


class Killed(BaseException):
    pass


def train_until(step, run, folder, monkeypatch):
    """Stops after the checkpoint of this step, as a killed process would."""
    save = Checkpoints.save

    def save_and_die(self, state, data, run):
        save(self, state, data, run)
        if int(state.step) == step:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Checkpoints, "save", save_and_die)
        train(run, folder, quiet())


@pytest.mark.slow
def test_one_device_resumes_a_run_killed_on_a_mesh_and_a_mesh_one_killed_on_one_device(tmp_path, monkeypatch):
    one, mesh = small(), dataclasses.replace(small(), mesh=MeshSpec(expert=2, tensor=2))
    train_until(8, mesh, tmp_path / "changing", monkeypatch)
    train_until(12, one, tmp_path / "changing", monkeypatch)
    train(mesh, tmp_path / "changing", quiet())
    train(one, tmp_path / "one", quiet())
    changing, alone = (read_lines(tmp_path / name / METRICS_FILE) for name in ("changing", "one"))
    assert [line["step"] for line in changing] == list(range(1, 21))
    for ours, theirs in zip(changing, alone, strict=True):
        for name in ("loss", "ce", "index_kl", "grad_norm", "index_grad_norm", "max_load_ratio"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_an_evaluation_on_a_mesh_matches_one_device():
    run = dataclasses.replace(small_run(batch=8), mesh=RUN.mesh, eval_batches=1)
    sharding, (batch,) = RunSharding(run), validation_batches(run)

    def evaluated(params, batch):
        result = score(params, CONFIG, [batch], "sparse")
        return [result.cross_entropy, result.accuracy, *indexer_quality(params, CONFIG, batch)]

    with sharding.use_mesh():
        got = evaluated(sharding.place(jax.device_get(initial()), initial()), sharding.global_batch(batch))
    want = evaluated(initial(), batch)
    assert len(want) == 2 + 3  # two layers and the MTP layer
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-6)
