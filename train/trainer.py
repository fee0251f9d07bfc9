"""A run from its first step to its last, or from wherever a killed one stopped."""

import dataclasses
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.experimental import multihost_utils
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dsa_jax.checkpoint import load_config, load_params
from dsa_jax.transformer import Transformer
from pallas_kernels.bench.timing import product_rate
from train.checkpoint import Checkpoints
from train.config import Run, Stage, to_json
from train.data.sources import rows_of, training_batches, validation_batches
from train.data.synthetic import Needles
from train.distributed import check_shared
from train.lora import merged, with_adapters
from train.loss import switched
from train.measure.evaluate import indexer_quality, needle_accuracy, score
from train.measure.flops import training_flops
from train.metrics import (
    EVAL_FILE,
    METRICS_FILE,
    JsonLines,
    LiveLine,
    as_json,
    memory_bytes,
)
from train.optimizer import group_of
from train.placement import Layout
from train.step import TrainState, compiled_step


class Stopped(Exception):
    """One of several processes was asked to end (SIGTERM), and all have saved the same step."""


DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the needles that an evaluation asks for: start to end of the row


def train(run: Run, folder: Path, console: Console | None = None, params: Any = None) -> Any:
    """Runs all stages in order and returns the trained {"params": tree}, adapters merged.

    params: what to begin with, instead of ``run.init_from`` or random parameters.

    ``folder`` gets config.json, checkpoints/, metrics.jsonl and eval.jsonl (an evaluation before the first stage
    and after each). Called again with the same run, it goes on after the newest checkpoint, to the same bits; on
    another mesh, to the same numbers but for the order of sums.

    With several processes (``train.distributed``) all call this alike, with a folder that all see; the first
    one writes and prints.

    Raises:
      ValueError: the folder belongs to a run that contradicts this one, or data, model and mesh do not fit.
      FloatingPointError: a loss or a gradient is not finite; the message names it and the last good checkpoint.
      Stopped: see there.
    """
    writes = jax.process_index() == 0
    console = (console or Console(highlight=False)) if writes else Console(quiet=True)
    layout = Layout(run)
    folder.mkdir(parents=True, exist_ok=True)
    check_shared(folder)
    ceiling = product_rate(jnp.bfloat16) * layout.n_devices if jax.default_backend() != "cpu" else None
    checkpoints = Checkpoints(folder / "checkpoints", run.keep)
    try:
        with layout.in_use():
            shapes = jax.eval_shape(lambda: initial_params(run, load=False))
            restored = checkpoints.restore(run, shapes, layout)
            if writes:
                (folder / "config.json").write_text(json.dumps(to_json(run), indent=1) + "\n")
            if restored is None:
                begin = initial_params(run, layout=layout) if params is None else layout.given(params)
                state, data = layout.begin_stage(0, begin, run.stages[0]), None
            else:
                state, data = restored.state, restored.data
                console.print(f"going on after step {int(state.step)} of {run.steps} ({folder})")
            resume_at = int(state.step) if restored else -1
            loop = _Loop(run, layout, folder, checkpoints, console, resume_at, ceiling)
            try:
                state = loop.go(state, data)
            finally:
                loop.close()
            summarise(loop.evaluations.lines, console)
            return merged(state.params, lora_scale(run))
    finally:
        checkpoints.close()


def initial_params(run: Run, load: bool = True, layout: Layout | None = None) -> Any:
    """What the first stage begins with: random, or ``run.init_from``, with adapters if the run has any.

    load False: random in any case, which is enough for shapes. layout: where to make or read them, each device
    its own part; None: on one device.
    """
    layout = layout or Layout(dataclasses.replace(run, mesh=None))
    key, tokens = jax.random.key(run.seed), jnp.zeros((1, 2), jnp.int32)
    init = Transformer(run.model).init
    where = layout.shardings(jax.eval_shape(init, key, tokens))
    if run.init_from and load:
        params = load_params(run.init_from, run.model, shardings=where)
    else:
        params = jax.jit(init, out_shardings=where)(key, tokens)
    lora = run.lora
    if lora is None:
        return params
    key = jax.random.fold_in(key, 1)
    if layout.mesh is None:
        return with_adapters(params, lora, key)

    def adapters(params, key):
        return {"lora": with_adapters(params, lora, key)["lora"]}

    where = layout.shardings(jax.eval_shape(adapters, params, key))
    return params | jax.jit(adapters, out_shardings=where)(params, key)


