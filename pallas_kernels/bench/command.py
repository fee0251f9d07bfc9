"""Times every operation at the named shapes of ``cases``, beside what the device can do.

    python -m pallas_kernels.bench [OPERATION ...] [--case TEXT] [--implementation NAME] [--tiny] [--json FILE]

In the same process it measures three ceilings: an 8192^3 matrix product in bfloat16 and in float8_e4m3fn,
and a copy in device memory, counting bytes read and written. The share of a measurement is the time that its
matrix products (for select_topk, the bytes of its scores) need at the ceilings, divided by the time it took.
Each line says how its time was measured: around one call or many queued ones by the wall clock or, on a GPU and below
0.2 ms, as the sum of the call's kernels. "gaps" is the time between its kernels, which that sum leaves out
(``pallas_kernels.bench.timing``).
Errors are relative to ``xla`` in float32 on the same data, for a sample of the queries. Without a GPU or TPU the
shapes are tiny and the times mean nothing.

Besides the operations it times the attention of one layer over a causal sequence, without the projections:

    dsa_attention      index_scores, select_topk, sparse_mla, QUERY_BLOCK queries at a time
    dsa_attention_mha  index_scores, select_topk the same way, then masked_mha over expanded keys
    dense_attention    cuDNN's causal attention over expanded keys; on GPUs only

The projections that are left out cost the same in each form: absorbing a query and its output (the first) takes as
many multiplications as expanding a key and value (the others).
"""

import argparse
import dataclasses
import datetime
import json
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from pallas_kernels.bench.errors import error
from pallas_kernels.bench.operations import call, make_inputs
from pallas_kernels.bench.timing import ceilings, timing
from pallas_kernels.cases import CASES, Case

CACHE_BYTES = 128 * 2**20  # inputs take turns among sets that together exceed the device's cache


def measure(case: Case, ceiling: dict[str, float], implementation: str | None) -> dict[str, Any]:
    """One row of the table; a case that the implementation refuses has the reason instead of a time."""
    first = make_inputs(case, 0)
    n_sets = max(1, min(4, -(-CACHE_BYTES // sum(x.nbytes for x in first.values()))))
    row: dict[str, Any] = dataclasses.asdict(case)
    try:
        result = jax.jit(lambda x: call(case, x, implementation))(first)
        row["error"] = error(case, first, result, implementation)
        del result
        timed = timing(
            lambda x: call(case, x, implementation),
            lambda seed: make_inputs(case, seed) if seed else first,
            n_sets,
        )
    except NotImplementedError as refusal:
        return {**row, "refused": str(refusal)}
    took = timed.seconds
    row |= {"milliseconds": took * 1e3, "us_per_query": took * 1e6 / (case.B * case.T)} | timed.as_json()
    flops = sum(amount for limit, amount in case.work.items() if limit != "copy")
    amount, row["unit"] = (flops, "TFLOP/s") if flops else (case.work["copy"], "TB/s")
    row["rate"] = amount / took / 1e12
    row["share"] = sum(amount / (1e12 * ceiling[limit]) for limit, amount in case.work.items()) / took
    return row


def speedups(rows: Sequence[dict[str, Any]]) -> list[str]:
    """How much faster one layer's sparse attention was than its other forms at the same length."""
    layers = {(row["operation"], row["S"]): row["milliseconds"] for row in rows if "milliseconds" in row}
    return [
        f"{S} keys: dsa_attention is {took / layers['dsa_attention', S]:.2f} times as fast as {operation}"
        for (operation, S), took in layers.items()
        if operation in ("dsa_attention_mha", "dense_attention") and ("dsa_attention", S) in layers
    ]


def without_an_error(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The cases whose result is wrong in a way that no relative error measures."""
    return [
        f"{row['operation']} {row['name']}"
        for row in rows
        if not all(math.isfinite(value) for value in row.get("error", {}).values())
    ]


HEADING = (
    f"{'operation':17} {'case':26} {'ms':>9} {'us/query':>9} {'measured by':12} {'gaps, us':>8} {'rate':>16} "
    f"{'share':>6}  error"
)


def line(row: dict[str, Any]) -> str:
    """A row of the table under HEADING."""
    head = f"{row['operation']:17} {row['name']:26}"
    if "refused" in row:
        return f"{head} {row['refused']}"
    errors = ", ".join(f"{name} {value:.2g}" for name, value in row["error"].items())
    rate = f"{row['rate']:.2f} {row['unit']}"
    gaps = "" if row["gaps_us"] is None else f"{row['gaps_us']:.1f}"
    times = f"{row['milliseconds']:9.3f} {row['us_per_query']:9.4f} {row['method']:12} {gaps:>8}"
    return f"{head} {times} {rate:>16} {row['share']:6.3f}  {errors}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: prints one line per case. Returns 0, or 1 if the error of a case is not finite."""
    operations = sorted({case.operation for case in CASES})
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.bench", description="Time the kernels.")
    parser.add_argument(
        "operations", nargs="*", metavar="OPERATION", help=f"any of {', '.join(operations)} (default: all)"
    )
    parser.add_argument("--implementation", help="the implementation to time (default: the best available)")
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases whose name contains this text")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, as always on a CPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to a file")
    options = parser.parse_args(arguments)
    if unknown := set(options.operations) - set(operations):
        parser.error(f"OPERATION must be one of {operations}, got {sorted(unknown)}")
    device = jax.devices()[0]
    tiny = options.tiny or device.platform == "cpu"
    ceiling, methods = ceilings(tiny)
    about = {
        "device": device.device_kind,
        "jax": jax.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "pallas_kernels.bench", *(arguments or sys.argv[1:])]),
        "ceilings": ceiling,
        "ceiling_methods": methods,
    }
    print("\n".join(f"{name}: {value}" for name, value in about.items() if not name.startswith("ceiling")))
    products = ", ".join(
        f"{name} {ceiling[name]:.0f} TFLOP/s ({methods[name]})" for name in ("bfloat16", "float8_e4m3fn")
    )
    print(f"ceilings: {products}, copy {ceiling['copy']:.2f} TB/s ({methods['copy']})\n")
    rows = []
    print(HEADING)
    for case in CASES:
        if (not options.operations or case.operation in options.operations) and options.case in case.name:
            rows.append(measure(case.tiny if tiny else case, ceiling, options.implementation))
            print(line(rows[-1]), flush=True)
            if options.json:  # after every case: an interrupted run keeps what it has
                options.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    print("\n".join(speedups(rows)))
    wrong = without_an_error(rows)
    print(
        "".join(f"{name}: the result is not finite, or finite where it must not be\n" for name in wrong),
        end="",
    )
    return 1 if wrong else 0
