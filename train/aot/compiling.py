"""From a job and a mesh to XLA's compiled program, or to its memory plan."""

import dataclasses
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsa_jax.cache import init_cache
from dsa_jax.generate import compiled_steps
from dsa_jax.sharding import RULES, batch_sharding, cache_shardings, mesh_text, param_shardings
from dsa_jax.transformer import Transformer
from train.aot.job import Job
from train.aot.options import Options
from train.optimizer import make_optimizer, split
from train.step import TrainState, compiled_step


def program(job: Job, mesh: Mesh) -> tuple[Any, tuple[Any, ...]]:
    """(jitted step of train.trainer or dsa_jax.generate, its arguments as shapes with shardings)."""
    config, rows = job.config, P(RULES.batch)

    def init() -> Any:
        return Transformer(config).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))

    def sharded(shapes: Any, shardings: Any) -> Any:
        one = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
        return jax.tree.map(one, shapes, shardings)

    def array(shape: tuple[int, ...], dtype: Any, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    if job.stage:
        stage = job.stage
        params = jax.eval_shape(init)
        # Not begin_stage, which refuses a state in bfloat16: --param-dtype also asks what such a state would take.
        opt_state = jax.eval_shape(make_optimizer(stage).init, split(params, stage)[0])
        state = TrainState(step=jax.ShapeDtypeStruct((), jnp.int32), params=params, opt_state=opt_state)
        shardings = param_shardings(state, config, mesh)
        spec = batch_sharding(config, mesh, job.batch, job.seq_len).spec
        batch = {
            n: array((job.batch, job.seq_len), jnp.int32, spec) for n in ("tokens", "targets", "segment_ids")
        }
        return compiled_step(config, stage, 0.0, mesh), (sharded(state, shardings), batch)

    shapes = jax.eval_shape(init)
    params = sharded(shapes, param_shardings(shapes, config, mesh))
    cache = sharded(
        jax.eval_shape(lambda: init_cache(config, job.batch, job.seq_len)),
        cache_shardings(config, mesh, job.batch),
    )
    prefill, decode = compiled_steps(config)
    if job.mode == "decode":
        return decode, (
            params,
            array((job.batch,), jnp.int32, rows),
            array((job.batch,), jnp.bool_, rows),
            cache,
        )
    tokens = array((job.batch, job.chunk), jnp.int32, batch_sharding(config, mesh, job.batch, job.chunk).spec)
    last = array((job.batch, config.vocab_size), jnp.float32, P(RULES.batch, RULES.vocab))
    return prefill, (params, tokens, tokens, cache, last)


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """memory: bytes per device by use, with "peak"; capacity: bytes that a device has; text, live_range: XLA's dumps.

    refused: XLA refused the program because it does not fit; peak and capacity are then XLA's numbers.
    """

    memory: dict[str, int]
    capacity: int
    refused: bool
    text: str
    live_range: str


def compile_step(job: Job, mesh: Mesh, folder: Path) -> Compiled:
    """Compiles the step to machine code. A step that does not fit is no error: its plan and peak are returned.

    The program is read from XLA's dump in ``folder``, because jaxlib cannot read back all programs of libtpu
    (``as_text()``: "async-update instruction should have 1 operands"). The dump also has the live ranges.

    Raises:
      NotImplementedError: XLA cannot compile the step.
    """
    step, arguments = program(job, mesh)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = step.trace(*arguments).lower(lowering_platforms=("cpu" if job.chip.is_gpu else "tpu",))
    memory, capacity, refused = {}, int(job.chip.hbm_bytes), None
    try:
        compiled = lowered.compile(
            compiler_options={"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}
        )
        memory = memory_of(compiled.memory_analysis())
    except jax.errors.JaxRuntimeError as error:
        refused = refusal(str(error))
        if refused is None:
            raise NotImplementedError(f"XLA cannot compile this step: {str(error)[:800]}") from error
        needed, capacity = refused
        memory = memory_planned(dumped(folder, "-buffer-assignment.txt")) | {"peak": needed}
    return Compiled(
        memory=memory, capacity=capacity, refused=refused is not None, text=dumped(folder, ".txt"),
        live_range=dumped(folder, "-live-range.txt"),
    )  # fmt: skip


def plan_step(job: Job, options: Options, sizes: Mapping[str, int], folder: Path) -> Compiled:
    """As ``compile_step`` without machine code: another process compiles, and is ended once its dump has the plan.

    Raises:
      ValueError: that process failed.
    """
    alone = dataclasses.replace(
        options, plan=False, suggest=False, mesh=mesh_text(sizes), dump=folder, json=None, traceback=False
    )
    command = [sys.executable, "-m", "train.aot", *_as_arguments(alone)]
    with (folder / "said.txt").open("w+") as said:
        child = subprocess.Popen(command, env=child_environment(), stdout=said, stderr=subprocess.STDOUT)
        try:
            while child.poll() is None and not dumped(folder, "_after_buffer_assignment.txt"):
                time.sleep(0.5)
            if child.poll() is None:
                time.sleep(1.0)  # this last file may be incomplete; the others are not
            ended = child.poll()
        finally:
            child.kill()
            child.wait()
        said.seek(0)
        output = said.read()
    assignment = dumped(folder, "-buffer-assignment.txt")
    if ended not in (None, 0, 1) or not assignment:
        raise ValueError(f"the compiling process ended with {ended}: {output.strip()[-2000:]}")
    return Compiled(
        memory=memory_planned(assignment), capacity=int(job.chip.hbm_bytes), refused=ended == 1,
        text=dumped(folder, ".txt"), live_range=dumped(folder, "-live-range.txt"),
    )  # fmt: skip


def dumped(folder: Path, end: str) -> str:
    """The text of one of XLA's dumps of the optimised program, "" if there is none."""
    found = sorted(folder.glob(f"*after_optimizations{end}"))
    return found[-1].read_text() if found else ""


def child_environment() -> dict[str, str]:
    """An environment in which another Python finds the same modules."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def _as_arguments(options: Options) -> list[str]:
    arguments: list[str] = []
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if value is True:
            arguments.append(f"--{field.name.replace('_', '-')}")
        elif value not in (None, False, ""):
            arguments += [f"--{field.name.replace('_', '-')}", str(value)]
    return arguments


def memory_of(stats: Any) -> dict[str, int]:
    """Bytes by use from XLA's memory_analysis. aliased: outputs that reuse the memory of arguments."""
    return with_peak(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )


def memory_planned(assignment: str) -> dict[str, int]:
    """As ``memory_of``, from XLA's dump of its buffer assignment. The code's size is not known at that point."""
    found = dict.fromkeys(("arguments", "outputs", "aliased", "temporaries"), 0)
    for size, what in re.findall(r"^allocation \d+: size (\d+), (.*)$", assignment, re.MULTILINE):
        color = re.search(r"color (\d+)", what)
        if color and color[1] != "0":  # not main memory
            continue
        is_argument, is_output = "parameter" in what, "maybe-live-out" in what
        found["arguments"] += int(size) * is_argument
        found["outputs"] += int(size) * is_output
        found["aliased"] += int(size) * (is_argument and is_output)
        found["temporaries"] += int(size) * ("preallocated-temp" in what)
    return with_peak(**found)


def with_peak(**uses: int) -> dict[str, int]:
    return uses | {"peak": sum(uses.values()) - 2 * uses["aliased"]}


def refusal(message: str) -> tuple[int, int] | None:
    """(bytes needed, bytes available) from XLA's message about a program that does not fit; None for other messages."""
    units = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
    size = r"\(?([\d.]+)([KMGT]?)i?B?\)?"
    for form in (
        rf"required for HLO temporaries {size} exceeds available HBM {size}",
        rf"Used {size} of {size} hbm",
    ):
        if found := re.search(form, message):
            needed, available = (float(found[i]) * 2.0 ** units[found[i + 1]] for i in (1, 3))
            return round(needed), round(available)
    return None
