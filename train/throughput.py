"""How fast a model runs, and in how much memory, by length of the row: dense beside sparse attention."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from dsa_jax.config import ModelConfig
from dsa_jax.transformer import Transformer
from train.flops import forward_flops


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pass:
    """What ``throughput`` times: ``make(config)`` gives a function of (params, batch) that jit can compile, and
    ``flops(config, length)`` its operations per token.
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
"""A prefill: the whole row, the logits of its last token."""


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
    """Speed and memory by length of the rows, dense beside sparse, on the default device.

    params default to random ones (time does not depend on them, but for the balance of the experts). passes
    default to {"forward": FORWARD}.

    Returns:
      One dict per length, pass and attention: pass, attention, implementation ("default" is the kernel of the
      backend where there is one, see ``pallas_kernels.dispatch``), length, batch, seconds (median of
      ``repeats`` after one call), tokens_per_s, flops_per_s (real operations, see ``train.flops``; not those of
      dense attention), argument_bytes and temporary_bytes (XLA's plan of the compiled program). Where memory did
      not suffice, out_of_memory is True in place of the numbers.
    """
    passes = passes or {"forward": FORWARD}
    if params is None:
        params = jax.jit(Transformer(config).init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    rows = []
    for length in lengths:
        tokens = np.random.default_rng(0).integers(config.vocab_size, size=(batch, length), dtype=np.int32)
        inputs = {
            "tokens": jnp.asarray(tokens),
            "targets": jnp.asarray(np.roll(tokens, -1, axis=1)),
            "segment_ids": jnp.ones((batch, length), jnp.int32),
        }
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

    seconds()
    return {
        "seconds": statistics.median(seconds() for _ in range(repeats)),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
    }
