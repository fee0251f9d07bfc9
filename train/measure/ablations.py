"""Ablations of the recipe: six continuations of one dense model, on the same data in the same order.

    A  dense continued                     the reference
    B  warm-up, then sparse with L_I       the recipe of DeepSeek-V3.2-Exp
    C  warm-up, then sparse, indexer frozen
    D  as B, but the warm-up uses the indexer's own selection: as many indexer steps, no dense target
    E  sparse with an untrained, frozen indexer
    F  the most recent index_topk keys

    python -m train.measure.ablations text --data data/stdlib --folder runs/ablations_text [--seeds 0 1 2]
    python -m train.measure.ablations recall --folder runs/ablations_recall

``text``: Python's sources, with facts of one token each hidden in them and asked for at the end of the row.
``recall``: associative recall with each pair in one token, nothing else. All variants are evaluated on the same
held-out rows. Writes seedN.json after each variant. From all seeds in the folder (they may run in separate processes)
it then writes ablations.md and ablations.png. ``--tiny`` runs everything small, as a quick check.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np
from rich.console import Console

from dsa_jax.commands.errors import run_command
from dsa_jax.commands.outputs import outputs_locked, write_json, write_text
from dsa_jax.config import ModelConfig
from train.config import Run, Source, Stage, dense, indexer_warmup, sparse
from train.data.sources import n_ids, rows_of, validation_batches
from train.data.synthetic import Needles
from train.evaluation import DEPTHS
from train.initial import initial_params
from train.measure.evaluate import indexer_quality, needle_accuracy, score
from train.run_folder import CannotWrite
from train.trainer import train

Attention = Literal["dense", "sparse", "window"]
TEXT_IDS = 4096  # of the tokenizer that `python -m train.data.prepare` trains; the facts' ids follow
VARIANTS = {
    "A": "dense continued",
    "B": "warm-up, sparse, L_I (the recipe)",
    "C": "warm-up, sparse, indexer frozen",
    "D": "L_I on its own selection instead of the warm-up",
    "E": "untrained indexer, no L_I",
    "F": "most recent keys only",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """Steps of the common dense stage, of the warm-up and of each variant; rows per step and tokens per row.

    fact_steps: before the dense stage, on rows a quarter as long and four times as many that ask for facts alone.
    Among a thousand text targets per row, the few answers alone would teach nothing.
    """

    fact_steps: int = 0
    dense_steps: int = 1200
    warmup_steps: int = 240
    variant_steps: int = 240
    batch: int = 16
    seq_len: int = 1024
    n_facts: int = 32  # per row, all of them asked for


def sources(task: str, budget: Budget, data: str | None) -> tuple[Source, ...]:
    """The training data; the last source asks for facts.

    Raises:
      ValueError: the task "text" without ``data``, the prepared folder.
    """
    if task == "recall":
        pairs = (("n_keys", 32), ("n_values", 16), ("n_pairs", budget.n_facts))
        return (Source(kind="associative_recall", options=pairs),)
    if data is None:
        raise ValueError("the task 'text' needs --data, the folder that `python -m train.data.prepare` wrote")
    first, n_keys, n_values = TEXT_IDS, 32, 16
    keys, values = first + n_keys * n_values, first + n_keys * n_values + n_keys
    ids = {"first_fact": first, "first_key": keys, "first_value": values}
    options = {"n_needles": budget.n_facts, "n_keys": n_keys, "n_values": n_values} | ids
    facts = Source(kind="needles", folder=data, options=tuple(options.items()))
    return Source(kind="text", folder=data), facts


def model_config(seq_len: int, vocab_size: int) -> ModelConfig:
    """About 4 M parameters, with index_topk a sixteenth of the row length."""
    return ModelConfig(
        vocab_size=vocab_size, d_model=192, n_layers=4, n_dense_layers=1, n_heads=6, d_ff=512, d_expert=96,
        q_lora_rank=96, kv_lora_rank=96, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
        index_n_heads=4, index_head_dim=64, index_topk=seq_len // 16, n_routed_experts=8, n_shared_experts=1,
        n_activated_experts=2, n_expert_groups=4, n_limited_groups=2, route_scale=1.0, max_seq_len=seq_len,
        init_std=0.05, bos_token_id=0, eos_token_ids=(1,), pad_token_id=2,
    )  # fmt: skip


def stages_of(variant: str, budget: Budget) -> tuple[Stage, ...]:
    """The stages of this variant after the dense one."""
    warmup = indexer_warmup(budget.warmup_steps, data_seed=1)
    last: dict[str, Any] = {
        "steps": budget.variant_steps,
        "lr": 3e-4,
        "data_seed": 2,
        "lr_warmup": budget.variant_steps // 20,
    }
    match variant:
        case "A":
            return (dense(**last),)
        case "B":
            return (warmup, sparse(index_lr=1e-3, **last))
        case "C":
            return (warmup, Stage(name="sparse", attention="sparse", trains="model", **last))
        case "D":
            own = dataclasses.replace(warmup, name="own_selection", attention="sparse")
            return (own, sparse(index_lr=1e-3, **last))
        case "E":
            return (Stage(name="sparse", attention="sparse", trains="model", **last),)
        case _:
            return (Stage(name="window", attention="window", trains="model", **last),)


def run_seed(seed: int, budget: Budget, data: tuple[Source, ...], folder: Path, console: Console) -> None:
    """Writes seedN.json: one row per variant, with cross entropy on held-out rows and the share of facts found.

    The cross entropy is that of the first source, the facts are those of the last.
    """
    facts = rows_of(data[-1], budget.seq_len, "validation")
    config = model_config(budget.seq_len, max(TEXT_IDS, n_ids(facts)))
    common = Run(
        model=config, data=data, batch=budget.batch, seq_len=budget.seq_len, seed=seed, eval_batches=0,
        stages=(dense(budget.dense_steps, lr=2e-3, lr_warmup=budget.dense_steps // 20, lr_end=0.15, bias_step=0.01),),
        checkpoint_every=10**6, log_every=100, keep=1,
    )  # fmt: skip
    of_seed = folder / f"seed{seed}"
    start = learn_facts(common, budget.fact_steps, of_seed / "facts", console)
    base = train(common, of_seed / "dense", console, start)
    judge = Judge(common)
    about = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "budget": dataclasses.asdict(budget),
    }
    rows = [{"seed": seed, "variant": "dense", "attention": a, **judge(base, a)} for a in get_args(Attention)]
    for variant in VARIANTS:
        run = dataclasses.replace(common, stages=stages_of(variant, budget))
        began = time.perf_counter()
        params = train(run, of_seed / variant, console, jax.tree.map(np.asarray, base))
        attention = run.stages[-1].attention
        rows.append({"seed": seed, "variant": variant, "attention": attention, **judge(params, attention)})
        write_json(folder / f"seed{seed}.json", {"about": about, "rows": rows})
        shown = {name: value for name, value in rows[-1].items() if name not in ("by_depth", "seed")}
        console.print(f"seed {seed}: {shown} ({time.perf_counter() - began:.0f} s)", soft_wrap=True)


def learn_facts(common: Run, steps: int, folder: Path, console: Console) -> Any:
    """What the dense stage starts from: random parameters, after ``steps`` steps on the last source alone."""
    start = initial_params(common)
    if not steps:
        return start
    stage = dataclasses.replace(common.stages[0], name="facts", steps=steps, lr_warmup=steps // 20)
    run = dataclasses.replace(
        common, stages=(stage,), data=common.data[-1:], seq_len=common.seq_len // 4, batch=4 * common.batch
    )
    return train(run, folder, console, start)


class Judge:
    """Evaluates parameters with one attention on held-out rows, the same for all variants."""

    def __init__(self, common: Run) -> None:
        self.config, self.seq_len = common.model, common.seq_len
        self.facts = rows_of(common.data[-1], common.seq_len, "validation")
        self.judged, self.asked = (
            validation_batches(dataclasses.replace(common, data=(source,), eval_batches=4))
            for source in (common.data[0], common.data[-1])
        )

    def __call__(self, params: Any, attention: Attention) -> dict[str, Any]:
        """ce [nats], facts (share found), and for sparse attention also by_depth, recall and kl [layers]."""
        config = dataclasses.replace(self.config, attention=attention)
        found: dict[str, Any] = {
            "ce": score(params, config, self.judged).cross_entropy,
            "facts": score(params, config, self.asked).accuracy,
        }
        if attention == "sparse":
            if isinstance(self.facts, Needles):
                found["by_depth"] = needle_accuracy(params, config, self.facts, [self.seq_len], DEPTHS)
            layers = indexer_quality(params, config, self.judged[0])
            found["recall"] = [layer["recall"] / layer["recall_oracle"] for layer in layers]
            found["kl"] = [layer["kl"] for layer in layers]
        return found


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of those seeds in the folder that have all variants."""
    found = [json.loads(path.read_text())["rows"] for path in sorted(folder.glob("seed*.json"))]
    return [row for rows in found if {row["variant"] for row in rows} >= set(VARIANTS) for row in rows]


