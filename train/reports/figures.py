"""The pictures of a run's report. Each function draws one, or returns None if the run has no data for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from train.reports.record import Record, moment

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The colour-blind safe palette of Okabe and Ito.
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#7a7a7a"
STAGE_SHADES = ("#f3f5f8", "#e4e9f0")
MAX_PANELS = 12


def loss(record: Record) -> Figure | None:
    """Training loss by step, with the validation CE of dense and sparse attention."""
    series = {name: _series(record, name) for name in ("ce", "mtp")}
    evaluations = [line for line in record.evaluations if "ce_dense" in line]
    if not evaluations and not any(len(steps) for steps, _ in series.values()):
        return None
    figure = _figure(9.0, 4.8)
    axes = figure.subplots()
    labels = {"ce": ("training", BLUE), "mtp": ("training, MTP (the token after the next)", PURPLE)}
    for name, (steps, values) in series.items():
        _draw_by_stage(axes, record, steps, values, *labels[name])
    for attention, marker, color in (("dense", "o", "black"), ("sparse", "D", RED)):
        points = [(line["step"], line[f"ce_{attention}"]) for line in evaluations]
        if points:
            axes.plot(
                *zip(*points, strict=True), marker, color=color, markersize=7 if marker == "o" else 5,
                markerfacecolor="none" if marker == "o" else color, clip_on=False, zorder=4,
                label=f"validation, {attention} attention",
            )  # fmt: skip
    _finish(axes, record, "cross entropy [nats per target]")
    _legend(figure, axes)
    return figure


def index_kl(record: Record) -> Figure | None:
    """Index loss per layer by step, on a logarithmic axis, with the baselines of the evaluations."""
    steps, values = _series(record, "index_kl")
    evaluated = {
        layer["layer"]: [
            (line["step"], entry)
            for line in record.evaluations
            for entry in line.get("indexer") or []
            if entry["layer"] == layer["layer"]
        ]
        for line in record.evaluations
        for layer in line.get("indexer") or []
    }
    n_trained = values.shape[1] if values.ndim == 2 else 0
    trained = {record.indexer_layer(index): values[:, index] for index in range(n_trained)}
    layers = sorted({*trained, *evaluated})
    if not layers:
        return None
    figure, panels = _panels(len(layers))
    for index, axes in panels:
        layer = layers[index]
        if layer in trained:
            _draw_by_stage(axes, record, steps, trained[layer], "training, all queries", BLUE)
        points = evaluated.get(layer, [])
        at = [step for step, _ in points]
        marks: list[tuple[str, str, dict[str, Any]]] = [
            ("kl", "validation", dict(color="black", marker="o", linestyle="none", markersize=5)),
            ("kl_recency", "best exponential recency", dict(color=GREEN, linestyle="--", marker=".")),
            ("kl_uniform", "uniform", dict(color=ORANGE, linestyle="--", marker=".")),
            ("entropy", "H(p), for scale", dict(color=GREY, linestyle=":", marker=".")),
        ]
        for name, label, style in marks:
            if points:
                axes.plot(
                    at, [entry[name] for _, entry in points], label=label, clip_on=False, zorder=3, **style
                )
        axes.set_yscale("log")
        _finish(axes, record, "KL [nats per query]", stage_names=False)
        axes.locator_params(axis="x", nbins=5)
        axes.set_title(record.layer_name(layer), fontsize=10)
    _outer_labels(panels)
    _legend(figure, panels[0][1])
    return figure


def attention_mass(record: Record) -> Figure | None:
    """Attention mass on the selected keys by layer, one panel per evaluation, with baselines that need no indexer."""
    evaluations = [line for line in record.evaluations if line.get("indexer")]
    if not evaluations:
        return None
    figure, panels = _panels(len(evaluations), width=max(3.0, 0.4 * len(evaluations[0]["indexer"])))
    for index, axes in panels:
        layers = evaluations[index]["indexer"]
        names = [record.layer_name(layer["layer"]).replace("layer", "").strip() for layer in layers]
        x = np.arange(len(layers))
        oracle = [layer["recall_oracle"] for layer in layers]
        axes.bar(x, oracle, 0.72, color="#dfe5ec", edgecolor="#9aa7b5", label="best possible (oracle)")
        marks: list[tuple[str, str, dict[str, Any]]] = [
            ("recall", "the indexer's keys", dict(marker="o", color=BLUE, markersize=8)),
            ("recall_recency", "the most recent keys", dict(marker="^", color=GREEN, markersize=6)),
            ("recall_random", "random keys", dict(marker="x", color=ORANGE, markersize=6, markeredgewidth=2)),
        ]
        for name, label, style in marks:
            axes.plot(x, [layer[name] for layer in layers], linestyle="none", label=label, **style)
        axes.set_xticks(x, names)
        axes.set_ylim(0, 1.02)
        axes.grid(axis="y", color="#e6e6e6")
        _bare(axes)
        axes.set_xlabel("layer")
        axes.set_ylabel("attention mass [share of 1]")
        axes.set_title(f"{moment(evaluations[index])} (step {evaluations[index]['step']:,})", fontsize=10)
    _outer_labels(panels)
    _legend(figure, panels[0][1])
    return figure


def expert_load(record: Record) -> Figure | None:
    """Load of the busiest expert over the mean load by step, one line per MoE layer."""
    steps, values = _series(record, "max_load_ratio")
    if values.ndim != 2 or not values.shape[1]:
        return None
    from matplotlib import colormaps

    figure = _figure(9.0, 4.2)
    axes = figure.subplots()
    colors = colormaps["viridis"](np.linspace(0.0, 0.85, values.shape[1]))
    for index, color in enumerate(colors):
        _draw_by_stage(axes, record, steps, values[:, index], record.moe_layer_name(index), color)
    axes.axhline(1.0, color="black", linewidth=0.8, linestyle=":", label="perfect balance")
    _finish(axes, record, "busiest expert's load / mean load")
    _legend(figure, axes)
    return figure


def needles(record: Record) -> Figure | None:
    """Accuracy by length and depth of the last evaluation that asked for needles: dense and sparse attention."""
    lines = [line for line in record.evaluations if line.get("needles")]
    if not lines:
        return None
    table = lines[-1]["needles"]
    lengths, depths = (sorted({row[name] for row in table}) for name in ("length", "depth"))
    figure = _figure(3.2 + 1.1 * len(lengths), 2.0 + 0.45 * len(depths))
    both = figure.subplots(1, 2, sharey=True)
    for axes, attention in zip(both, ("dense", "sparse"), strict=True):
        grid = np.full((len(depths), len(lengths)), np.nan)
        for row in table:
            cell = depths.index(row["depth"]), lengths.index(row["length"])
            grid[cell] = row[f"accuracy_{attention}"]
        image = axes.imshow(grid, vmin=0, vmax=1, cmap="cividis", aspect="auto")
        for (i, j), value in np.ndenumerate(grid):
            axes.text(
                j, i, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.6 else "black"
            )
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
        axes.set_xlabel("length of the row [tokens]")
        axes.set_title(f"{attention} attention", fontsize=10)
    both[0].set_ylabel("depth of the needle\n(0 = start, 1 = end of the text)")
    figure.colorbar(image, ax=both, label="share of correct answers")
    figure.suptitle(moment(lines[-1]), fontsize=10)
    return figure


FIGURES: dict[str, tuple[str, Callable[[Any], Figure | None]]] = {
    "loss": ("Cross entropy by step; vertical lines separate the stages.", loss),
    "index_kl": (
        "Index loss (L_I) of each layer. Training: over all queries and the keys of the stage (all visible keys in the "
        "warm-up, the selected keys in the sparse stage). Validation and baselines: over all visible keys of the "
        "queries that see more keys than can be selected.",
        index_kl,
    ),
    "attention_mass": ("Attention mass on the selected keys, by layer.", attention_mass),
    "expert_load": ("Load of the busiest expert in each MoE layer.", expert_load),
    "needles": ("Share of needles found, by length and depth.", needles),
}
"""File name -> (caption, function)."""


def _series(record: Record, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps [M] and values [M] or [M layers] of the lines with this metric."""
    lines = [line for line in record.metrics if line.get(name) is not None]
    return np.array([line["step"] for line in lines]), np.array([line[name] for line in lines], float)


