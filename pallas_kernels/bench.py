"""Times every operation at the named shapes of ``cases``, beside what the device can do.

    python -m pallas_kernels.bench [OPERATION ...] [--implementation NAME] [--tiny] [--json FILE]

In the same process it measures three ceilings: an 8192^3 matrix product in bfloat16 and in float8_e4m3fn,
and a copy in device memory counting bytes read and written. The share of a measurement is the time that its
matrix products (or, for select_topk, the bytes of its scores) need at the ceiling, over the time it took.
Errors are those of a sample of the queries against ``xla`` in float32 on the same data. Without a GPU or
TPU the shapes are tiny and the times mean nothing.
"""

import argparse
import dataclasses
import datetime
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as pk
from pallas_kernels.cases import CASES, Case

CACHE_BYTES = 128 * 2**20  # inputs rotate among sets that together exceed the device's cache
SHORT = 200e-6  # seconds below which several calls go into one launch, or the launches would be timed
CALLS = 16
SAMPLE = 16  # queries whose result is checked

Inputs = dict[str, jax.Array]


def seconds(function: Callable[..., Any], make: Callable[[int], Any], n_sets: int = 1) -> float:
    """Median time of ``function(make(seed))``, calls queued one behind the other over ``n_sets`` inputs."""

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
    if run(jitted, inputs, 3) > SHORT:
        return statistics.median(run(jitted, inputs, 10) for _ in range(5))
    together = [make(seed) for seed in range(CALLS)]  # different inputs, or XLA would merge the calls
    several = jax.jit(lambda sets: [function(x) for x in sets])
    jax.block_until_ready(several(together))
    return statistics.median(run(several, [together], 5) for _ in range(5)) / CALLS


def ceilings(tiny: bool) -> dict[str, float]:
    """TFLOP/s of a square matrix product by dtype, and TB/s of a copy."""
    n = 128 if tiny else 8192
    result = {}
    for dtype in (jnp.bfloat16, jnp.float8_e4m3fn):

        def product(ab):
            return jax.lax.dot_general(*ab, (((1,), (1,)), ((), ())), preferred_element_type=jnp.bfloat16)

        def factors(seed, dtype=dtype):
            keys = jax.random.split(jax.random.key(seed))
            return tuple(jax.random.normal(key, (n, n)).astype(dtype) for key in keys)

        result[jnp.dtype(dtype).name] = 2 * n**3 / seconds(product, factors) / 1e12
    size = n * n * (1 if tiny else 8)
    took = seconds(lambda x: -x, lambda seed: jax.random.normal(jax.random.key(seed), (size,)))
    result["copy"] = 8 * size / took / 1e12
    return result


