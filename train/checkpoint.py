"""Checkpoints of a run: parameters, optimizer, data position and the run's own description, through Orbax.

Orbax writes in the background and makes a step visible only when it is complete, so a killed process leaves the
previous step intact. Each step has a digest per leaf, of what was in the devices' memory. A step that cannot be read,
or that reads as something else than was saved, is set aside, and the one before it is used. Several processes call the
same methods at the same time; each writes and reads the parts that it holds, in a folder that all of them see.
"""

import contextlib
import dataclasses
import errno
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import traverse_util

from dsa_jax.checkpoint.files import first_line, free_bytes
from dsa_jax.checkpoint.leaf_digest import leaf_digests
from dsa_jax.checkpoint.run_digests import DIGESTS, FORMAT, differing, json_digest
from train.config import Run, contradictions, to_json
from train.placement import RunSharding
from train.step import TrainState, begin_stage

_logger = logging.getLogger(__name__)
# What Orbax, tensorstore and json raise for files that are missing, cut short, overwritten or changed in one bit.
UNREADABLE = (
    ValueError, KeyError, TypeError, OSError, RuntimeError, AttributeError, IndexError, AssertionError, ImportError,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Restored:
    """The state after ``state.step`` steps, and the position in the data of its stage."""

    state: TrainState
    data: dict[str, Any]


class Checkpoints:
    """The folder ``path``: one numbered folder per step, at most ``keep`` of them.

    Each holds the items params (readable by `dsa_jax.load_params`), opt_state, data, run and digests.
    read_only: for a run that another process may be training; nothing is written, removed or renamed.
    """

    def __init__(self, path: Path, keep: int, read_only: bool = False) -> None:
        self.path = path.resolve()
        self.read_only = read_only
        self.n_bytes = 0  # of the arrays of the last step that was given to ``save``
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=not read_only,  # left by a killed process
            read_only=read_only,
        )
        self._manager = ocp.CheckpointManager(self.path, options=options)

    def save(self, state: TrainState, data: dict[str, Any], run: Run) -> None:
        """Copies the state and writes it in the background; ``close`` and the next ``save`` wait for that."""
        self.n_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.opt_state)))
        _refuse_full_disk(self.path, self.n_bytes)
        description = to_json(run)
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            opt_state=ocp.args.StandardSave(_numbered(state.opt_state)),
            data=ocp.args.JsonSave(data),
            run=ocp.args.JsonSave(description),
            digests=ocp.args.JsonSave(
                {
                    "format": FORMAT,
                    "opt_state_names": _names_of_numbers(state.opt_state),
                    "data": json_digest(data),
                    "run": json_digest(description),
                }
                | _array_digests(state)
            ),
        )
        self._manager.save(int(state.step), args=items)

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def restore(self, run: Run, params: Any, sharding: RunSharding | None = None) -> Restored | None:
        """The newest readable step, or None if there is none.

        params: arrays or ``jax.ShapeDtypeStruct`` of the run's parameters (with adapters, if it has any).
        sharding: where to put the arrays, whatever mesh wrote them; None: on one device.

        Raises:
          ValueError: the checkpoint belongs to a run that contradicts this one, or no step can be read; all then stay
            as they are. With several processes: the newest step cannot be read.
        """
        sharding = sharding or RunSharding(dataclasses.replace(run, mesh=None))
        faults: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                digests = self._digests(step)
                stored = self._description(step, digests)
            except UNREADABLE as error:
                faults[step] = self._fault(step, error)
                continue
            if differences := contradictions(stored, run):
                raise ValueError(
                    f"the checkpoint of step {step} in {self.path} was written by another run; "
                    "choose another folder or undo: " + "; ".join(differences)
                )
            try:
                restored = self._read(step, run, params, sharding)
                self._check(step, restored, digests)
            except UNREADABLE as error:
                faults[step] = self._fault(step, error)
                continue
            self._set_aside(faults)
            return restored
        if faults:
            reasons = "; ".join(f"step {step}: {reason}" for step, reason in faults.items())
            raise ValueError(
                f"none of the checkpoints in {self.path} can be read; move them away to start anew ({reasons})"
            )
        return None

    def _fault(self, step: int, error: Exception) -> str:
        """Why the step cannot be read. With several processes that ends the run: the others may have read the step."""
        if jax.process_count() == 1:
            return first_line(error)
        if isinstance(error, jax.errors.JaxRuntimeError):  # a process was lost; the step itself may be fine
            raise error
        raise ValueError(
            f"the checkpoint of step {step} in {self.path} cannot be read; move it away to resume from the "
            f"step before it ({first_line(error)})"
        ) from error

    def _description(self, step: int, digests: dict[str, Any] | None) -> dict[str, Any]:
        """The run that wrote the step."""
        stored = self._json(step, "run")
        if digests is not None:
            _refuse(differing(digests, "run", json_digest(stored)))
        return stored

    def _digests(self, step: int) -> dict[str, Any] | None:
        """What was stored with the step; None for one of a version that stored nothing."""
        return self._json(step, DIGESTS) if (self.path / str(step) / DIGESTS).exists() else None

    def _json(self, step: int, item: str) -> dict[str, Any]:
        found = self._manager.restore(step, args=ocp.args.Composite(**{item: ocp.args.JsonRestore()}))[item]
        if not isinstance(found, dict):
            raise ValueError(f"{item} must be a JSON object, got a {type(found).__name__}")
        return found

    def _read(self, step: int, run: Run, params: Any, sharding: RunSharding) -> Restored:
        stage = run.stages[run.stage_at(step)[0]]
        shapes = jax.eval_shape(lambda params: begin_stage(jnp.int32(step), params, stage), params)
        shapes = sharding.with_shardings(shapes)
        leaves, tree = jax.tree.flatten(shapes.opt_state)
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(shapes.params),
            opt_state=ocp.args.StandardRestore({str(i): leaf for i, leaf in enumerate(leaves)}),
            data=ocp.args.JsonRestore(),
        )
        with _tensorstores_own_errors():
            found = self._manager.restore(step, args=items)
        opt_state = jax.tree.unflatten(tree, [found["opt_state"][str(i)] for i in range(len(leaves))])
        state = TrainState(step=sharding.replicated(step), params=found["params"], opt_state=opt_state)
        return Restored(state, found["data"])

    def _check(self, step: int, restored: Restored, digests: dict[str, Any] | None) -> None:
        """Raises ValueError, which names the leaves, if this is not what was saved."""
        if digests is None:
            _logger.warning(
                "the checkpoint of step %d in %s was saved without digests and is not checked",
                step,
                self.path,
            )
            return
        wrong = differing(digests, "data", json_digest(restored.data))
        for item, found in _array_digests(restored.state).items():
            wrong += differing(digests, item, found)
        _refuse(wrong)

    def _set_aside(self, faults: dict[int, str]) -> None:
        """Renames the folders of these steps: they are not read again, and new ones can take their place."""
        if self.read_only:
            for step, reason in faults.items():
                _logger.warning(
                    "the checkpoint of step %d in %s cannot be read (%s)", step, self.path, reason
                )
            return
        for step, reason in faults.items():
            aside = self.path / f"unreadable-{step}"
            shutil.rmtree(aside, ignore_errors=True)  # left by an earlier fall back from this step
            (self.path / str(step)).rename(aside)
            _logger.warning(
                "the checkpoint of step %d cannot be read (%s); it is now %s", step, reason, aside
            )
        if faults:
            self._manager.reload()

    def check(self) -> None:
        """Raises the error of a save in the background that has failed."""
        self._manager.check_for_errors()

    def kept(self) -> str:
        """Half a sentence for error messages: the newest step that is on disk."""
        steps = self.steps_on_disk()
        return f"the last good checkpoint is step {steps[-1]}" if steps else "no checkpoint was written yet"

    def steps_on_disk(self) -> list[int]:
        """As ``steps``, without a step whose save has failed."""
        if not self.path.is_dir():
            return []
        return sorted(int(path.name) for path in self.path.iterdir() if path.name.isdecimal())

    def close(self) -> None:
        """Waits until everything is written."""
        try:
            self._manager.wait_until_finished()
        finally:
            self._manager.close()

    def abandon(self) -> None:
        """``close`` after an error: one of its own would hide that error. Removes what a failed save left behind."""
        with contextlib.suppress(*UNREADABLE), _tensorstores_own_errors():
            self.close()
        if jax.process_index() == 0:
            for unfinished in self.path.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(unfinished, ignore_errors=True)


