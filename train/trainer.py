"""A run from its first step to its last, or from the newest checkpoint of an interrupted run."""

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from pallas_kernels.bench.timing import product_rate
from train.checkpoint import Checkpoints
from train.config import Run, Stage
from train.data.sources import training_batches
from train.distributed import check_shared
from train.evaluation import Evaluation, fingerprint, summarise
from train.initial import checked, initial_params, lora_scale
from train.lora import adapted, merged
from train.loss import Metrics, switched
from train.measure.flops import training_flops
from train.metrics import EVAL_FILE, METRICS_FILE, JsonLines, LiveLine, as_json, memory_bytes
from train.placement import RunSharding
from train.private_jax import reached_preemption_sync_point
from train.run_folder import locked, write_description, write_errors_explained
from train.step import TrainState, compiled_step


class Stopped(Exception):
    """One of several processes received SIGTERM, and all have saved the same step."""


def train(
    run: Run, folder: str | os.PathLike[str], console: Console | None = None, params: Any = None
) -> Any:
    """Runs all stages in order and returns the trained {"params": tree}, adapters merged.

    params: what to start from, instead of ``run.init_from`` or random parameters.

    ``folder`` gets config.json, checkpoints/, metrics.jsonl and eval.jsonl (an evaluation before the first stage
    and after each). Called again with the same run, training resumes from the newest checkpoint. Results then match
    an uninterrupted run to the bit, or up to summation order if the mesh is another.

    With several processes (``train.distributed``) each calls this with the same arguments and a folder that all see;
    process 0 writes and prints.

    Raises:
      ValueError: the folder belongs to a run that contradicts this one, or data, model, mesh or ``params`` do not fit.
      BlockingIOError: another process is training into the folder, which is left alone.
      FloatingPointError: a loss or a gradient is not finite; the message names it and the last good checkpoint.
      CannotWrite: the disk is full, or the folder was removed or cannot be written for another reason.
      Stopped: see there.
    """
    run, folder = checked(run), Path(folder)
    sharding = RunSharding(run)
    with locked(folder):
        check_shared(folder)
        with _open_checkpoints(run, folder) as checkpoints, sharding.use_mesh():
            return _train(run, folder, sharding, checkpoints, console or Console(highlight=False), params)


@contextlib.contextmanager
def _open_checkpoints(run: Run, folder: Path) -> Iterator[Checkpoints]:
    """The run's checkpoints, closed at the end. Inside, what cannot be written is said in one sentence."""
    checkpoints: Checkpoints | None = None

    def kept() -> str:
        return checkpoints.kept() if checkpoints else "nothing was changed"

    with write_errors_explained(folder, kept, lambda: checkpoints.n_bytes if checkpoints else 0):
        checkpoints = Checkpoints(folder / "checkpoints", run.keep)
        try:
            yield checkpoints
        except BaseException:
            checkpoints.abandon()
            raise
        checkpoints.close()


def _train(
    run: Run, folder: Path, sharding: RunSharding, checkpoints: Checkpoints, console: Console, params: Any
) -> Any:
    writes = jax.process_index() == 0
    if not writes:
        console = Console(quiet=True)
    ceiling = product_rate(jnp.bfloat16) * sharding.n_devices if jax.default_backend() != "cpu" else None
    shapes = jax.eval_shape(lambda: initial_params(run, load=False))
    restored = checkpoints.restore(run, shapes, sharding)
    if writes:
        write_description(folder, run)
    if restored:
        state, data, resume_at = restored.state, restored.data, int(restored.state.step)
        console.print(f"resuming after step {resume_at} of {run.steps} ({folder})")
    else:
        start = initial_params(run, sharding=sharding) if params is None else sharding.place(params, shapes)
        state, data, resume_at = sharding.begin_stage(0, start, run.stages[0]), None, -1
    records = _Records(run, folder, console, resume_at)
    with contextlib.closing(records):
        state = _Trainer(run, sharding, checkpoints, records, ceiling).run_stages(state, data)
    summarise(records.evaluations.lines, console)
    return merged(state.params, lora_scale(run))


class _Records:
    """What a run writes about itself: metrics.jsonl, eval.jsonl and the live line."""

    def __init__(self, run: Run, folder: Path, console: Console, resume_at: int) -> None:
        self.folder = folder
        self.metrics = JsonLines(folder / METRICS_FILE, resume_at)
        self.evaluations = JsonLines(folder / EVAL_FILE, resume_at)
        self.live = LiveLine(console, run.steps)

    def close(self) -> None:
        self.live.close()
        self.metrics.close()
        self.evaluations.close()