def make_inputs(case: Case, seed: int) -> Inputs:
    """Random inputs of one call, on the device."""
    keys = iter(jax.random.split(jax.random.key(seed), 8))
    normal = lambda *shape, dtype=jnp.float32: jax.random.normal(next(keys), shape).astype(dtype)  # noqa: E731
    B, T, S, dtype = case.B, case.T, case.S, jnp.dtype(case.dtype)
    stop = jnp.full((B, T), S, jnp.int32)
    if case.mask == "causal":
        stop = jnp.broadcast_to((jnp.arange(1, T + 1) * S // T).astype(jnp.int32), (B, T))
    bounds = {"key_start": jnp.zeros((B, T), jnp.int32), "key_stop": stop}
    if case.operation == "index_scores":
        inputs = {
            "q": normal(B, T, case.I, case.J, dtype=dtype),
            "k": normal(B, S, case.J, dtype=dtype),
            "weights": normal(B, T, case.I),
            **bounds,
        }
        if dtype == jnp.float8_e4m3fn:
            inputs["k_scale"] = jnp.exp2(jax.random.randint(next(keys), (B, S), -6, 3).astype(jnp.float32))
        return inputs
    if case.operation == "select_topk":
        return {"scores": normal(B, T, S), **bounds}
    indices = jax.random.randint(next(keys), (B, T, case.K), 0, S // case.K or 1)
    indices = indices + jnp.arange(case.K) * max(S // case.K, 1)  # one key out of every S / K: no key twice
    return {
        "q_latent": normal(B, T, case.N, case.C, dtype=dtype),
        "q_rope": normal(B, T, case.N, case.R, dtype=dtype),
        "latent": normal(B, S, case.C, dtype=dtype),
        "k_rope": normal(B, S, case.R, dtype=dtype),
        "topk_indices": jnp.where(indices < S, indices, -1).astype(jnp.int32),
    }


def call(case: Case, inputs: Inputs, implementation: str | None) -> Any:
    if case.operation == "index_scores":
        return pk.index_scores(**inputs, implementation=implementation)
    if case.operation == "select_topk":
        scores, bounds = inputs["scores"], {name: inputs[name] for name in ("key_start", "key_stop")}
        return pk.select_topk(scores, case.K, **bounds, implementation=implementation)
    return pk.sparse_mla(**inputs, scale=(case.C + case.R) ** -0.5, implementation=implementation)


def error(case: Case, inputs: Inputs, result: Any) -> dict[str, float | int]:
    """What differs from xla in float32, for a sample of the queries."""
    sample = np.unique(np.linspace(0, case.T - 1, SAMPLE).astype(int))
    per_query = {"q", "weights", "key_start", "key_stop", "scores", "q_latent", "q_rope", "topk_indices"}
    reference_inputs = {
        name: (x[:, sample] if name in per_query else x).astype(jnp.float32 if _is_float(x) else x.dtype)
        for name, x in inputs.items()
    }
    reference = call(case, reference_inputs, "xla")
    result, reference = jax.tree.map(np.asarray, (jax.tree.map(lambda x: x[:, sample], result), reference))
    if case.operation == "select_topk":
        return {"rows that differ": int((result != reference).any(axis=-1).sum())}
    if case.operation == "index_scores":
        visible = np.isfinite(reference)
        if not (np.isneginf(result) == ~visible).all():
            return {"relative": float("nan")}
        return {"relative": _relative(result[visible], reference[visible])}
    return {"out": _relative(result[0], reference[0]), "lse": _relative(result[1], reference[1])}


def _is_float(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _relative(x: np.ndarray, reference: np.ndarray) -> float:
    x, reference = x.astype(np.float64), reference.astype(np.float64)
    return float(np.linalg.norm(x - reference) / np.linalg.norm(reference))


def measure(case: Case, ceiling: dict[str, float], implementation: str | None) -> dict[str, Any]:
    """One row of the table. A case that its implementation refuses has the reason instead of a time."""
    first = make_inputs(case, 0)
    n_sets = max(1, min(4, -(-CACHE_BYTES // sum(x.nbytes for x in first.values()))))
    row: dict[str, Any] = dataclasses.asdict(case)
    try:
        row["error"] = error(case, first, jax.jit(lambda x: call(case, x, implementation))(first))
        took = seconds(lambda x: call(case, x, implementation), lambda seed: make_inputs(case, seed), n_sets)
    except NotImplementedError as refusal:
        return {**row, "refused": str(refusal)}
    row |= {"milliseconds": took * 1e3, "us_per_query": took * 1e6 / (case.B * case.T)}
    if case.flops:
        row |= {"rate": case.flops / took / 1e12, "unit": "TFLOP/s"}
        row["share"] = row["rate"] / ceiling[case.dtype]
    else:
        row |= {"rate": 4 * case.B * case.T * case.visible_keys / took / 1e12, "unit": "TB/s"}
        row["share"] = row["rate"] / ceiling["copy"]
    return row


def show(rows: Sequence[dict[str, Any]]) -> None:
    print(f"{'operation':13} {'case':26} {'ms':>9} {'us/query':>9} {'rate':>16} {'share':>6}  error")
    for row in rows:
        head = f"{row['operation']:13} {row['name']:26}"
        if "refused" in row:
            print(head, row["refused"])
            continue
        errors = ", ".join(f"{name} {value:.2g}" for name, value in row["error"].items())
        rate = f"{row['rate']:.2f} {row['unit']}"
        times = f"{row['milliseconds']:9.3f} {row['us_per_query']:9.4f}"
        print(f"{head} {times} {rate:>16} {row['share']:6.3f}  {errors}")


def main(arguments: Sequence[str] | None = None) -> int:
    operations = sorted({case.operation for case in CASES})
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.bench", description="Time the kernels.")
    parser.add_argument(
        "operations", nargs="*", metavar="OPERATION", help=f"of {', '.join(operations)}; all if none"
    )
    parser.add_argument(
        "--implementation", help="the implementation to time; the best of the backend if none"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny shapes; always on CPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to a file")
    options = parser.parse_args(arguments)
    if unknown := set(options.operations) - set(operations):
        parser.error(f"OPERATION must be of {operations}, got {sorted(unknown)}")
    device = jax.devices()[0]
    tiny = options.tiny or device.platform == "cpu"
    ceiling = ceilings(tiny)
    about = {
        "device": device.device_kind,
        "jax": jax.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "pallas_kernels.bench", *(arguments or sys.argv[1:])]),
        "ceilings": ceiling,
    }
    print("\n".join(f"{name}: {value}" for name, value in about.items() if name != "ceilings"))
    products = ", ".join(f"{name} {ceiling[name]:.0f} TFLOP/s" for name in ("bfloat16", "float8_e4m3fn"))
    print(f"ceilings: {products}, copy {ceiling['copy']:.2f} TB/s\n")
    rows = []
    for case in CASES:
        if not options.operations or case.operation in options.operations:
            rows.append(measure(case.tiny if tiny else case, ceiling, options.implementation))
    show(rows)
    if options.json:
        options.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