def table(rows: list[dict[str, Any]]) -> str:
    """The variants as Markdown: mean over the seeds, with the smallest and the largest value."""

    def of(variant: str, name: str) -> list[float]:
        return [row[name] for row in rows if row["variant"] == variant]

    lines = ["| variant | | CE, nats | above A | facts found |", "|---|---|---|---|---|"]
    for variant, title in VARIANTS.items():
        cells = [
            spread(of(variant, "ce"), ".4f"),
            spread(gaps(rows, variant), "+.4f"),
            spread(of(variant, "facts"), ".3f"),
        ]
        lines.append(f"| {variant} | {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gaps(rows: list[dict[str, Any]], variant: str) -> list[float]:
    """Nats by which the variant's cross entropy exceeds that of A from the same dense model, per seed."""
    reference = {row["seed"]: row["ce"] for row in rows if row["variant"] == "A"}
    return [row["ce"] - reference[row["seed"]] for row in rows if row["variant"] == variant]


def spread(values: list[float], form: str) -> str:
    """mean (smallest to largest)."""
    return f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Two panels: cross entropy above variant A, and the share of facts found; one dot per seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for x, variant in enumerate(VARIANTS):
        found = [100 * row["facts"] for row in rows if row["variant"] == variant]
        for panel, values in ((left, gaps(rows, variant)), (right, found)):
            panel.bar(x, statistics.mean(values), color="#9db7d9")
            panel.plot([x] * len(values), values, "o", color="#1f4e9c", markersize=4)
    for panel, label in ((left, "cross entropy above A, nats"), (right, "facts found, %")):
        panel.set_xticks(range(len(VARIANTS)), list(VARIANTS))
        panel.set_ylabel(label)
        panel.set_xlabel("variant")
    left.axhline(0.0, color="#888888", linewidth=0.8)
    figure.suptitle("Continuations of one dense model: A dense, B the recipe, C to F without a part of it")
    figure.savefig(path, dpi=130)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m train.measure.ablations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", choices=("text", "recall"))
    parser.add_argument("--data", help="folder that `python -m train.data.prepare` wrote")
    parser.add_argument("--folder", type=Path, default=Path("runs/ablations"), help="where results go")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds to run in this process"
    )
    parser.add_argument("--tiny", action="store_true", help="few and small steps, as a quick check")
    for field in dataclasses.fields(Budget):
        parser.add_argument("--" + field.name.replace("_", "-"), type=int, default=field.default)
    options = parser.parse_args(arguments)
    budget = Budget(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Budget)})
    if options.tiny:
        budget = Budget(
            fact_steps=5, dense_steps=20, warmup_steps=5, variant_steps=5, batch=2, seq_len=256, n_facts=8
        )

    def start() -> int:
        data = sources(options.task, budget, options.data)
        # Each seed by itself: other processes may run other seeds into the same folder.
        with outputs_locked(*(options.folder / f"seed{seed}.json" for seed in options.seeds)):
            run_seeds(options.seeds, budget, data, options.folder)
        return 0

    return run_command("python -m train.measure.ablations", start, failures=(FloatingPointError, CannotWrite))


def run_seeds(seeds: list[int], budget: Budget, data: tuple[Source, ...], folder: Path) -> None:
    """Runs them one after the other, then writes the table and the picture of all seeds in the folder."""
    console = Console(highlight=False)
    for seed in seeds:
        run_seed(seed, budget, data, folder, console)
    rows = read_rows(folder)
    write_text(folder / "ablations.md", table(rows) + "\n")
    draw(rows, folder / "ablations.png")
    console.print(table(rows), soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
