"""Checkpoints are exact and limited in number, survive damage to the newest, and belong to one run."""

import dataclasses
import gc
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train.same import assert_same_bits
from tests.train.small import small_run
from train.checkpoint import Checkpoints
from train.step import begin_stage

# Orbax reads all arrays concurrently and abandons the other reads when one fails.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def collect_abandoned_reads():
    yield
    gc.collect()


RUN = small_run()  # stages of 20, 15 and 15 steps


def params_of(seed):
    """A tree with all parameter groups, and random float32 values."""
    rng = np.random.default_rng(seed)
    attn = {"wq_a": (64, 32), "indexer": {"wk": (32, 16), "k_norm": {"bias": (16,)}}}
    shapes = {"embed": (40, 32), "moe_layers": {"attn": attn, "ffn": {"gate_bias": (8,)}}}
    draw = lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    return {"params": jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))}


def state_at(step):
    """A state with nonzero moments."""
    stage = RUN.stages[RUN.stage_at(step)[0]]
    state = begin_stage(jnp.int32(step), params_of(step), stage)
    fill = lambda leaf: leaf + jnp.asarray(step % 7 + 1, leaf.dtype)  # noqa: E731
    return dataclasses.replace(state, opt_state=jax.tree.map(fill, state.opt_state))


def data_at(step):
    return {"next_index": step, "inner": {"seeds": [1, step], "done": False}}


def shapes():
    return jax.eval_shape(lambda: params_of(0))


def write(folder, *steps, keep=5, run=RUN):
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        checkpoints.save(state_at(step), data_at(step), run)
    checkpoints.close()


def read(folder, run=RUN):
    checkpoints = Checkpoints(folder, 5)
    try:
        return checkpoints.restore(run, shapes())
    finally:
        checkpoints.close()


def assert_state(restored, step):
    expected = state_at(step)
    assert int(restored.state.step) == step and restored.data == data_at(step)
    assert_same_bits(restored.state, expected)


@pytest.mark.parametrize("step", [7, 20, 28, 50])  # inside a stage, at the end of one, at the end of the run
def test_restored_equals_saved_to_the_bit(tmp_path, step):
    write(tmp_path, step)
    assert_state(read(tmp_path), step)


def test_a_state_at_a_stage_boundary_belongs_to_the_stage_that_ended(tmp_path):
    write(tmp_path, 20)
    moments = jax.tree.leaves(read(tmp_path).state.opt_state)
    dense, warmup = (begin_stage(jnp.int32(0), params_of(0), RUN.stages[i]).opt_state for i in (0, 1))
    assert [x.shape for x in moments] == [x.shape for x in jax.tree.leaves(dense)]
    assert [x.shape for x in moments] != [x.shape for x in jax.tree.leaves(warmup)]
    assert (RUN.stage_at(20), RUN.stage_at(21)) == ((0, 20), (1, 1))


def test_the_state_may_be_donated_while_it_is_written(tmp_path):
    """The training step reuses the state's memory; the checkpoint keeps the values it was given."""
    overwrite = jax.jit(lambda state: jax.tree.map(lambda x: x * 0 - 1, state), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path, 5)
    checkpoints.save(state := state_at(7), data_at(7), RUN)
    for _ in range(3):
        state = overwrite(state)
    checkpoints.close()
    assert_state(read(tmp_path), 7)


def test_an_empty_folder_restores_nothing(tmp_path):
    assert read(tmp_path) is None


