"""What the demonstration measures: sparse beside dense attention, the cache against one pass, and speed."""

import statistics
import time

import jax
import numpy as np
from rich.table import Table

from dsa_jax.demo.model import ATTENTIONS, Model
from dsa_jax.parity.numbers import log_softmax, max_difference

ROW = 2048
"""Tokens of the file that are read."""
LENGTHS = (512, 1024, ROW, 4096)
EXACT = 5e-5
"""float32 rounding, several layers deep."""


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> float:
    """Mean nats per target; logits [T V], targets [T]."""
    return float(-log_softmax(logits)[np.arange(len(targets)), targets].mean())


def agreement(model: Model, tokens: np.ndarray) -> tuple[Table, list[tuple[str, bool]], np.ndarray]:
    """Dense beside sparse attention on one file: a table, the checks (name, passed), the selected keys [L T K].

    tokens: [T], at most ROW. The rest of the row is padding, which causal attention hides from them.
    """
    K, last = model.config.index_topk, len(tokens) - 1
    row = np.zeros(ROW, np.int32)
    row[: len(tokens)] = tokens
    dense, _ = model.run("dense", row)
    sparse, selected = model.run("sparse", row)
    assert selected is not None
    parts = {f"the first {K} tokens": slice(0, K), f"the {last - K:,} after them": slice(K, last)}
    difference = [max_difference(sparse[part], dense[part]) for part in parts.values()]
    lines = {
        "keys read per token": ["all it may see", f"{K} of up to {last:,}"],
        "largest difference of a logit": [f"{value:.1e}" for value in difference],
        "same most likely next token": [
            f"{(sparse[part].argmax(-1) == dense[part].argmax(-1)).mean():.1%}" for part in parts.values()
        ],
    }
    for name, logits in (("dense", dense), ("sparse", sparse)):
        lines[f"cross entropy, {name}, nats"] = [
            f"{cross_entropy(logits[part], tokens[1:][part]):.4f}" for part in parts.values()
        ]
    table = Table("float32", *parts, title="sparse against dense attention")
    for name, cells in lines.items():
        table.add_row(name, *cells)
    checks = [
        (f"with at most {K} keys to see, sparse equals dense within {EXACT:.0e}", difference[0] <= EXACT),
        ("with more, keys are left out: sparse differs", difference[1] > 100 * EXACT),
    ]
    return table, checks, selected[:, : len(tokens)]


def reading(model: Model, prompt: tuple[int, ...], new: list[int]) -> tuple[bool, np.ndarray]:
    """Whether one pass without a cache predicts ``new``, and in how many layers the prompt's last token reads each."""
    row = np.zeros(ROW, np.int32)
    row[: len(prompt) + len(new)] = [*prompt, *new]
    logits, selected = model.run("sparse", row)
    assert selected is not None
    predicted = logits[len(prompt) - 1 :][: len(new)].argmax(axis=-1)
    read = selected[:, len(prompt) - 1]
    counts = np.bincount(read[read >= 0], minlength=len(prompt))
    return bool((predicted == new).all()), counts


def speed(model: Model, tokens: np.ndarray, lengths: tuple[int, ...] = LENGTHS) -> Table:
    """Tokens per second of one pass over a row, logits included: the median of up to five runs."""
    device = jax.devices()[0]
    where = "this CPU" if device.platform == "cpu" else device.device_kind
    table = Table(title=f"speed on {where}")
    for name in ("tokens", "dense, tokens/s", "sparse, tokens/s", "keys read per token", "of"):
        table.add_column(name, justify="right")
    for length in lengths:
        row = np.resize(tokens, length).astype(np.int32)
        rates = []
        for attention in ATTENTIONS:
            program = model.program(attention, length)
            seconds: list[float] = []
            while len(seconds) < 5 and sum(seconds) < 2.0:
                before = time.perf_counter()
                jax.block_until_ready(program(model.params, row))
                seconds.append(time.perf_counter() - before)
            rates.append(f"{length / statistics.median(seconds):,.0f}")
        visible = np.arange(1, length + 1)
        read = np.minimum(visible, model.config.index_topk)
        table.add_row(f"{length:,}", *rates, f"{read.mean():,.0f}", f"{visible.mean():,.0f}")
    return table