@contextlib.contextmanager
def _tensorstores_own_errors() -> Iterator[None]:
    """Unwraps the bare ``Exception`` that Orbax puts around tensorstore's error for an unreadable array."""
    try:
        yield
    except Exception as error:
        if type(error) is Exception and isinstance(error.__cause__, UNREADABLE):
            raise error.__cause__ from None
        raise


def _refuse_full_disk(path: Path, needed: int) -> None:
    """Raises OSError before Orbax begins what cannot end well."""
    if (free := free_bytes(path)) < needed:
        raise OSError(errno.ENOSPC, f"{free:,} bytes are free, a checkpoint needs {needed:,}", str(path))


def _numbered(opt_state: Any) -> dict[str, Any]:
    """The leaves of an optimizer's state by their number, which is how they are stored."""
    return {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(opt_state))}


def _names_of_numbers(opt_state: Any) -> dict[str, str]:
    paths = jax.tree.leaves_with_path(opt_state)
    return {
        str(i): jax.tree_util.keystr(path, simple=True, separator=".") for i, (path, _) in enumerate(paths)
    }


def _array_digests(state: TrainState) -> dict[str, dict[str, str]]:
    """Item -> name of its array in the store -> digest."""
    items = {
        "params": traverse_util.flatten_dict(state.params, sep="."),
        "opt_state": _numbered(state.opt_state),
    }
    return {item: leaf_digests(arrays) for item, arrays in items.items()}


def _refuse(differing: list[str]) -> None:
    """Raises ValueError if anything differs from its digest."""
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ValueError(f"{', '.join(differing[:3])}{more}: not what was saved, by the digest saved with it")
