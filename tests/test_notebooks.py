"""Every notebook runs from top to bottom, and is kept without outputs."""

import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'dsa-jax[demo]'")
    matplotlib.use("Agg")
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] for cell in cells), "clear the outputs before committing"
    names: dict[str, object] = {}
    for cell in cells:
        exec(compile("".join(cell["source"]), str(path), "exec"), names)
    matplotlib.pyplot.close("all")
