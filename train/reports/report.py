"""`python -m train.reports RUN_DIR` writes report.md and its pictures into the folder of a run.

It reads config.json, metrics.jsonl and eval.jsonl as ``train.trainer`` writes them, and changes none of them.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from dsa_jax.checkpoint.lock import lock_folder
from dsa_jax.commands.errors import run_command
from dsa_jax.commands.outputs import write_text
from train.reports.figures import FIGURES
from train.reports.record import Line, Record, moment, read_run


def write_report(folder: str | os.PathLike[str]) -> list[Path]:
    """Writes report.md and its pictures into the run's folder; returns their paths, report.md first.

    Raises:
      ValueError: see ``read_run``.
      BlockingIOError: another process writes a report into the same folder.
      NotImplementedError: matplotlib is not installed.
    """
    folder = Path(folder)
    record = read_run(folder)
    with lock_folder(folder, ".report.lock"):  # not the run's own: a report may be written while it trains
        return _write(record, folder)


def _write(record: Record, folder: Path) -> list[Path]:
    sections, paths = [_summary(record)], []
    for title, table in (
        ("What each stage changed", _evaluation_table(record)),
        ("Indexers at the last evaluation", _indexer_table(record)),
        ("Speed", _speed_table(record)),
    ):
        if table:
            sections.append(f"## {title}\n\n{table}")
    for name, (caption, draw) in FIGURES.items():
        figure = draw(record)
        if figure is not None:
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=130)
            sections.append(f"![{name}]({name}.png)\n\n{caption}")
    report = folder / "report.md"
    write_text(report, "\n\n".join(sections) + "\n")
    return [report, *paths]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _summary(record: Record) -> str:
    model, run = record.config["model"], record.config
    last, total = record.metrics[-1]["step"], sum(stage["steps"] for stage in run["stages"])
    stages = ", ".join(f"{name} ({end - start} steps)" for name, start, end in record.stages)
    return (
        f"# Run {record.name}\n\n"
        f"{last:,} of {total:,} steps: {stages}. Batches of {run['batch']} rows of {run['seq_len']:,} tokens; "
        f"{model['n_layers']} layers of width {model['d_model']}; sparse attention reads {model['index_topk']} keys "
        f"per query; seed {run['seed']}.\n\n"
        "CE is the mean negative log-likelihood per target. KL, H(p) and mass are means over the validation "
        f"queries that see more than {model['index_topk']} keys, where p is the dense attention summed over heads; "
        "mass is the share of p on the selected keys."
    )


def _evaluation_table(record: Record) -> str:
    rows = []
    for line in record.evaluations:
        layers = line.get("indexer") or []
        shares = [layer["recall"] / layer["recall_oracle"] for layer in layers]
        rows.append(
            [
                moment(line),
                f"{line['step']:,}",
                *(_number(line.get(name), ".4f") for name in ("ce_dense", "ce_sparse")),
                *(_number(line.get(name), ".3f") for name in ("accuracy_dense", "accuracy_sparse")),
                _number(statistics.mean(layer["kl"] for layer in layers) if layers else None, ".4f"),
                f"{statistics.mean(shares):.3f} (worst {min(shares):.3f})" if shares else "",
            ]
        )
    header = ["", "step", "CE dense [nats]", "CE sparse [nats]", "accuracy dense", "accuracy sparse"]
    return (
        _table([*header, "KL, mean of layers [nats]", "mass, relative to the oracle"], rows) if rows else ""
    )


def _indexer_table(record: Record) -> str:
    layers: list[Line] = next(
        (line["indexer"] for line in reversed(record.evaluations) if line.get("indexer")), []
    )
    names = ("kl", "kl_uniform", "kl_recency", "entropy")
    masses = ("recall", "recall_oracle", "recall_recency", "recall_random", "overlap")
    rows = [
        [
            record.layer_name(layer["layer"]),
            *(f"{layer[name]:.4f}" for name in names),
            *(f"{layer[name]:.3f}" for name in masses),
        ]
        for layer in layers
    ]
    header = ["", "KL [nats]", "of uniform", "of best recency", "H(p) [nats]"]
    header += [
        "mass",
        "of the oracle",
        "of the most recent keys",
        "of random keys",
        "keys shared with the oracle",
    ]
    return _table(header, rows) if rows else ""


def _speed_table(record: Record) -> str:
    rows = []
    for name, start, end in record.stages:
        lines = [line for line in record.metrics if start < line["step"] <= end and line.get("tokens_per_s")]
        if lines:
            memory = max(line.get("memory_bytes") or 0 for line in lines)
            rows.append(
                [
                    name,
                    f"{statistics.median(line['tokens_per_s'] for line in lines):,.0f}",
                    f"{statistics.median(line['flops_per_s'] for line in lines) / 1e12:.3g}",
                    f"{memory / 2**30:.1f}" if memory else "",
                ]
            )
    header = ["stage", "tokens/s, median", "TFLOP/s of needed operations", "peak memory [GiB]"]
    return _table(header, rows) if rows else ""


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 bad input or no matplotlib."""
    parser = argparse.ArgumentParser(prog="python -m train.reports", description=__doc__)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the folder of a run")
    options = parser.parse_args(arguments)

    def write() -> int:
        print("\n".join(str(path) for path in write_report(options.run_dir)))
        return 0

    return run_command("python -m train.reports", write)


if __name__ == "__main__":
    sys.exit(main())
