"""What was saved is checked when it is read: after a flipped bit, training resumes from the same bits or not there."""

import json
import logging
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax.checkpoint import verify
from dsa_jax.commands.cli import main
from tests.train.same import same_bits
from tests.train.small import CONFIG, initial, small_run
from tests.train.test_checkpoint import assert_state, collect_abandoned_reads, data_at, read, state_at, write
from train.checkpoint import Checkpoints
from train.config import MeshSpec
from train.placement import RunSharding
from train.step import begin_stage

__all__ = ["collect_abandoned_reads"]  # a fixture for every test here
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """RUN with steps 5 and 7."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    write(folder / "checkpoints", 5, 7)
    return folder


def flip(file, bit):
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def groups(step):
    """The files of a step by what they hold."""
    files = [path for path in sorted(step.rglob("*")) if path.is_file() and path.stat().st_size]
    arrays = {
        item: [file for file in files if {"d", item} <= set(file.parts)] for item in ("params", "opt_state")
    }
    return arrays | {"metadata": [file for file in files if "d" not in file.parts]}


@pytest.mark.parametrize("group", ["params", "opt_state", "metadata"])
def test_no_flipped_bit_of_twenty_alters_what_training_resumes_from(saved, tmp_path, group):
    """Anywhere in the files of one group. Training resumes from what `verify` finds good.

    A bit that changes nothing is in a part of a file that Orbax wrote and does not read.
    """
    generator = random.Random(group)
    for n in range(20):
        run = tmp_path / str(n)
        shutil.copytree(saved, run)
        files = groups(run / "checkpoints" / "7")[group]
        (file,) = generator.choices(files, [file.stat().st_size for file in files])
        flip(file, bit := generator.randrange(8 * file.stat().st_size))
        said = f"bit {bit} of {file.relative_to(run)}"
        faults = verify(run).faults
        restored = read(run / "checkpoints")
        step = int(restored.state.step)
        if step == 5:
            assert faults and all("step 7" in fault for fault in faults), said
        same = jax.tree.all(jax.tree.map(same_bits, restored.state, state_at(step)))
        assert same and restored.data == data_at(step), said


def alter_leaf(step, item, name):
    """Changes the last bit of the first element and stores it as Orbax does: every file is sound."""
    import tensorstore as ts

    from dsa_jax.checkpoint.orbax_folder import array_store

    spec = {"driver": "zarr", "kvstore": array_store((step / item).resolve(), (name,))}
    array = ts.open(spec, open=True).result()
    values = array.read().result()
    values.reshape(-1).view(np.uint8)[0] ^= 1
    array.write(values).result()


@pytest.mark.parametrize(
    ("item", "name", "said"),
    [
        ("params", "params.moe_layers.attn.indexer.wk", "params.moe_layers.attn.indexer.wk"),
        ("opt_state", "2", "opt_state."),
    ],
)
def test_one_altered_element_in_sound_files_sets_the_step_aside_and_is_named(
    saved, tmp_path, caplog, capsys, item, name, said
):
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    alter_leaf(run / "checkpoints" / "7", item, name)
    assert main(["verify", str(run)]) == 1
    printed = capsys.readouterr().out
    assert f"checkpoint of step 7: {said}" in printed and "differs from its digest" in printed
    assert printed.splitlines()[-1].startswith(f"{run}: 1 faults")
    assert main(["verify", str(run / "checkpoints" / "7")]) == 1
    assert main(["verify", str(run / "checkpoints" / "5")]) == 0
    with caplog.at_level(logging.WARNING, "train.checkpoint"):
        assert_state(read(run / "checkpoints"), 5)
    (message,) = (record.getMessage() for record in caplog.records if record.name == "train.checkpoint")
    assert said in message and "not what was saved, by the digest saved with it" in message
    assert (run / "checkpoints" / "unreadable-7").is_dir()
    capsys.readouterr()
    assert main(["verify", str(run)]) == 0  # what was set aside is no longer a part of the run


def test_moments_are_named_by_their_parameter(saved):
    names = json.loads((saved / "checkpoints" / "7" / "digests" / "metadata").read_text())["opt_state_names"]
    assert any("mu" in name and name.endswith("embed") for name in names.values())


def test_verify_counts_arrays_and_bytes_and_says_that_they_match(saved, capsys):
    assert main(["verify", str(saved)]) == 0
    state = state_at(7)
    leaves = jax.tree.leaves((state.params, state.opt_state))
    expected = f"{2 * len(leaves)} tensors match their checksums ({2 * sum(x.nbytes for x in leaves):,} bytes"
    assert expected in capsys.readouterr().out


def test_a_run_without_a_checkpoint_is_one_line(tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    assert main(["verify", str(tmp_path)]) == 2
    assert "holds no checkpoint yet" in capsys.readouterr().err


def test_a_step_without_digests_is_read_and_said_to_be_unchecked(saved, tmp_path, caplog, capsys):
    """As versions before digests wrote it."""
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    shutil.rmtree(run / "checkpoints" / "7" / "digests")
    with caplog.at_level(logging.WARNING, "train.checkpoint"):
        assert_state(read(run / "checkpoints"), 7)
    assert "step 7" in caplog.text and "saved without digests and is not checked" in caplog.text
    assert main(["verify", str(run / "checkpoints" / "7")]) == 0
    assert "are readable; the folder has no checksums" in capsys.readouterr().out


def test_digests_of_another_format_set_the_step_aside(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "7" / "digests" / "metadata"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 2}))
    assert_state(read(tmp_path / "run" / "checkpoints"), 5)


def test_a_reader_sets_nothing_aside_and_leaves_a_save_in_progress_alone(saved, tmp_path):
    """`train.export` may read a run that is still training."""
    folder = tmp_path / "run" / "checkpoints"
    shutil.copytree(saved / "checkpoints", folder)
    alter_leaf(folder / "7", "params", "params.embed")
    (folder / "9.orbax-checkpoint-tmp").mkdir()
    before = sorted(path.name for path in folder.iterdir())
    checkpoints = Checkpoints(folder, 5, read_only=True)
    state = state_at(5)
    restored = checkpoints.restore(small_run(), jax.eval_shape(lambda: state.params))
    checkpoints.close()
    assert int(restored.state.step) == 5
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.devices(8)
def test_digests_hold_on_another_mesh(tmp_path):
    """Saved on expert=2, tensor=2 and two data-parallel groups; read on one device, and on another mesh."""
    meshed = small_run(mesh=MeshSpec(expert=2, tensor=2), batch=8)
    sharding = RunSharding(meshed)
    params = initial()
    shapes = jax.eval_shape(lambda: params)
    with sharding.use_mesh():
        state = sharding.begin_stage(7, sharding.place(initial(), shapes), meshed.stages[0])
        checkpoints = Checkpoints(tmp_path, 2)
        checkpoints.save(state, data_at(7), meshed)
        checkpoints.close()
    assert verify(tmp_path / "7").faults == ()
    for mesh in (None, MeshSpec(context=2, tensor=2)):
        run = small_run(mesh=mesh, batch=8)
        checkpoints = Checkpoints(tmp_path, 2)
        restored = checkpoints.restore(run, shapes, RunSharding(run))
        checkpoints.close()
        assert jax.tree.all(jax.tree.map(same_bits, restored.state.params, initial()))
    alter_leaf(tmp_path / "7", "params", "params.norm")
    checkpoints = Checkpoints(tmp_path, 2)
    with pytest.raises(ValueError, match=r"step 7: params.norm: not what was saved"):
        checkpoints.restore(meshed, shapes, sharding)
    checkpoints.close()


def test_every_leaf_of_a_real_state_has_a_digest(tmp_path):
    run = small_run()
    state = begin_stage(jnp.int32(3), initial(), run.stages[2])
    checkpoints = Checkpoints(tmp_path, 2)
    checkpoints.save(state, data_at(3), run)
    checkpoints.close()
    stored = json.loads((tmp_path / "3" / "digests" / "metadata").read_text())
    assert len(stored["params"]) == len(jax.tree.leaves(state.params))
    assert len(stored["opt_state"]) == len(stored["opt_state_names"]) == len(jax.tree.leaves(state.opt_state))
    assert CONFIG == run.model