def _figure(width: float, height: float) -> Figure:
    """An empty figure.

    Raises:
      NotImplementedError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise NotImplementedError(
            f"pictures need matplotlib (pip install matplotlib): {missing}"
        ) from missing
    return Figure(figsize=(width, height), layout="constrained")


def _panels(count: int, width: float = 3.2) -> tuple[Figure, list[tuple[int, Axes]]]:
    """(figure, (index, axes) of each panel): up to MAX_PANELS, evenly spaced over ``count``, including the last."""
    shown = np.unique(np.linspace(0, count - 1, min(count, MAX_PANELS)).round().astype(int))
    columns = min(len(shown), 4)
    rows = -(-len(shown) // columns)
    figure = _figure(max(6.4, width * columns + 0.4), 2.6 * rows + 0.9)
    grid = np.atleast_1d(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)).ravel()
    for axes in grid[len(shown) :]:
        axes.set_visible(False)
    return figure, [(int(index), axes) for index, axes in zip(shown, grid, strict=False)]


def _outer_labels(panels: Sequence[tuple[int, Axes]]) -> None:
    """Keeps axis labels only where no panel is to the left or below."""
    columns = min(len(panels), 4)
    for position, (_, axes) in enumerate(panels):
        if position % columns:
            axes.set_ylabel("")
        if position + columns < len(panels):
            axes.set_xlabel("")
        else:
            axes.tick_params(labelbottom=True)


def _draw_by_stage(
    axes: Axes, record: Record, steps: np.ndarray, values: np.ndarray, label: str, color: Any
) -> None:
    """All values in a faint line and their running mean; a stage without the metric leaves a gap."""
    for _, start, end in record.stages:
        inside = (steps > start) & (steps <= end)
        if not inside.any():
            continue
        x, y = steps[inside], values[inside]
        window = max(1, len(y) // 40)
        smooth = np.convolve(
            np.pad(y, (window // 2, window - 1 - window // 2), "edge"), np.ones(window), "valid"
        )
        if window > 1:
            axes.plot(x, y, color=color, linewidth=0.6, alpha=0.35)
        axes.plot(x, smooth / window, color=color, linewidth=1.6, label=label)
        label = "_nolegend_"


def _finish(axes: Axes, record: Record, ylabel: str, *, stage_names: bool = True) -> None:
    """Labels, shaded stages, and their names on top."""
    stages = record.stages
    for index, (name, start, end) in enumerate(stages):
        axes.axvspan(start, end, color=STAGE_SHADES[index % 2], zorder=0, linewidth=0)
        if index:
            axes.axvline(start, color=GREY, linewidth=0.8, zorder=1)
        if stage_names:
            axes.annotate(
                name, ((start + end) / 2, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 4),
                textcoords="offset points", ha="center", va="bottom", fontsize=9, color="#444444",
            )  # fmt: skip
    axes.set_xlim(0, stages[-1][2])
    axes.set_xlabel("step")
    axes.set_ylabel(ylabel)
    axes.grid(axis="y", color="white", linewidth=1.2)
    _bare(axes)


def _bare(axes: Axes) -> None:
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(len(labels), 5), frameon=False, fontsize=9
    )
