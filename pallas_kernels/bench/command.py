"""Times every operation at the named shapes of ``cases``, beside what the device can do.

    python -m pallas_kernels.bench [OPERATION ...] [--case TEXT] [--implementation NAME] [--tiny] [--json FILE]

In the same process it measures three ceilings: an 8192^3 matrix product in bfloat16 and in float8_e4m3fn,
and a copy in device memory counting bytes read and written. The share of a measurement is the time that its
matrix products (and, for select_topk, the bytes of its scores) need at the ceilings, over the time it took.
On a GPU calls of less than 0.2 ms are timed by the profiler: the sum of their kernels, without the gaps between.
Errors are those of a sample of the queries against ``xla`` in float32 on the same data. Without a GPU or
TPU the shapes are tiny and the times mean nothing.

Beside the operations it times one layer's whole attention over a causal sequence, without the projections:

    dsa_attention      index_scores, select_topk, sparse_mla, QUERY_BLOCK queries at a time
    dsa_attention_mha  index_scores, select_topk the same way, then masked_mha over expanded keys
    dense_attention    cuDNN's causal attention over expanded keys; on GPUs only

What the forms leave out costs the same in each: absorbing a query and its output (the first) takes as many
multiplications as expanding a key and value (the others).
"""

import argparse
import dataclasses
import datetime
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as pk
from pallas_kernels.blocking import map_query_blocks
from pallas_kernels.cases import CASES, Case

CACHE_BYTES = 128 * 2**20  # inputs rotate among sets that together exceed the device's cache
SHORT = 200e-6  # seconds below which the kernels are timed by the profiler, or the launches would be timed
CALLS = 16  # of different inputs
LONG = 0.05  # seconds above which a call is timed alone
SAMPLE = 16  # queries whose result is checked
QUERY_BLOCK = 2048  # queries of dsa_attention whose scores exist at a time
DISTINCT = 4096  # queries of dsa_attention that differ; longer sequences repeat their attention queries

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
    if run(jitted, inputs, 1) > LONG:
        return statistics.median(run(jitted, inputs, 1) for _ in range(3))
    if run(jitted, inputs, 3) > SHORT:
        return statistics.median(run(jitted, inputs, 10) for _ in range(5))
    inputs += [make(seed) for seed in range(n_sets, CALLS)]
    run(jitted, inputs, CALLS)
    whole = seconds_of_kernels(lambda: CALLS * run(jitted, inputs, CALLS))
    return whole / CALLS


def seconds_of_kernels(function: Callable[[], float]) -> float:
    """What a GPU's kernels and copies in ``function()`` take together, by JAX's profiler; else what it returns."""
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
    """FLOP/s of an n^3 matrix product of random numbers of this dtype: the ceiling that shares refer to."""

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


def make_inputs(case: Case, seed: int) -> Inputs:
    """Random inputs of one call, on the device."""
    return jax.jit(_random, static_argnums=0)(case, jax.random.split(jax.random.key(seed), 16))


