"""The printed report of `dsa-jax aot`."""

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from dsa_jax.sharding import AXES, mesh_text
from train.aot.choosing import Estimate
from train.aot.job import Job
from train.aot.options import Options

GIB = 2**30


def introduce(job: Job, options: Options, console: Console) -> None:
    """Prints the job and its assumptions."""
    config, chip, n = job.config, job.chip, len(job.devices)
    devices = f", {n} devices" if chip.devices_per_chip > 1 else ""
    lines = [
        f"{options.mode} of {options.config}, {config.n_layers} layers, {config.param_count() / 1e9:,.1f} B weights: "
        f"{job.batch} x {job.queries} tokens in rows of {job.seq_len}",
        f"{options.topology}, {n // chip.devices_per_chip} chips{devices}; kernels: {config.implementation}",
    ]
    if chip.is_gpu:
        lines.append(
            "GPUs are simulated on this CPU: program and memory plan are the CPU compiler's, not a GPU's"
        )
    if job.stage:
        lines.append(
            f"parameters, gradients and Adam's two moments in {config.param_dtype}; the backward pass recomputes each "
            "layer with the keys that the forward pass selected"
        )
        if config.param_dtype == "bfloat16":
            lines.append(
                "`python -m train` keeps what it trains in float32: --param-dtype float32 shows what that takes"
            )
    else:
        lines.append(f"weights and cache in {config.param_dtype}")
    if job.seq_len <= config.index_topk:
        lines.append(
            f"no index scores: a row of {job.seq_len} has at most index_topk={config.index_topk} keys"
        )
    elif job.mode == "warmup":
        lines.append(f"the indexer trains on dense attention over {job.seq_len} keys")
    else:
        lines.append(f"the indexer scores {job.seq_len} keys, attention reads {config.index_topk} of them")
    for line in lines:
        console.print(line, highlight=False, markup=False)


def report(job: Job, found: Mapping[str, Any], console: Console) -> None:
    """Prints what ``train.aot.costs.examine`` found."""
    memory, capacity = found["memory"], found["capacity"]
    free = (capacity - memory["peak"]) / GIB
    verdict = (
        f"[green]fits, {free:.1f} GiB left" if found["fits"] else f"[red]does not fit, by {-free:.1f} GiB"
    )
    console.print(f"\n{mesh_text(found['mesh'])}: [bold]{verdict}", highlight=False)
    if found["refused"]:
        console.print("XLA refuses it; what follows is its plan", highlight=False)

    table = _table("memory per device", "GiB")
    for name, size in memory.items():
        table.add_row(name, f"{size / GIB:.2f}")
    table.add_row("capacity", f"{capacity / GIB:.2f}")
    console.print(table)

    table = _table("received per device", "axes", "calls", "GB")
    for exchange in found["collectives"]:
        axes = " x ".join(exchange["axes"]) or "one device"
        table.add_row(exchange["kind"], axes, f"{exchange['runs']:,}", f"{exchange['bytes'] / 1e9:,.2f}")
    console.print(table)

    seconds, chip = found["seconds_estimated"], job.chip
    table = _table("estimated, not measured", "per device", "at", "seconds")
    arithmetic = max(found["product_flops_per_device"], found["flops_per_device"])
    table.add_row(
        "matrix products", f"{arithmetic / 1e12:,.1f} TFLOP", f"{chip.bf16_flops / 1e12:,.0f} TFLOP/s",
        f"{seconds['arithmetic']:,.3f}",
    )  # fmt: skip
    table.add_row(
        "main memory", f"{found['hbm_traffic'] / 1e9:,.0f} GB", f"{chip.hbm_bandwidth / 1e9:,.0f} GB/s",
        f"{seconds['memory']:,.3f}",
    )  # fmt: skip
    for axes, time_ in found["network_seconds"].items():
        table.add_row(
            f"network, {axes}", "", f"{chip.link_bandwidth / 1e9:.0f} GB/s per link", f"{time_:,.3f}"
        )
    console.print(table)
    for line in assumptions(job, found):
        console.print(line, highlight=False, markup=False)

    table = _table("alive at peak memory", "GiB", "times", "from")
    for (size, what, origin), times in grouped(found["alive_at_peak"])[:12]:
        table.add_row(what, f"{size * times / GIB:.2f}", str(times), origin)
    console.print(table)
    console.print(
        f"{'compiled' if found['compiled'] else 'planned, not compiled,'} in {found['compile_seconds']:.0f} s; "
        f"this process used up to {found['host_peak_bytes'] / GIB:.1f} GiB",
        highlight=False,
    )


