"""How long a function takes on the device, and the ceilings that times are compared with."""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

SHORT = 200e-6  # seconds; shorter calls are timed by the profiler, which leaves out the launches
LONG = 0.05  # seconds; longer calls are timed one at a time
CALLS = 16  # of a short function, each with different inputs


def seconds(function: Callable[..., Any], make: Callable[[int], Any], n_sets: int = 1) -> float:
    """Median time of ``function(make(seed))`` over queued calls that take turns among ``n_sets`` inputs."""

    def run(function, inputs, calls) -> float:
        begin = time.perf_counter()
        result = None
        for i in range(calls):
            result = function(inputs[i % len(inputs)])
        jax.block_until_ready(result)
        return (time.perf_counter() - begin) / calls

    jitted = jax.jit(function)
    inputs = [make(seed) for seed in range(n_sets)]
    for x in inputs:  # compile, and touch every set
        jax.block_until_ready(jitted(x))
    if run(jitted, inputs, 1) > LONG:
        return statistics.median(run(jitted, inputs, 1) for _ in range(3))
    if run(jitted, inputs, 3) > SHORT:
        return statistics.median(run(jitted, inputs, 10) for _ in range(5))
    inputs += [make(seed) for seed in range(n_sets, CALLS)]
    run(jitted, inputs, CALLS)
    whole = seconds_of_kernels(lambda: CALLS * run(jitted, inputs, CALLS))
    return whole / CALLS


def seconds_of_kernels(function: Callable[[], float]) -> float:
    """Total time of the GPU's kernels and copies in ``function()``, by JAX's profiler.

    Without a GPU it is what the function returns, its own measurement.
    """
    if jax.default_backend() != "gpu":
        return function()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            function()
        (profile,) = Path(folder).rglob("*.xplane.pb")
        planes = [p for p in jax.profiler.ProfileData.from_file(str(profile)).planes if "GPU" in p.name]
    lines = [line for plane in planes for line in plane.lines if line.name.startswith("Stream")]
    return sum(event.duration_ns for line in lines for event in line.events) / 1e9


def product_rate(dtype: Any, n: int = 8192) -> float:
    """FLOP/s of an n x n x n matrix product of random numbers of this dtype, the ceiling that shares refer to."""

    def product(ab):
        return jax.lax.dot_general(*ab, (((1,), (1,)), ((), ())), preferred_element_type=jnp.bfloat16)

    def factors(seed):
        keys = jax.random.split(jax.random.key(seed))
        return tuple(jax.random.normal(key, (n, n)).astype(dtype) for key in keys)

    return 2 * n**3 / seconds(product, factors)


def ceilings(tiny: bool) -> dict[str, float]:
    """TFLOP/s of a square matrix product by dtype, and TB/s of a copy."""
    n = 128 if tiny else 8192
    dtypes = (jnp.bfloat16, jnp.float8_e4m3fn)
    result = {jnp.dtype(dtype).name: product_rate(dtype, n) / 1e12 for dtype in dtypes}
    size = n * n * (1 if tiny else 8)
    took = seconds(lambda x: -x, lambda seed: jax.random.normal(jax.random.key(seed), (size,)))
    result["copy"] = 8 * size / took / 1e12
    return result
