"""What a compiled step costs: memory, operations, collectives, and an estimate of its time."""

import contextlib
import math
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from dsa_jax.sharding import make_mesh, mesh_text
from train.aot import traffic
from train.aot.chips import Chip
from train.aot.compiling import Compiled, compile_step, dumped, plan_step
from train.aot.hlo import Program, parse
from train.aot.job import Job
from train.aot.options import Options


def examine(
    job: Job, options: Options, sizes: Mapping[str, int], doing: Callable[[str], Any]
) -> dict[str, Any]:
    """Compiles the step for this mesh and returns all that is known about it, as plain JSON values.

    doing: called with what is in progress. sizes: of the mesh axes.
    """
    mesh = make_mesh(devices=job.devices, **sizes)
    planning = options.plan or (options.suggest and not job.chip.is_gpu)
    began = time.perf_counter()
    doing(f"{'planning' if planning else 'compiling'} {mesh_text(sizes)}")
    with contextlib.ExitStack() as stack:
        if options.dump is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dsa-jax-aot-")))
        else:
            name = "-".join(f"{axis}{size}" for axis, size in sizes.items() if size > 1)
            folder = options.dump / name if options.suggest else options.dump
            if dumped(folder, ".txt"):
                raise ValueError(f"--dump {folder} holds an earlier dump; name another folder")
            folder.mkdir(parents=True, exist_ok=True)
        compiled = plan_step(job, options, sizes, folder) if planning else compile_step(job, mesh, folder)
    seconds = time.perf_counter() - began
    doing("reading the program")
    return {
        "mesh": dict(sizes),
        "compiled": not planning,
        "refused": compiled.refused,
        "fits": compiled.memory["peak"] <= compiled.capacity,
        "capacity": compiled.capacity,
        "memory": compiled.memory,
        "compile_seconds": seconds,
        "host_peak_bytes": host_peak(),
    } | costs(job, mesh, compiled)


def costs(job: Job, mesh: Mesh, compiled: Compiled) -> dict[str, Any]:
    """Operations, traffic and estimated seconds of the program, and what fills the memory."""
    hlo = parse(compiled.text)
    flops = job.flops()
    calls = traffic.custom_calls(hlo)
    grouped = job.routed_flops() / mesh.size if "tpu_custom_call" in calls else 0.0
    links = links_of(mesh, job.chip)
    needed = sum(flops.values()) / mesh.size
    found = estimated(hlo, grouped, needed, links, mesh, job.chip)
    longer = estimated(parse(compiled.text, every_branch=True), grouped, needed, links, mesh, job.chip)
    return found | {
        "flops": flops,
        "flops_per_device": needed,
        "links": links,
        "seconds_with_every_branch": longer["seconds_estimated"],
        "custom_calls": calls,
        "unknown_loops": list(hlo.unknown_loops),
        "alive_at_peak": [alive._asdict() for alive in traffic.alive_at_peak(hlo, compiled.live_range)[:64]],
    }


def estimated(
    hlo: Program, grouped: float, needed: float, links: Mapping[str, int], mesh: Mesh, chip: Chip
) -> dict[str, Any]:
    """What the program does, and how long that would take.

    grouped: operations inside custom calls. needed: operations that the mathematics needs. All per device.
    """
    exchanges = traffic.collectives(hlo, dict(mesh.shape))
    products, hbm_bytes = traffic.product_flops(hlo) + grouped, traffic.hbm_traffic(hlo)
    network: dict[str, float] = {}
    for exchange in exchanges:
        name = " x ".join(exchange.axes) or "none"
        network[name] = network.get(name, 0.0) + seconds_of(exchange, links, mesh, chip)
    return {
        "product_flops_per_device": products,
        "hbm_traffic": hbm_bytes,
        "collectives": [exchange._asdict() for exchange in exchanges],
        "network_seconds": network,
        "seconds_estimated": {
            "arithmetic": max(products, needed) / chip.bf16_flops,
            "memory": hbm_bytes / chip.hbm_bandwidth,
            "network": sum(network.values()),
        },
    }


def links_of(mesh: Mesh, chip: Chip) -> dict[str, int]:
    """Links per device that a ring along each mesh axis uses: two per dimension of the torus that the axis spans."""
    found = {}
    for number, axis in enumerate(mesh.axis_names):
        line = mesh.devices[tuple(slice(None) if i == number else 0 for i in range(mesh.devices.ndim))]
        dimensions = [] if chip.is_gpu else zip(*(device.coords for device in line), strict=True)
        spans = sum(len(set(coordinates)) > 1 for coordinates in dimensions)
        found[axis] = min(2 * max(spans, 1), chip.links)
    return found


def seconds_of(exchange: traffic.Exchange, links: Mapping[str, int], mesh: Mesh, chip: Chip) -> float:
    """Time on the network alone: bytes over the links of the axes. In an all-to-all, devices also forward bytes."""
    used = min(sum(links[axis] for axis in exchange.axes), chip.links) or 1
    n = math.prod(mesh.shape[axis] for axis in exchange.axes)
    hops = 1.0
    if "all-to-all" in exchange.kind and not chip.is_gpu:
        ring = n ** (
            2 / used
        )  # devices in one dimension of the torus; on average bytes travel a quarter of it
        hops = max(ring / 4, 1.0)
    return exchange.bytes * hops / (used * chip.link_bandwidth)


def host_peak() -> int:
    """Peak memory in bytes of this process, or of a child that it waited for."""
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(w).ru_maxrss for w in who) * (1 if sys.platform == "darwin" else 1024)