def test_only_the_newest_are_kept(tmp_path):
    write(tmp_path, 3, 5, 7, 9, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["7", "9"]
    assert_state(read(tmp_path), 9)


def files_of(folder, item):
    return [path for path in sorted((folder / item).rglob("*")) if path.is_file()]


def truncate(folder):
    for path in files_of(folder, "params"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def overwrite_with_garbage(folder):
    for path in files_of(folder, "opt_state"):
        path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


def delete_largest_file(folder):
    max(files_of(folder, "params"), key=lambda path: path.stat().st_size).unlink()


def delete_optimizer(folder):
    shutil.rmtree(folder / "opt_state")


def garble_description(folder):
    for path in files_of(folder, "run"):
        path.write_text('{"model": ')


def delete_data_position(folder):
    for path in files_of(folder, "data"):
        path.unlink()


DAMAGE = (
    truncate, overwrite_with_garbage, delete_largest_file, delete_optimizer, garble_description,
    delete_data_position,
)  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_step_is_set_aside_and_the_one_before_restored(tmp_path, caplog, damage):
    write(tmp_path, 5, 7)
    damage(tmp_path / "7")
    with caplog.at_level(logging.WARNING, "train.checkpoint"):
        assert_state(read(tmp_path), 5)
    (message,) = (record.getMessage() for record in caplog.records if record.name == "train.checkpoint")
    assert "the checkpoint of step 7 cannot be read" in message and str(tmp_path / "unreadable-7") in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["5", "unreadable-7"]

    write(tmp_path, 7)  # the resumed run reaches this step again
    assert_state(read(tmp_path), 7)


def test_two_damaged_steps_are_skipped(tmp_path):
    write(tmp_path, 3, 5, 7)
    truncate(tmp_path / "5")
    delete_largest_file(tmp_path / "7")
    assert_state(read(tmp_path), 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "unreadable-5", "unreadable-7"]


def test_a_run_does_not_restart_over_unreadable_steps(tmp_path):
    write(tmp_path, 5, 7)
    truncate(tmp_path / "5")
    truncate(tmp_path / "7")
    with pytest.raises(
        ValueError, match="none of the checkpoints in .* can be read; move them away"
    ) as error:
        read(tmp_path)
    assert "step 5: " in str(error.value) and "step 7: " in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["5", "7"]


def test_an_unfinished_step_does_not_exist(tmp_path):
    """A killed process leaves a folder under a temporary name."""
    write(tmp_path, 5, 7)
    (tmp_path / "7").rename(tmp_path / "7.orbax-checkpoint-tmp-0")
    assert_state(read(tmp_path), 5)


model = RUN.model
CONTRADICTIONS = [
    ({"batch": 4}, "batch: then 2, now 4"),
    ({"seed": 3}, "seed: then 0, now 3"),
    ({"model": dataclasses.replace(model, n_heads=4)}, "model.n_heads: then 2, now 4"),
    (
        {"stages": (dataclasses.replace(RUN.stages[0], lr=0.5), *RUN.stages[1:])},
        r"stages\[0\].lr: then 0.003, now 0.5",
    ),
    ({"stages": RUN.stages[:2]}, r"stages\[2\]: then {.*}, now None"),
    ({"data": (dataclasses.replace(RUN.data[0], weight=0.5),)}, r"data\[0\].weight: then 1.0, now 0.5"),
]


@pytest.mark.parametrize(("changes", "message"), CONTRADICTIONS)
def test_another_runs_checkpoint_is_refused_with_both_values(tmp_path, changes, message):
    write(tmp_path, 7)
    with pytest.raises(ValueError, match=f"step 7 in .* was written by another run; .*{message}"):
        read(tmp_path, dataclasses.replace(RUN, **changes))
    assert [path.name for path in tmp_path.iterdir()] == ["7"]


def test_every_contradiction_is_named_at_once(tmp_path):
    write(tmp_path, 7)
    with pytest.raises(ValueError, match="batch: then 2, now 4; seq_len: then 32, now 16"):
        read(tmp_path, dataclasses.replace(RUN, batch=4, seq_len=16))


def test_save_and_log_intervals_may_change_and_stages_may_be_added(tmp_path):
    write(tmp_path, 7)
    more = dataclasses.replace(RUN.stages[2], name="longer")
    other = dataclasses.replace(
        RUN, checkpoint_every=3, keep=1, log_every=9, eval_batches=2, stages=(*RUN.stages, more)
    )
    assert_state(read(tmp_path, other), 7)
