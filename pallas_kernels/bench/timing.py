"""How long a function takes on the device, how that was measured, and the ceilings that times are compared with.

Each time comes from one of three methods, and says from which:

    one call       wall clock around one call, for calls of more than LONG seconds
    queued calls   wall clock around several calls that wait for each other on the device, per call
    kernel sum     the GPU's own clock (JAX's profiler): the sum of the kernels and copies of a call, for calls whose
                   sum is at most SHORT; the wall clock would show how fast the host launches them

Beside the time stands the span: from the start of the first kernel of many queued calls to the end of the last, per
call. Span minus kernel sum are the gaps between launches, which a kernel sum leaves out.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

SHORT = 200e-6  # seconds of kernels per call
LONG = 0.05  # seconds
CALLS = 16  # of a short function that are profiled together, each with different inputs

Method = Literal["one call", "queued calls", "kernel sum"]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Seconds per call on the GPU's clock: the sum of kernels and copies, and from the first to the last."""

    kernels: float
    span: float


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds per call, and the method that they come from; wall: by the wall clock; profile: None without a GPU."""

    seconds: float
    method: Method
    wall: float
    profile: Profile | None = None

    def as_json(self) -> dict[str, Any]:
        """The method, and in microseconds per call all that was measured; None where nothing was."""
        kernels = span = gaps = None
        if self.profile:
            kernels, span = self.profile.kernels * 1e6, self.profile.span * 1e6
            gaps = span - kernels
        return {
            "method": self.method,
            "wall_us": self.wall * 1e6,
            "kernels_us": kernels,
            "span_us": span,
            "gaps_us": gaps,
        }


def timing(function: Callable[..., Any], make: Callable[[int], Any], n_sets: int = 1) -> Timing:
    """Time of ``function(make(seed))``; calls take turns among ``n_sets`` inputs."""
    jitted = jax.jit(function)
    inputs = [make(seed) for seed in range(n_sets)]

    def queued(calls: int) -> float:
        begin = time.perf_counter()
        result = None
        for i in range(calls):
            result = jitted(inputs[i % len(inputs)])
        jax.block_until_ready(result)
        return (time.perf_counter() - begin) / calls

    def profiled() -> Profile | None:
        return profile_of(lambda: queued(CALLS), CALLS)

    def with_more_inputs() -> None:
        inputs.extend(make(seed) for seed in range(n_sets, CALLS))
        queued(CALLS)

    for x in inputs:  # compile, and touch every set
        jax.block_until_ready(jitted(x))
    return choose(queued, profiled, with_more_inputs)


def choose(
    queued: Callable[[int], float],
    profiled: Callable[[], Profile | None],
    with_more_inputs: Callable[[], None] = lambda: None,
) -> Timing:
    """The method for a function, and its time. Every decision rests on a median, never on one probe.

    queued: seconds per call by the wall clock, of so many calls; profiled: the profile of many calls, None without a
    GPU; with_more_inputs: called before a short function is profiled for its number.
    """
    wall = statistics.median(queued(1) for _ in range(3))
    if wall > LONG:
        return Timing(seconds=wall, method="one call", wall=wall)
    wall = statistics.median(queued(10) for _ in range(5))
    profile = _median_profile([profiled() for _ in range(3)])
    if profile is None or profile.kernels > SHORT:
        return Timing(seconds=wall, method="queued calls", wall=wall, profile=profile)
    with_more_inputs()
    profile = _median_profile([profiled() for _ in range(3)]) or profile
    return Timing(seconds=profile.kernels, method="kernel sum", wall=wall, profile=profile)


def _median_profile(profiles: Sequence[Profile | None]) -> Profile | None:
    """The profile with the median kernel sum; None if there is none."""
    found = sorted((p for p in profiles if p is not None), key=lambda p: p.kernels)
    return found[len(found) // 2] if found else None


def profile_of(function: Callable[[], Any], calls: int) -> Profile | None:
    """The profile per call of ``function()``, which makes so many calls; None without a GPU, and then nothing runs."""
    if jax.default_backend() != "gpu":
        return None
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            function()
        (written,) = Path(folder).rglob("*.xplane.pb")
        planes = [p for p in jax.profiler.ProfileData.from_file(str(written)).planes if "GPU" in p.name]
    lines = [line for plane in planes for line in plane.lines if line.name.startswith("Stream")]
    return profile_of_events(
        [(event.start_ns, event.duration_ns) for line in lines for event in line.events], calls
    )


def profile_of_events(events: Sequence[tuple[float, float]], calls: int) -> Profile | None:
    """From (start, duration) in nanoseconds of the kernels and copies of so many calls; None if there are none."""
    if not events:
        return None
    first, last = min(start for start, _ in events), max(start + duration for start, duration in events)
    kernels = sum(duration for _, duration in events)
    return Profile(kernels=kernels / 1e9 / calls, span=(last - first) / 1e9 / calls)


def product_timing(dtype: Any, n: int) -> Timing:
    """Of an n x n x n matrix product of random numbers of this dtype."""

    def product(ab):
        return jax.lax.dot_general(*ab, (((1,), (1,)), ((), ())), preferred_element_type=jnp.bfloat16)

    def factors(seed):
        keys = jax.random.split(jax.random.key(seed))
        return tuple(jax.random.normal(key, (n, n)).astype(dtype) for key in keys)

    return timing(product, factors)


def product_rate(dtype: Any, n: int = 8192) -> float:
    """FLOP/s of the product of ``product_timing``, the ceiling that shares refer to."""
    return 2 * n**3 / product_timing(dtype, n).seconds


def ceilings(tiny: bool) -> tuple[dict[str, float], dict[str, Method]]:
    """TFLOP/s of a square matrix product by dtype, and TB/s of a copy; and by which method each was timed."""
    n = 128 if tiny else 8192
    rates: dict[str, float] = {}
    methods: dict[str, Method] = {}
    for dtype in (jnp.bfloat16, jnp.float8_e4m3fn):
        name, took = jnp.dtype(dtype).name, product_timing(dtype, n)
        rates[name], methods[name] = 2 * n**3 / took.seconds / 1e12, took.method
    size = n * n * (1 if tiny else 8)
    took = timing(lambda x: -x, lambda seed: jax.random.normal(jax.random.key(seed), (size,)))
    rates["copy"], methods["copy"] = 8 * size / took.seconds / 1e12, took.method
    return rates, methods