def from_checkpoint(run: Run) -> Run:
    """The run with the sizes of the model in ``run.init_from``; its own switches stay."""
    if run.init_from is None:
        return run
    switches = (
        "attention_form", "index_fp8", "kv_fp8", "implementation", "dtype", "param_dtype", "query_block", "remat",
    )  # fmt: skip
    changes = {name: getattr(run.model, name) for name in switches}
    return dataclasses.replace(run, model=load_config(run.init_from, **changes))


def lora_scale(run: Run) -> float:
    return run.lora.alpha / run.lora.rank if run.lora else 0.0


class _Loop:
    """The steps between two ends, and what is written on the way."""

    def __init__(
        self,
        run: Run,
        layout: Layout,
        folder: Path,
        checkpoints: Checkpoints,
        console: Console,
        resume_at: int,
        ceiling: float | None,
    ) -> None:
        self.run, self.layout, self.folder, self.checkpoints = run, layout, folder, checkpoints
        self.ceiling = ceiling
        self.metrics = JsonLines(folder / METRICS_FILE, resume_at)
        self.evaluations = JsonLines(folder / EVAL_FILE, resume_at)
        held_out = validation_batches(run, layout.rows) if run.eval_batches else []
        self.validation = [layout.batch(batch) for batch in held_out]
        sources = [rows_of(source, run.seq_len, "validation") for source in run.data]
        self.needles = [source for source in sources if isinstance(source, Needles)]
        self.line = LiveLine(console, run.steps)
        self.n_asked = 0

    def close(self) -> None:
        self.line.close()
        self.metrics.close()
        self.evaluations.close()

    def go(self, state: TrainState, data: dict[str, Any] | None) -> TrainState:
        """``data``: the position in the data of the stage that the state belongs to; None: its beginning."""
        first, done = self.run.stage_at(int(state.step))
        self.evaluate(state, "before")
        for index, stage in enumerate(self.run.stages[first:], start=first):
            if index > first:
                state, data, done = self.layout.begin_stage(state.step, state.params, stage), None, 0
            if done < stage.steps:
                state = self.one_stage(state, stage, data, done)
            self.evaluate(state, stage.name)
        return state

    def one_stage(
        self, state: TrainState, stage: Stage, data: dict[str, Any] | None, done: int
    ) -> TrainState:
        run = self.run
        batches = training_batches(run, stage, start=data, rows=self.layout.rows)
        step_function = compiled_step(run.model, stage, lora_scale(run), self.layout.mesh)
        flops = sum(training_flops(switched(run.model, stage), run.seq_len, stage.trains).values())
        waiting: list[dict[str, jax.Array]] = []
        begin, timed = time.perf_counter(), 0
        first_step = int(state.step) - done
        for in_stage in range(done + 1, stage.steps + 1):
            step = first_step + in_stage
            state, metrics = step_function(state, self.layout.batch(next(batches)))
            waiting.append(metrics)
            stops = self.asked_to_stop()
            saves = stops or in_stage == stage.steps or step % run.checkpoint_every == 0
            if step % run.log_every == 0 or saves or in_stage == done + 1:
                values = self._fetch(waiting, step)
                elapsed, n_steps = time.perf_counter() - begin, in_stage - done - timed
                if in_stage > done + 1:  # the first step compiles
                    values |= self._speed(n_steps, elapsed, flops)
                begin, timed = time.perf_counter(), in_stage - done
                values = {"step": step, "stage": stage.name} | values
                self.metrics.add(values)
                self.line.report(values)
                waiting = []
            if saves:
                self.checkpoints.save(state, batches.get_state(), run)
            if stops:
                raise Stopped(
                    f"a process was asked to end; the checkpoint of step {step} is in {self.folder}"
                )
        return state

    def asked_to_stop(self) -> bool:
        """Whether SIGTERM reached one of several processes; True after the same step in all. A process alone just ends.

        To be asked after every step. JAX agrees on a number of calls, counted from 1 whichever step came first.
        """
        self.n_asked += 1
        return multihost_utils.reached_preemption_sync_point(self.n_asked)

    def _fetch(self, waiting: list[dict[str, jax.Array]], step: int) -> dict[str, Any]:
        """The newest metrics as numbers, once all that are waiting proved finite."""
        for bad_step, metrics in enumerate(waiting, start=step + 1 - len(waiting)):
            if not bool(metrics["finite"]):
                bad = [n for n, v in as_json(metrics).items() if not np.isfinite(np.asarray(v, float)).all()]
                steps = self.checkpoints.steps()
                kept = (
                    f"the last good checkpoint is step {steps[-1]}"
                    if steps
                    else "no checkpoint was written yet"
                )
                raise FloatingPointError(
                    f"step {bad_step}: {', '.join(bad) or 'a gradient'} not finite; {kept} in {self.folder}. "
                    "Lower the learning rate or look at the data of that step"
                )
        return {name: value for name, value in as_json(waiting[-1]).items() if name != "finite"}

    def _speed(self, n_steps: int, seconds: float, flops_per_token: float) -> dict[str, Any]:
        tokens = n_steps * self.run.batch * self.run.seq_len / seconds
        found = {"tokens_per_s": tokens, "flops_per_s": tokens * flops_per_token}
        if self.ceiling:
            found |= {"ceiling": self.ceiling, "ceiling_share": tokens * flops_per_token / self.ceiling}
        return found | {"memory_bytes": memory_bytes()}

    def evaluate(self, state: TrainState, after: str) -> None:
        """Appends to eval.jsonl what the parameters are worth now, once for a place in the run."""
        step = int(state.step)
        if not self.validation or (after == "before" and step):
            return
        if any(line["step"] == step and line["after"] == after for line in self.evaluations.lines):
            return
        params, model = merged(state.params, lora_scale(self.run)), self.run.model
        line: dict[str, Any] = {"step": step, "after": after}
        for attention in ("dense", "sparse"):
            result = score(params, model, self.validation, attention)
            line |= {f"ce_{attention}": result.cross_entropy, f"accuracy_{attention}": result.accuracy}
        was_sparse = any(s.name == after and s.attention == "sparse" for s in self.run.stages)
        reads = dataclasses.replace(model, attention="sparse" if was_sparse else "dense")
        line["indexer"] = indexer_quality(params, reads, self.validation[0])
        line["model_sha256"] = fingerprint(state.params)
        if self.needles:
            lengths = [self.run.seq_len // 4, self.run.seq_len]
            line["needles"] = needle_accuracy(params, model, self.needles[0], lengths, DEPTHS, rows=32)
        self.evaluations.add(line)


def fingerprint(params: Any) -> str:
    """SHA-256 of every parameter that is not an indexer's: equal before and after a warm-up, on the same mesh.

    Each process digests the parts that it holds; what they found is digested in the order of the processes.
    """
    digest = hashlib.sha256()
    for path, leaf in sorted(traverse_util.flatten_dict(params, sep=".").items()):
        if group_of(path) == "indexer":
            continue
        parts = [(str(part.index), part) for part in leaf.addressable_shards if part.replica_id == 0]
        for index, part in sorted(parts, key=lambda entry: entry[0]):
            digest.update(f"{path} {index}".encode())
            digest.update(np.asarray(part.data).tobytes())
    found = multihost_utils.process_allgather(np.frombuffer(digest.digest(), np.uint8))
    return hashlib.sha256(found.tobytes()).hexdigest()


def summarise(evaluations: list[dict[str, Any]], console: Console) -> None:
    """Prints what each stage changed: the same validation batches, dense and through the indexer's choice."""
    if not evaluations:
        return
    table = Table(
        "after", "step", "CE\ndense", "\nsparse", "accuracy\ndense", "\nsparse", "\nKL", "mass\nrecall",
        "worst\nlayer", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0),
        caption="mass recall: of the attention that the best choice of as many keys would catch",
    )  # fmt: skip
    for line in evaluations:
        layers = line["indexer"]
        kl = np.mean([layer["kl"] for layer in layers]) if layers else float("nan")
        shares = [layer["recall"] / layer["recall_oracle"] for layer in layers]
        table.add_row(
            line["after"], str(line["step"]), f"{line['ce_dense']:.4f}", f"{line['ce_sparse']:.4f}",
            f"{line['accuracy_dense']:.3f}", f"{line['accuracy_sparse']:.3f}", f"{kl:.4f}",
            *((f"{np.mean(shares):.3f}", f"{np.min(shares):.3f}") if shares else ("", "")),
        )  # fmt: skip
    console.print(table)
