"""Training speed on several devices, and whether every mesh computes the same.

    python -m train.measure.scaling [--data 2 | --expert 2 | --context 2 ...] [--rows 2] [--length 32768] [--json FILE]

times steps of the sparse stage of ``large`` with random weights and tokens, on one device or on a mesh of all.
The losses are printed in full: for the same rows they match any other mesh up to summation order.
"""

import argparse
import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from dsa_jax.commands.errors import run_command
from dsa_jax.commands.outputs import outputs_locked, write_json
from dsa_jax.config import ModelConfig
from dsa_jax.sharding import AXES
from train.config import MeshSpec, Run, Source, sparse
from train.initial import initial_params
from train.loss import switched
from train.measure.flops import training_flops
from train.measure.throughput import medium, random_batch
from train.metrics import memory_bytes
from train.placement import RunSharding
from train.step import compiled_step


def large() -> ModelConfig:
    """A model of 2.2 B parameters whose attention has V3.2's dimensions per head and 64 heads."""
    return dataclasses.replace(medium(), d_model=2048, n_layers=8, d_ff=8192, d_expert=1024, q_lora_rank=1024)


def measure(run: Run, steps: int) -> dict[str, Any]:
    """Times the first ``steps`` steps of a run.

    Returns:
      devices; losses of all steps; seconds per step (median without the first); tokens_per_s and flops_per_s per
      device; planned_bytes of the compiled program; peak_bytes (None if the device does not report it);
      compile_seconds.

    Raises:
      FloatingPointError: a loss is not finite.
    """
    sharding, stage = RunSharding(run), run.stages[0]
    batch = random_batch(run.model, run.batch, run.seq_len)
    with sharding.use_mesh():
        state = sharding.begin_stage(0, initial_params(run, sharding=sharding), stage)
        inputs = sharding.global_batch({name: rows[sharding.rows] for name, rows in batch.items()})
        begin = time.perf_counter()
        step = (
            compiled_step(run.model, stage, 0.0, sharding.mesh, run.accumulate).lower(state, inputs).compile()
        )
        compile_seconds = time.perf_counter() - begin
        plan, losses, took = step.memory_analysis(), [], []
        for _ in range(steps):
            begin = time.perf_counter()
            state, metrics = step(state, inputs)
            losses.append(float(metrics["loss"]))
            took.append(time.perf_counter() - begin)
    if not all(math.isfinite(loss) for loss in losses):
        raise FloatingPointError(f"losses must be finite to compare meshes and their speed, got {losses}")
    seconds = statistics.median(took[1:])
    rate = run.batch * run.seq_len / seconds / sharding.n_devices
    flops = training_flops(switched(run.model, stage), run.seq_len, stage.trains)
    return {
        "devices": sharding.n_devices,
        "losses": losses,
        "seconds": seconds,
        "tokens_per_s_per_device": rate,
        "flops_per_s_per_device": rate * sum(flops.values()),
        "planned_bytes": plan.argument_size_in_bytes + plan.temp_size_in_bytes,
        "peak_bytes": memory_bytes(),
        "compile_seconds": compile_seconds,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m train.measure.scaling", description=large.__doc__)
    for axis in AXES:
        parser.add_argument(f"--{axis}", type=int, default=1, help="size of this mesh axis")
    parser.add_argument("--rows", type=int, default=2, help="rows per step, on all devices together")
    parser.add_argument("--length", type=int, default=32768, help="tokens per row")
    parser.add_argument("--steps", type=int, default=4, help="steps, of which the first is not timed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to a file")
    options = parser.parse_args(arguments)

    def start() -> int:
        with outputs_locked(options.json):
            return _run(options)

    return run_command("python -m train.measure.scaling", start)


def _run(options: argparse.Namespace) -> int:
    """Prints and writes what was measured."""
    axes = {axis: getattr(options, axis) for axis in AXES}
    run = Run(
        model=large(),
        stages=(sparse(options.steps, lr=1e-4, index_lr=1e-3),),
        data=(Source(kind="associative_recall"),),  # not read: the tokens are random
        batch=options.rows,
        seq_len=options.length,
        mesh=MeshSpec(**axes) if max(axes.values()) > 1 else None,
    )
    split = ", ".join(f"{axis}={n}" for axis, n in axes.items() if n > 1) or "one device"
    device = jax.devices()[0].device_kind
    parameters = f"{run.model.param_count() / 1e9:.2f} B parameters"
    print(f"{device}, jax {jax.__version__}, {parameters}, {split}", flush=True)
    found = measure(run, options.steps)
    print(
        f"{options.rows} rows of {options.length}: {found['seconds']:.3f} s, "
        f"{found['tokens_per_s_per_device']:.0f} tokens/s and {found['flops_per_s_per_device'] / 1e12:.1f} TFLOP/s per "
        f"device, {found['planned_bytes'] / 2**30:.1f} GiB planned, compiled in {found['compile_seconds']:.0f} s\n"
        f"losses {', '.join(f'{loss:.7f}' for loss in found['losses'])}"
    )
    if options.json:
        about = {"device": device, "jax": jax.__version__, "mesh": axes, "rows": options.rows}
        write_json(options.json, about | {"length": options.length} | found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