def assumptions(job: Job, found: Mapping[str, Any]) -> Iterator[str]:
    """The assumptions of the estimate, one per line."""
    seconds, chip = found["seconds_estimated"], job.chip
    longest, total = max(seconds.values()), sum(seconds.values())
    bound = max(seconds, key=lambda name: seconds[name])
    needed, done = found["flops_per_device"], found["product_flops_per_device"]
    yield f"a step takes {longest:,.2f} s if everything overlaps ({bound} binds), {total:,.2f} s if nothing does"
    yield (
        f"products: the mathematics needs {needed / 1e12:,.1f} TFLOP per device (train/measure/flops.py); the program "
        f"does {done / 1e12:,.1f} with recomputed, masked and padded ones; the estimate uses the larger figure"
    )
    if "tpu_custom_call" in found["custom_calls"]:
        yield "the experts' grouped products, inside custom calls, are counted as the mathematics needs them"
    if (longer := found["seconds_with_every_branch"]) != seconds:
        times = ", ".join(f"{name} {value:,.2f} s" for name, value in longer.items())
        yield f"only the shortest branch of a conditional is counted; if all branches ran: {times}"
    yield "main memory: each kernel reads its operands once and writes its results once"
    used = ", ".join(f"{axis} {found['links'][axis]}" for axis in AXES if found["mesh"][axis] > 1)
    yield f"network: rings over links in both directions ({used or 'none'}), no latency, no contention"
    yield f"rates: {chip.source}"
    if calls := found["custom_calls"]:
        yield "custom calls: " + ", ".join(f"{name} x {n:,}" for name, n in list(calls.items())[:6])
    if loops := found["unknown_loops"]:
        yield f"{len(loops)} loops of unknown length are counted once: {', '.join(loops[:4])}"


def grouped(alive: Sequence[Mapping[str, Any]]) -> list[tuple[tuple[int, str, str], int]]:
    """((bytes of one, what, origin), how many) of the values at the peak except arguments, largest first."""
    found: dict[tuple[int, str, str], int] = {}
    for value in alive:
        if value["opcode"] != "parameter":
            key = (value["bytes"], f"{value['opcode']} {value['shape']}", _origin(value["op_name"]))
            found[key] = found.get(key, 0) + 1
    return sorted(found.items(), key=lambda item: -item[0][0] * item[1])


def _origin(op_name: str) -> str:
    """The end of a JAX operation's path, without transformations."""
    words = [re.sub(r"^(?:\w+\()+|\)+$", "", word) for word in op_name.split("/")]
    kept = [
        w
        for w in words
        if w and w not in ("while", "body", "closed_call", "checkpoint", "rematted_computation")
    ]
    return "/".join(kept[-4:])


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for number, name in enumerate(columns):
        right = name in ("GiB", "GB", "calls", "seconds", "times", "per device", "at")
        table.add_column(name, justify="right" if number and right else "left")
    return table


@contextlib.contextmanager
def progress(console: Console) -> Iterator[Callable[[str], None]]:
    """A live line with the current activity and its time; without a terminal, one plain line per activity."""
    if not console.is_terminal:
        yield lambda doing: console.print(f"{time.strftime('%H:%M:%S')} {doing}", highlight=False)
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as live:
        task = live.add_task("")
        yield lambda doing: live.reset(task, description=doing)


def suggestions(
    results: Sequence[Mapping[str, Any]], estimates: Sequence[Estimate], console: Console
) -> None:
    """Prints the meshes that were tried, the best first."""
    estimate_of = {mesh_text(estimate.mesh): estimate for estimate in estimates}
    table = _table("mesh", "fits", "peak GiB", "quick estimate", "seconds without overlap", "quick estimate")
    for found in results:
        estimate = estimate_of[mesh_text(found["mesh"])]
        estimated = sum(found["seconds_estimated"].values())
        table.add_row(
            mesh_text(found["mesh"]), "yes" if found["fits"] else "no", f"{found['memory']['peak'] / GIB:.1f}",
            f"{estimate.bytes / GIB:.1f}", f"{estimated:,.2f}", f"{estimate.seconds:,.2f}",
        )  # fmt: skip
    console.print(table)