class _Trainer:
    """All steps of a run from one state on, with reports, checkpoints and evaluations on the way.

    ceiling: FLOP/s of a plain matrix product on as many devices, which ``ceiling_share`` refers to; None on CPU.
    """

    def __init__(
        self,
        run: Run,
        sharding: RunSharding,
        checkpoints: Checkpoints,
        records: _Records,
        ceiling: float | None,
    ) -> None:
        self.run, self.sharding, self.checkpoints, self.records = run, sharding, checkpoints, records
        self.ceiling = ceiling
        self.evaluation = Evaluation(run, sharding)
        self.n_asked = 0

    def run_stages(self, state: TrainState, data: dict[str, Any] | None) -> TrainState:
        """``data``: position in the data of the state's stage; None: the beginning."""
        first, done = self.run.stage_at(int(state.step))
        if int(state.step) == 0:
            self.evaluate(state, "before")
        for index, stage in enumerate(self.run.stages[first:], start=first):
            if index > first:
                state, data, done = self.sharding.begin_stage(state.step, state.params, stage), None, 0
            if done < stage.steps:
                state = self.run_stage(state, stage, data, done)
            self.evaluate(state, stage.name)
        return state

    def run_stage(
        self, state: TrainState, stage: Stage, data: dict[str, Any] | None, done: int
    ) -> TrainState:
        """The stage's steps after the first ``done``."""
        run = self.run
        batches = training_batches(run, stage, start=data, rows=self.sharding.rows)
        step_function = compiled_step(run.model, stage, lora_scale(run), self.sharding.mesh, run.accumulate)
        speed = _Speed(run, stage, self.ceiling)
        pending: list[Metrics] = []  # of the steps since the last report
        first_step = int(state.step) - done
        for in_stage in range(done + 1, stage.steps + 1):
            step = first_step + in_stage
            state, metrics = step_function(state, self.sharding.global_batch(next(batches)))
            pending.append(metrics)
            self.checkpoints.check()
            stops = self.asked_to_stop()
            saves = in_stage == stage.steps or step % run.checkpoint_every == 0
            # The lines of a run do not depend on where it was interrupted.
            logs = saves or in_stage == 1 or step % run.log_every == 0
            if logs or stops or in_stage == done + 1:
                self.check_finite(pending, step)
                taken = speed.lap(len(pending))
                pending = []
            if logs:
                self.report(stage, step, as_json(metrics), taken)
            if saves or stops:
                self.records.metrics.sync()
                self.checkpoints.save(state, batches.get_state(), run)
            if stops:
                raise Stopped(
                    f"a process was asked to end; the checkpoint of step {step} is in {self.records.folder}"
                )
        return state

    def asked_to_stop(self) -> bool:
        """Whether one of several processes received SIGTERM: True after the same step in all. A lone process just ends.

        To be called once per step: JAX synchronises by the number of calls, which each process counts from 1.
        """
        self.n_asked += 1
        return reached_preemption_sync_point(self.n_asked)

    def check_finite(self, pending: Sequence[Metrics], step: int) -> None:
        """Raises FloatingPointError for the first of the last ``len(pending)`` steps that is not finite."""
        for bad_step, metrics in enumerate(pending, start=step + 1 - len(pending)):
            if bool(metrics["finite"]):
                continue
            bad = [n for n, v in as_json(metrics).items() if not np.isfinite(np.asarray(v, float)).all()]
            kept = self.checkpoints.kept()
            raise FloatingPointError(
                f"step {bad_step}: {', '.join(bad) or 'a gradient'} not finite; {kept} in {self.records.folder}. "
                "Lower the learning rate or look at the data of that step"
            )

    def report(self, stage: Stage, step: int, metrics: dict[str, Any], speed: dict[str, Any]) -> None:
        """Appends to metrics.jsonl and updates the live line."""
        values = {"step": step, "stage": stage.name} | metrics | speed
        del values["finite"]
        self.records.metrics.add(values)
        self.records.live.report(values)

    def evaluate(self, state: TrainState, after: str) -> None:
        """Appends to eval.jsonl, unless a resumed run finds this evaluation there."""
        step, lines = int(state.step), self.records.evaluations.lines
        if not self.evaluation.batches or any(
            (line["step"], line["after"]) == (step, after) for line in lines
        ):
            return
        found = self.evaluation.line(adapted(state.params, lora_scale(self.run)), after)
        sha256 = {"model_sha256": fingerprint(state.params)}
        self.records.evaluations.add({"step": step, "after": after} | found | sha256)


class _Speed:
    """Tokens and FLOPs per second between two reports. The first lap of a stage compiles and is left out."""

    def __init__(self, run: Run, stage: Stage, ceiling: float | None) -> None:
        self.tokens = run.batch * run.seq_len  # per step
        self.flops = sum(training_flops(switched(run.model, stage), run.seq_len, stage.trains).values())
        self.ceiling = ceiling
        self.since: float | None = None

    def lap(self, n_steps: int) -> dict[str, Any]:
        """Speed over the ``n_steps`` since the last call; nothing at the first call."""
        found: dict[str, Any] = {}
        if self.since is not None:
            tokens = n_steps * self.tokens / (time.perf_counter() - self.since)
            found = {"tokens_per_s": tokens, "flops_per_s": tokens * self.flops}
            if self.ceiling:
                share = tokens * self.flops / self.ceiling
                found |= {"ceiling": self.ceiling, "ceiling_share": share}
            found["memory_bytes"] = memory_bytes()
        self.since = time.perf_counter()
        return found
