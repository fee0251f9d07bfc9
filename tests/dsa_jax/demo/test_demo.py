"""`make demo`: what it reads, where it cuts, what it refuses, and its pictures."""

import json
from pathlib import Path

import numpy as np
import pytest

from dsa_jax.commands.inputs import encode, read_tokenizer
from dsa_jax.demo import command, measurements
from dsa_jax.demo.model import NANO, Model, load
from dsa_jax.demo.pictures import draw_reading, draw_selection

SOURCE = Path(command.__file__).read_text()


@pytest.fixture(scope="module")
def model() -> Model:
    return load()


def test_sparse_equals_dense_where_it_must_on_a_file(model, monkeypatch):
    monkeypatch.setattr(measurements, "ROW", 320)
    tokens = np.array(encode(SOURCE, model.tokenizer, model.config)[:320])
    table, checks, chosen = measurements.agreement(model, tokens)
    assert [passed for _, passed in checks] == [True, True]
    assert chosen.shape == (model.config.n_layers, 320, model.config.index_topk)
    assert table.row_count == 5


@pytest.mark.parametrize("limit", (60, 300, 10**6))
def test_a_prompt_ends_after_a_def_line_or_with_the_file(limit: int):
    tokenizer = read_tokenizer(NANO)
    prompt = command.cut(SOURCE, tokenizer, limit)
    assert SOURCE.startswith(prompt)
    assert len(tokenizer.encode(prompt).ids) <= limit
    if limit < 10**6 and "def " in prompt:
        assert prompt.splitlines()[-1].lstrip().startswith("def ") and prompt.endswith(":")
    if limit == 10**6:
        assert prompt == SOURCE.rstrip()


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert command.main(list(arguments)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m dsa_jax.demo: ")
    return line


def test_unusable_input_is_one_sentence(capsys, tmp_path):
    assert "cannot read" in refused(capsys, str(tmp_path / "missing.py"))
    assert "cannot read" in refused(capsys, str(tmp_path))
    (binary := tmp_path / "binary.py").write_bytes(b"x = 1 # \xff\xfe")
    assert "byte 8 is not UTF-8" in refused(capsys, str(binary))
    (short := tmp_path / "short.py").write_text("x = 1\n")
    assert "at least 512" in refused(capsys, str(short))
    assert "--new-tokens must be 1 to 512, got 0" in refused(capsys, command.__file__, "--new-tokens", "0")


def test_pictures_of_text_with_anything_in_it(tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'dsa-jax[demo]'")
    text = "a = '$x$'\t# \u6f22\u5b57 \u00e9\r\n\f" + "long " * 40 + "\n\nend"
    offsets = [(0, 0), *((at, at + 1) for at in range(len(text)))]
    counts = np.arange(len(offsets)) % 4
    draw_reading(text, offsets, counts, tmp_path / "reading.png", "title")
    rng = np.random.default_rng(0)
    chosen = rng.integers(-1, 300, (2, 300, 16))
    draw_selection(chosen, tmp_path / "selection.png", "title")
    assert {path.name for path in tmp_path.iterdir()} == {"reading.png", "selection.png"}


def test_cross_entropy_is_the_mean_of_minus_log_probability():
    logits = np.log(np.array([[0.25, 0.75], [0.5, 0.5]], np.float32))
    expected = -(np.log(0.75) + np.log(0.5)) / 2
    assert measurements.cross_entropy(logits, np.array([1, 0])) == pytest.approx(expected, rel=1e-6)


def test_the_trained_model_is_small_and_complete():
    files = [path for path in NANO.iterdir() if path.is_file()]
    names = {path.name for path in files}
    assert {"config.json", "tokenizer.json", "README.md", "LICENSE.python.txt"} <= names
    assert max(path.stat().st_size for path in files) < 16 * 2**20
    index = json.loads((NANO / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {name for name in names if name.endswith(".safetensors")}
