"""Speed and memory of a model by row length, with dense and with sparse attention.

    python -m train.measure.throughput [--lengths 4096 16384 32768] [--tokens 32768] [--json FILE]

times whole training steps of ``medium`` on the default device, with random weights and tokens.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from dsa_jax.commands.errors import run_command
from dsa_jax.commands.outputs import outputs_locked, write_json
from dsa_jax.config import ModelConfig
from dsa_jax.transformer import Transformer
from train.config import dense, sparse
from train.measure.flops import forward_flops, training_flops
from train.step import begin_stage, train_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pass:
    """What ``throughput`` times.

    make: config -> a function of (params, batch) that ``jax.jit`` can compile. flops: (config, length) -> operations
    of that function per token.
    """

    make: Callable[[ModelConfig], Callable[[Any, Any], Any]]
    flops: Callable[[ModelConfig, int], float]


def _last_logits(config: ModelConfig) -> Callable[[Any, Any], Any]:
    def run(params, batch):
        last = jnp.full(batch["tokens"].shape[:1], batch["tokens"].shape[1] - 1)
        return Transformer(config).apply(params, batch["tokens"], logits_at=last)[0]

    return run


FORWARD = Pass(
    make=_last_logits,
    flops=lambda config, length: sum(
        value / length if part == "head" else value for part, value in forward_flops(config, length).items()
    ),
)
"""A prefill: the whole row, with logits for its last token only."""


def _step(config: ModelConfig) -> Callable[[Any, Any], Any]:
    """One training step from zero moments; its memory includes the optimizer state."""
    stage = dense(1, lr=1e-4) if config.attention == "dense" else sparse(1, lr=1e-4, index_lr=1e-4)

    def run(params, batch):
        state, metrics = train_step(begin_stage(jnp.int32(0), params, stage), batch, config, stage)
        return state, metrics["loss"]

    return run


STEP = Pass(
    make=_step,
    flops=lambda config, length: sum(
        training_flops(config, length, "model" if config.attention == "dense" else "both").values()
    ),
)
"""A training step with losses, gradients and AdamW: dense, or sparse with the index loss on the selected keys."""


def medium() -> ModelConfig:
    """A model of 0.57 B parameters whose attention has V3.2's dimensions per head and 64 heads."""
    return ModelConfig(
        vocab_size=32768, d_model=1024, n_layers=6, n_dense_layers=1, n_heads=64, d_ff=4096, d_expert=512,
        q_lora_rank=512, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
        index_n_heads=16, index_head_dim=128, index_topk=2048, n_routed_experts=32, n_shared_experts=1,
        n_activated_experts=4, n_expert_groups=4, n_limited_groups=2, route_scale=2.5, max_seq_len=131072,
        n_mtp_layers=1, mtp_shared_embeddings=True, remat="layer",
    )  # fmt: skip


def random_batch(config: ModelConfig, batch: int, length: int) -> dict[str, np.ndarray]:
    """Rows [B T] of random tokens, one document per row; the same on every call."""
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=(batch, length), dtype=np.int32)
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "segment_ids": np.ones_like(tokens),
    }


def throughput(
    config: ModelConfig,
    lengths: Sequence[int],
    passes: Mapping[str, Pass] | None = None,
    *,
    params: Mapping[str, Any] | None = None,
    attentions: Sequence[Literal["dense", "sparse", "window"]] = ("dense", "sparse"),
    batch: int = 1,
    repeats: int = 5,
) -> list[dict[str, Any]]:
    """Speed and memory by row length, with dense and with sparse attention, on the default device.

    params default to random ones; time does not depend on them except through the balance of the experts. passes
    default to {"forward": FORWARD}.

    Returns:
      One dict per length, pass and attention: pass, attention, implementation ("default" is the backend's kernel if
      there is one, see ``pallas_kernels.dispatch``), length, batch, seconds (median of ``repeats`` calls after a first
      one), tokens_per_s, flops_per_s (operations of ``train.measure.flops`` for this attention), argument_bytes and
      temporary_bytes (XLA's plan of the compiled program). If memory does not suffice, out_of_memory is True and the
      numbers are missing.

    Raises:
      FloatingPointError: a pass returns a number that is not finite, so that its speed would say nothing.
    """
    passes = passes or {"forward": FORWARD}
    if params is None:
        params = jax.jit(Transformer(config).init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    rows = []
    for length in lengths:
        inputs = {name: jnp.asarray(x) for name, x in random_batch(config, batch, length).items()}
        for name, timed in passes.items():
            for attention in attentions:
                switched = dataclasses.replace(config, attention=attention)
                row: dict[str, Any] = {
                    "pass": name,
                    "attention": attention,
                    "implementation": config.implementation or "default",
                    "length": length,
                    "batch": batch,
                }
                try:
                    row |= _measure(timed.make(switched), params, inputs, repeats)
                except jax.errors.JaxRuntimeError as error:
                    if "RESOURCE_EXHAUSTED" not in str(error):
                        raise
                    rows.append(row | {"out_of_memory": True})
                    continue
                row["tokens_per_s"] = batch * length / row["seconds"]
                row["flops_per_s"] = row["tokens_per_s"] * timed.flops(switched, length)
                rows.append(row)
    return rows


def _measure(function: Callable[..., Any], params: Any, inputs: Any, repeats: int) -> dict[str, Any]:
    compiled = jax.jit(function).lower(params, inputs).compile()
    memory = compiled.memory_analysis()

    def seconds() -> float:
        begin = time.perf_counter()
        jax.block_until_ready(compiled(params, inputs))
        return time.perf_counter() - begin

    if not all(jnp.isfinite(x).all() for x in jax.tree.leaves(compiled(params, inputs)) if _is_float(x)):
        raise FloatingPointError(
            "the pass to be timed gives numbers that are not finite: check the parameters"
        )
    return {
        "seconds": statistics.median(seconds() for _ in range(repeats)),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
    }


def _is_float(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m train.measure.throughput", description=medium.__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384, 32768], help="tokens per row")
    parser.add_argument(
        "--tokens", type=int, default=32768, help="tokens per step, in as many rows as it takes"
    )
    parser.add_argument("--attentions", nargs="+", choices=["dense", "sparse"], default=["dense", "sparse"])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to a file")
    options = parser.parse_args(arguments)

    def measure() -> int:
        with outputs_locked(options.json):
            return _run(options)

    return run_command("python -m train.measure.throughput", measure)


def _run(options: argparse.Namespace) -> int:
    """Prints a line per length and attention, and writes them as they come."""
    config = medium()
    about = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "parameters": config.param_count(),
    }
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    rows = []
    for length in options.lengths:
        batch = max(options.tokens // length, 1)
        rows += throughput(
            config, [length], {"step": STEP}, attentions=options.attentions, batch=batch, repeats=3
        )
        for row in rows[-len(options.attentions) :]:
            name = f"{row['attention']:6} {row['batch']:3} rows of {length:6}"
            if "out_of_memory" in row:
                print(f"{name}  out of memory", flush=True)
                continue
            gib = (row["argument_bytes"] + row["temporary_bytes"]) / 2**30
            rates = f"{row['tokens_per_s']:9.0f} tokens/s {row['flops_per_s'] / 1e12:6.1f} TFLOP/s"
            print(f"{name} {row['seconds']:7.3f} s {rates} {gib:6.1f} GiB", flush=True)
        if options.json:
            write_json(options.json, {**about, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
