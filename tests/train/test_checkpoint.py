"""Checkpoints: exact, few, readable whatever happened to the newest, and only for the run that wrote them."""

import dataclasses
import gc
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train.small import same_bits, small_run
from train.checkpoint import Checkpoints
from train.step import begin_stage

# Orbax reads all arrays at once and drops the other reads when one fails.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def dropped_reads_do_not_reach_the_next_file():
    yield
    gc.collect()


RUN = small_run()  # stages of 20, 15 and 15 steps


def params_of(seed):
    """A tree with the groups of a model, and float32 values that decimal digits would not keep."""
    rng = np.random.default_rng(seed)
    attn = {"wq_a": (64, 32), "indexer": {"wk": (32, 16), "k_norm": {"bias": (16,)}}}
    shapes = {"embed": (40, 32), "moe_layers": {"attn": attn, "ffn": {"gate_bias": (8,)}}}
    draw = lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    return {"params": jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))}


def state_at(step):
    """A state with moments that are not zero."""
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


def is_state(restored, step):
    expected = state_at(step)
    assert int(restored.state.step) == step and restored.data == data_at(step)
    assert jax.tree.structure(restored.state) == jax.tree.structure(expected)
    return jax.tree.all(jax.tree.map(same_bits, restored.state, expected))


@pytest.mark.parametrize("step", [7, 20, 28, 50])  # inside a stage, at the end of one, at the end of the run
def test_what_is_restored_is_what_was_saved_to_the_bit(tmp_path, step):
    write(tmp_path, step)
    assert is_state(read(tmp_path), step)


def test_the_state_of_a_boundary_is_that_of_the_stage_that_ended(tmp_path):
    write(tmp_path, 20)
    moments = jax.tree.leaves(read(tmp_path).state.opt_state)
    dense, warmup = (begin_stage(jnp.int32(0), params_of(0), RUN.stages[i]).opt_state for i in (0, 1))
    assert [x.shape for x in moments] == [x.shape for x in jax.tree.leaves(dense)]
    assert [x.shape for x in moments] != [x.shape for x in jax.tree.leaves(warmup)]
    assert (RUN.stage_at(20), RUN.stage_at(21)) == ((0, 20), (1, 1))


def test_the_state_may_be_given_away_while_it_is_written(tmp_path):
    """The training step takes the state's memory; the checkpoint keeps the values that it was given."""
    overwrite = jax.jit(lambda state: jax.tree.map(lambda x: x * 0 - 1, state), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path, 5)
    checkpoints.save(state := state_at(7), data_at(7), RUN)
    for _ in range(3):
        state = overwrite(state)
    checkpoints.close()
    assert is_state(read(tmp_path), 7)


def test_an_empty_folder_has_nothing_to_restore(tmp_path):
    assert read(tmp_path) is None


def test_only_the_newest_stay(tmp_path):
    write(tmp_path, 3, 5, 7, 9, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["7", "9"]
    assert is_state(read(tmp_path), 9)


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
def test_a_damaged_newest_step_is_set_aside_for_the_one_before(tmp_path, caplog, damage):
    write(tmp_path, 5, 7)
    damage(tmp_path / "7")
    with caplog.at_level(logging.WARNING, "train.checkpoint"):
        assert is_state(read(tmp_path), 5)
    (said,) = (record.getMessage() for record in caplog.records if record.name == "train.checkpoint")
    assert "the checkpoint of step 7 cannot be read" in said and str(tmp_path / "unreadable-7") in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["5", "unreadable-7"]

    write(tmp_path, 7)  # the run goes on and comes to this step again
    assert is_state(read(tmp_path), 7)


def test_two_damaged_steps_are_passed_over(tmp_path):
    write(tmp_path, 3, 5, 7)
    truncate(tmp_path / "5")
    delete_largest_file(tmp_path / "7")
    assert is_state(read(tmp_path), 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "unreadable-5", "unreadable-7"]


def test_a_run_is_not_begun_anew_over_steps_of_which_none_can_be_read(tmp_path):
    write(tmp_path, 5, 7)
    truncate(tmp_path / "5")
    truncate(tmp_path / "7")
    with pytest.raises(
        ValueError, match="none of the checkpoints in .* can be read; move them away"
    ) as error:
        read(tmp_path)
    assert "step 5: " in str(error.value) and "step 7: " in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["5", "7"]


def test_a_step_that_was_not_finished_does_not_exist(tmp_path):
    """What a killed process leaves: a folder under another name, without the final rename."""
    write(tmp_path, 5, 7)
    (tmp_path / "7").rename(tmp_path / "7.orbax-checkpoint-tmp-0")
    assert is_state(read(tmp_path), 5)


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


def test_how_often_a_run_saves_and_says_may_change_and_so_may_stages_be_added(tmp_path):
    write(tmp_path, 7)
    more = dataclasses.replace(RUN.stages[2], name="longer")
    other = dataclasses.replace(
        RUN, checkpoint_every=3, keep=1, log_every=9, eval_batches=2, stages=(*RUN.stages, more)
    )
    assert is_state(read(tmp_path, other), 7)
