"""The command `dsa-jax aot` (`python -m train.aot`): reads the options, compiles, prints and writes."""

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax
from rich.console import Console

from dsa_jax.commands.errors import run_command
from dsa_jax.commands.outputs import outputs_locked, write_json
from train.aot.chips import CHIPS
from train.aot.choosing import Estimate, ranked
from train.aot.compiling import child_environment
from train.aot.costs import examine
from train.aot.job import chip_and_count, read_job, read_mesh
from train.aot.options import Options
from train.aot.report import introduce, progress, report, suggestions

# For libtpu without a TPU: no metadata server, no lock against other processes, no warnings about either.
QUIET = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_STDERR_LOG_LEVEL": "3", "TF_CPP_MIN_LOG_LEVEL": "3",
}  # fmt: skip


def run(options: Options, console: Console) -> int:
    """Compiles, prints, writes, and returns the exit code."""
    job = read_job(options)
    estimates: list[Estimate] = []
    if options.suggest:
        estimates = ranked(job)[: options.tries]
        if not estimates:
            raise ValueError(
                f"no mesh of {len(job.devices)} devices divides --batch {job.batch} and --seq-len {job.seq_len}"
            )
    meshes = [estimate.mesh for estimate in estimates] or [read_mesh(options.mesh, job)]
    introduce(job, options, console)
    with progress(console) as doing:
        results = [examine(job, options, sizes, doing) for sizes in meshes]
    results.sort(key=lambda found: (not found["fits"], sum(found["seconds_estimated"].values())))
    report(job, results[0], console)
    if options.suggest:
        suggestions(results, estimates, console)
    if options.json is not None:
        content = {
            "asked": {name: str(v) if isinstance(v, Path) else v for name, v in vars(options).items()},
            "date": time.strftime("%Y-%m-%d"),
            "versions": {"jax": jax.__version__, "libtpu": _version("libtpu")},
            "devices": len(job.devices),
            "config": dataclasses.asdict(job.config),
            "chip": dataclasses.asdict(job.chip),
            "results": results,
        }
        write_json(options.json, content)
    return 0 if results[0]["fits"] else 1


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    import tyro

    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = tyro.cli(Options, prog="dsa-jax aot", args=arguments, config=(tyro.conf.FlagCreatePairsOff,))
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cpu")  # leaves an attached TPU alone

    def start() -> int:
        chip, count = chip_and_count(options.topology)
        if CHIPS[chip].is_gpu and len(jax.devices("cpu")) != count:
            return in_another_process(arguments, count)
        with outputs_locked(options.json):
            return run(options, Console(width=None if sys.stdout.isatty() else 120))

    return run_command("dsa-jax aot", start, traceback=options.traceback)


def in_another_process(arguments: Sequence[str], n_devices: int) -> int:
    """Runs the same command in a process with this many CPU devices."""
    flag = f"--xla_force_host_platform_device_count={n_devices}"
    if flag in os.environ.get("XLA_FLAGS", ""):
        raise ValueError(f"JAX has {len(jax.devices('cpu'))} CPU devices despite XLA_FLAGS={flag}")
    changes = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}", "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-m", "train.aot", *arguments], env=child_environment() | changes, check=False
    ).returncode
