"""The pictures of `make demo`: which keys every query reads, and what one token reads of its file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLOCKS = 256  # a picture of the selection is at most this many blocks wide
DPI = 144
CELL = 8, 16  # pixels of one character
FONT_SIZE = CELL[0] / 0.60205 * 72 / DPI  # points: DejaVu Sans Mono is 0.60205 of its size wide
COLUMNS, WIDTH = 3, 80  # columns of text, characters in each
MARGIN, HEADING = 24, 104  # pixels
NOT_READ, QUERY = -1, -2
SHADES = ("#fff3c4", "#ffe08a", "#ffc65c", "#ff9f45", "#f4713a", "#d43d2a")


def draw_selection(selected: Int[np.ndarray, "L T K"], path: Path, title: str) -> None:
    """PNG: one panel per layer, queries downwards, keys to the right; the darker, the more of the keys are read.

    selected: the keys of every query, -1 = none. The last queries, if they do not fill a block, are left out.
    """
    from matplotlib.figure import Figure

    n_layers, length = selected.shape[:2]
    size = -(-length // BLOCKS)
    n_blocks = length // size
    columns = min(n_layers, 3)
    rows = -(-n_layers // columns)
    figure = Figure(figsize=(4.0 * columns, 3.9 * rows + 1.6), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for panel in panels[n_layers:]:
        panel.set_visible(False)
    edges = (0, n_blocks * size, n_blocks * size, 0)
    for layer, panel in enumerate(panels[:n_layers]):
        read = np.zeros((length, length + 1), np.float32)  # the last column takes the -1
        np.put_along_axis(read, selected[layer], 1.0, axis=1)
        part = read[: n_blocks * size, : n_blocks * size]
        share = part.reshape(n_blocks, size, n_blocks, size).mean(axis=(1, 3))
        future = np.triu(np.ones_like(share, bool), 1)
        image = panel.imshow(np.ma.array(share, mask=future), cmap="Blues", vmin=0, vmax=1, extent=edges)
        panel.plot([0, edges[1]], [0, edges[1]], color="#777777", linewidth=0.6)
        panel.set_title(f"layer {layer}")
        panel.label_outer()
        panel.set_facecolor("#f4f4f4")
    for panel in panels[max(n_layers - columns, 0) : n_layers]:
        panel.set_xlabel("position of the token that is read")
    for panel in panels[:n_layers:columns]:
        panel.set_ylabel("position of the token that reads")
    label = f"share of the keys that are read, in blocks of {size} x {size}"
    figure.colorbar(image, ax=panels, label=label, location="bottom", shrink=0.4, aspect=40)
    figure.suptitle(title)
    _save(figure, path)


def draw_reading(
    text: str, offsets: Sequence[tuple[int, int]], counts: Int[np.ndarray, " T"], path: Path, title: str
) -> None:
    """PNG: the text that the last token sees, each token coloured by how many layers read it.

    offsets: begin and end of every token in ``text``; counts: by how many layers it is read, for the same tokens.
    """
    marks = np.full(len(text), NOT_READ)
    for (begin, end), count in zip(offsets, counts, strict=True):
        marks[begin:end] = count if count else NOT_READ
    marks[slice(*offsets[-1])] = QUERY
    lines = _lines(text, marks)
    most = int(counts.max())

    n_rows = -(-len(lines) // COLUMNS)
    width = COLUMNS * (WIDTH * CELL[0] + MARGIN) + MARGIN
    height = n_rows * CELL[1] + HEADING + MARGIN
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / DPI, height / DPI))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.axis("off")
    axes.text(MARGIN, 12, title, fontsize=9, va="top", linespacing=1.4)
    shades = [
        SHADES[round((count - 1) * (len(SHADES) - 1) / max(most - 1, 1))] for count in range(1, most + 1)
    ]
    keys = [(f"read by {i + 1} layer" + "s" * (i > 0), color) for i, color in enumerate(shades)]
    for i, (label, color) in enumerate([*keys, ("the token that reads", "#1f4e9c")]):
        x = MARGIN + i * 150
        axes.barh(HEADING - 26, 14, 14, x, color=color)
        axes.text(x + 20, HEADING - 26, label, fontsize=6.5, va="center")

    for number, (characters, line) in enumerate(lines):
        column, row = divmod(number, n_rows)
        left, top = MARGIN + column * (WIDTH * CELL[0] + MARGIN), HEADING + row * CELL[1]
        for count in np.unique(line[line != NOT_READ]):
            color = "#1f4e9c" if count == QUERY else shades[count - 1]
            spans = [(left + int(at) * CELL[0], CELL[0]) for at in np.flatnonzero(line == count)]
            axes.broken_barh(spans, (top, CELL[1]), facecolor=color, linewidth=0)
        for color, wanted in (
            ("#a5a5a5", line == NOT_READ),
            ("#000000", line > 0),
            ("#ffffff", line == QUERY),
        ):
            shown = "".join(c if show else " " for c, show in zip(characters, wanted, strict=True))
            if shown.strip():
                axes.text(
                    left, top + CELL[1] / 2, shown, color=color, fontsize=FONT_SIZE, va="center_baseline",
                    family="DejaVu Sans Mono", parse_math=False,
                )  # fmt: skip
    _save(figure, path)


def _lines(text: str, marks: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """The text in lines of at most WIDTH characters, with the marks of each; a line break takes a cell itself."""
    lines = []
    begin = 0
    for line in text.splitlines(keepends=True) or [""]:
        shown = "".join(c if c == " " or (c.isprintable() and ord(c) < 0x250) else " " for c in line)
        for start in range(0, len(line), WIDTH):
            part = slice(start, start + WIDTH)
            lines.append((shown[part], marks[begin : begin + len(line)][part]))
        begin += len(line)
    return lines


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