def _random(case: Case, random_keys: jax.Array) -> Inputs:
    keys = iter(random_keys)
    normal = lambda *shape, dtype=jnp.bfloat16: jax.random.normal(next(keys), shape).astype(dtype)  # noqa: E731
    B, T, S, N, dtype = case.B, case.T, case.S, case.N, jnp.dtype(case.dtype)
    stop = jnp.full((B, T), S, jnp.int32)
    if case.mask == "causal":
        stop = jnp.broadcast_to((jnp.arange(1, T + 1) * (S // T)).astype(jnp.int32), (B, T))
    inputs = {"key_start": jnp.zeros((B, T), jnp.int32), "key_stop": stop}
    if case.operation in ("index_scores", "dsa_attention", "dsa_attention_mha"):
        inputs |= {
            "q": normal(B, T, case.I, case.J, dtype=dtype),
            "k": normal(B, S, case.J, dtype=dtype),
            "weights": normal(B, T, case.I, dtype=jnp.float32),
        }
        if dtype == jnp.float8_e4m3fn:
            inputs["k_scale"] = jnp.exp2(jax.random.randint(next(keys), (B, S), -6, 3).astype(jnp.float32))
    if case.operation in ("dsa_attention_mha", "dense_attention"):
        inputs |= {
            "q_nope": normal(B, T, N, case.P),
            "q_rope": normal(B, T, N, case.R),
            "k_nope": normal(B, S, N, case.P),
            "k_rope": normal(B, S, case.R),
            "v": normal(B, S, N, case.H),
        }
    if case.operation == "dense_attention":
        repeated = jnp.broadcast_to(inputs.pop("k_rope")[:, :, None], (B, S, N, case.R))
        inputs["q"] = jnp.concatenate([inputs.pop("q_nope"), inputs.pop("q_rope")], axis=-1)
        inputs["k"] = jnp.concatenate([inputs.pop("k_nope"), repeated], axis=-1)
        inputs = {name: inputs[name] for name in ("q", "k", "v")}
    if case.operation == "select_topk":
        inputs["scores"] = normal(B, T, S, dtype=jnp.float32)
    if case.operation in ("sparse_mla", "dsa_attention"):
        distinct = min(T, DISTINCT)
        inputs |= {
            "q_latent": jnp.tile(normal(B, distinct, N, case.C), (1, T // distinct, 1, 1)),
            "q_rope": jnp.tile(normal(B, distinct, N, case.R), (1, T // distinct, 1, 1)),
            "latent": normal(B, S, case.C),
            "k_rope": normal(B, S, case.R),
        }
    if case.operation == "sparse_mla":
        del inputs["key_start"], inputs["key_stop"]
        indices = jax.random.randint(next(keys), (B, T, case.K), 0, S // case.K or 1)
        indices = indices + jnp.arange(case.K) * max(S // case.K, 1)  # one out of every S / K: no key twice
        inputs["topk_indices"] = jnp.where(indices < S, indices, -1).astype(jnp.int32)
        if dtype == jnp.float8_e4m3fn:
            blocks = inputs["latent"].astype(jnp.float32).reshape(B, S, -1, 128)
            scales = jnp.abs(blocks).max(axis=-1) / 448.0
            inputs["latent"] = (blocks / scales[..., None]).astype(dtype).reshape(B, S, case.C)
            inputs["latent_scale"] = scales
    return inputs


def call(case: Case, inputs: Inputs, implementation: str | None) -> Any:
    if case.operation == "index_scores":
        return pk.index_scores(**inputs, implementation=implementation)
    if case.operation == "select_topk":
        scores, bounds = inputs["scores"], {name: inputs[name] for name in ("key_start", "key_stop")}
        return pk.select_topk(scores, case.K, **bounds, implementation=implementation)
    if case.operation == "dense_attention":
        return dense_attention(inputs["q"], inputs["k"], inputs["v"])
    if case.operation == "dsa_attention":
        return dsa_attention(case, inputs, implementation)
    if case.operation == "dsa_attention_mha":
        select = lambda *queries: select_keys(case, inputs, queries, implementation)  # noqa: E731
        indices = map_query_blocks(select, QUERY_BLOCK, *(inputs[name] for name in INDEXED))
        expanded = {name: x for name, x in inputs.items() if name not in ("q", "k", "k_scale", "weights")}
        scale = (case.P + case.R) ** -0.5
        return pk.masked_mha(**expanded, topk_indices=indices, scale=scale, implementation=implementation)
    return pk.sparse_mla(**inputs, scale=(case.C + case.R) ** -0.5, implementation=implementation)


INDEXED = ("q", "weights", "key_start", "key_stop")  # what select_keys takes of each query
ATTENDED = ("q_latent", "q_rope")  # and sparse_mla


def select_keys(
    case: Case, inputs: Inputs, queries: Sequence[jax.Array], implementation: str | None
) -> jax.Array:
    """topk_indices [B T K] of the queries (q, weights, key_start, key_stop)."""
    q, weights, key_start, key_stop = queries
    scores = pk.index_scores(
        q, inputs["k"], weights, key_start, key_stop,
        k_scale=inputs.get("k_scale"), implementation=implementation,
    )  # fmt: skip
    return pk.select_topk(
        scores, case.K, key_start=key_start, key_stop=key_stop, implementation=implementation
    )


def dsa_attention(case: Case, inputs: Inputs, implementation: str | None) -> tuple[jax.Array, jax.Array]:
    """(out [B T N C], lse [B T N]) of one layer's sparse attention."""

    def attend(q_latent, q_rope, *queries):
        indices = select_keys(case, inputs, queries, implementation)
        return pk.sparse_mla(
            q_latent, q_rope, inputs["latent"], inputs["k_rope"], indices,
            scale=(case.C + case.R) ** -0.5, implementation=implementation,
        )  # fmt: skip

    return map_query_blocks(attend, QUERY_BLOCK, *(inputs[name] for name in ATTENDED + INDEXED))


def dense_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal attention [B T N H] by cuDNN; q and k [B T N P+R], v [B T N H].

    Through JAX's internal function: the public one refuses values that are narrower than the keys, and padding
    them would have cuDNN do a fifth more.
    """
    if jax.default_backend() != "gpu":
        raise NotImplementedError("cuDNN runs on GPUs")
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    return dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask_type=MaskType.CAUSAL)


def error(case: Case, inputs: Inputs, result: Any, implementation: str | None) -> dict[str, float | int]:
    """What differs from xla in float32, for a sample of the queries."""
    if case.operation in ("dsa_attention_mha", "dense_attention"):
        return {}
    sample = np.unique(np.linspace(0, case.T - 1, SAMPLE).astype(int))
    per_query = {*INDEXED, *ATTENDED, "scores", "topk_indices"}
    sampled = {name: x[:, sample] if name in per_query else x for name, x in inputs.items()}
    if "latent_scale" in sampled:  # the operation's own rounding is no error
        scale = jnp.repeat(sampled.pop("latent_scale"), 128, axis=-1)
        sampled["latent"] = (sampled["latent"].astype(jnp.float32) * scale).astype(sampled["q_latent"].dtype)
    in_float32 = {name: x.astype(jnp.float32) if _is_float(x) else x for name, x in sampled.items()}
    if case.operation == "dsa_attention":
        return _error_of_layer(case, sampled, in_float32, [x[:, sample] for x in result], implementation)
    reference = call(case, in_float32, "xla")
    result, reference = jax.tree.map(np.asarray, (jax.tree.map(lambda x: x[:, sample], result), reference))
    if case.operation == "select_topk":
        return {"rows that differ": int((result != reference).any(axis=-1).sum())}
    if case.operation == "index_scores":
        visible = np.isfinite(reference)
        if not (np.isneginf(result) == ~visible).all():
            return {"relative": float("nan")}
        return {"relative": _relative(result[visible], reference[visible])}
    return {"out": _relative(result[0], reference[0]), "lse": _relative(result[1], reference[1])}


def _error_of_layer(case, sampled, in_float32, result, implementation) -> dict[str, float | int]:
    """The attention's error over the keys that were selected, and the share of keys that float32 would not select."""
    indices, expected = (
        select_keys(case, inputs, [inputs[name] for name in INDEXED], name_)
        for inputs, name_ in ((sampled, implementation), (in_float32, "xla"))
    )
    attended = {name: in_float32[name] for name in (*ATTENDED, "latent", "k_rope")}
    scale = (case.C + case.R) ** -0.5
    reference = pk.sparse_mla(**attended, topk_indices=indices, scale=scale, implementation="xla")
    errors = {
        name: _relative(np.asarray(x), np.asarray(y))
        for name, x, y in zip(("out", "lse"), result, reference, strict=True)
    }
    rows = zip(np.asarray(indices).reshape(-1, case.K), np.asarray(expected).reshape(-1, case.K), strict=True)
    differ = [np.setdiff1d(row, other).size / (row >= 0).sum() for row, other in rows]
    return errors | {"keys that differ": float(np.mean(differ))}


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
        result = jax.jit(lambda x: call(case, x, implementation))(first)
        row["error"] = error(case, first, result, implementation)
        del result
        took = seconds(
            lambda x: call(case, x, implementation),
            lambda seed: make_inputs(case, seed) if seed else first,
            n_sets,
        )
    except NotImplementedError as refusal:
        return {**row, "refused": str(refusal)}
    row |= {"milliseconds": took * 1e3, "us_per_query": took * 1e6 / (case.B * case.T)}
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


HEADING = f"{'operation':17} {'case':26} {'ms':>9} {'us/query':>9} {'rate':>16} {'share':>6}  error"


def line(row: dict[str, Any]) -> str:
    """A row of the table under HEADING."""
    head = f"{row['operation']:17} {row['name']:26}"
    if "refused" in row:
        return f"{head} {row['refused']}"
    errors = ", ".join(f"{name} {value:.2g}" for name, value in row["error"].items())
    rate = f"{row['rate']:.2f} {row['unit']}"
    times = f"{row['milliseconds']:9.3f} {row['us_per_query']:9.4f}"
    return f"{head} {times} {rate:>16} {row['share']:6.3f}  {errors}"


def main(arguments: Sequence[str] | None = None) -> int:
    operations = sorted({case.operation for case in CASES})
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.bench", description="Time the kernels.")
    parser.add_argument(
        "operations", nargs="*", metavar="OPERATION", help=f"of {', '.join(operations)}; all if none"
    )
    parser.add_argument(
        "--implementation", help="the implementation to time; the best of the backend if none"
    )
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases whose name has this text")
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
    print(HEADING)
    for case in CASES:
        if (not options.operations or case.operation in options.operations) and options.case in case.name:
            rows.append(measure(case.tiny if tiny else case, ceiling, options.implementation))
            print(line(rows[-1]), flush=True)
            if options.json:  # after every case: an interrupted run keeps what it has
                options.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    print("\n".join(speedups(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
