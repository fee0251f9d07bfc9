"""The report of a made-up run: its numbers, its pictures, and how broken folders are refused."""

import json

import numpy as np
import pytest

from train.reports.figures import FIGURES, index_kl
from train.reports.record import read_run
from train.reports.report import main, write_report

pytest.importorskip("matplotlib")

STAGES = {"dense": 300, "indexer_warmup": 200, "sparse": 300}
LAYERS = 4  # three main layers, the first dense, and MTP


def config(**changes):
    stages = [{"name": name, "steps": steps} for name, steps in STAGES.items()]
    model = {"n_layers": LAYERS - 1, "n_dense_layers": 1, "d_model": 64, "index_topk": 128}
    return {"model": model, "stages": stages, "batch": 16, "seq_len": 4096, "seed": 0} | changes


def metrics():
    rng = np.random.default_rng(0)
    for step in range(10, 801, 10):
        stage = "dense" if step <= 300 else "indexer_warmup" if step <= 500 else "sparse"
        line = {"step": step, "stage": stage, "max_load_ratio": (1.3 + rng.random(LAYERS - 1) * 0.2).tolist()}
        line |= {"tokens_per_s": 1e5 + step, "flops_per_s": 2e13, "memory_bytes": 3 * 2**30}
        if stage != "indexer_warmup":
            line["ce"] = 3.0 + 4.0 * np.exp(-step / 80) + 0.05 * rng.standard_normal()
            line["mtp"] = line["ce"] + 0.6
        if stage != "dense":
            kl = np.linspace(0.2, 1.0, LAYERS) * (0.05 + np.exp(-(step - 300) / 50))
            line["index_kl"] = (kl * np.exp(0.05 * rng.standard_normal(LAYERS))).tolist()
        yield line


def evaluations(needles=True):
    for step, after in ((0, "before"), (300, "dense"), (500, "indexer_warmup"), (800, "sparse")):
        learned = {"before": 0.0, "dense": 0.05, "indexer_warmup": 0.9, "sparse": 0.97}[after]
        indexer = []
        for layer in range(LAYERS):
            oracle = 0.9 - 0.1 * layer
            indexer.append(
                {
                    "layer": layer, "queries": 100, "kl": (1 - learned) * 0.8 + 0.01, "entropy": 3.1,
                    "kl_uniform": 0.9, "kl_recency": 0.5, "recency_tau": 64.0, "recall_oracle": oracle,
                    "recall": 0.06 + learned * (oracle - 0.06), "recall_recency": 0.3, "recall_random": 0.06,
                    "overlap": learned,
                }
            )  # fmt: skip
        ce = {"ce_dense": 3.0 + 4 * (step == 0), "ce_sparse": 3.05 + 4 * (step == 0) + (step == 300)}
        line = {"step": step, "after": after, "indexer": indexer, **ce}
        line |= {"accuracy_dense": 0.4, "accuracy_sparse": 0.39}
        if needles and after == "sparse":
            line["needles"] = [
                {"length": n, "depth": d, "accuracy_dense": 1.0, "accuracy_sparse": 1 - d * n / 8192}
                for n in (1024, 2048, 4096)
                for d in (0.0, 0.25, 0.5, 0.75, 1.0)
            ]
        yield line


def write(folder, config=config(), metrics=(), evaluations=None):  # noqa: B008
    lines = lambda rows: "".join(json.dumps(row) + "\n" for row in rows)  # noqa: E731
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text(lines(metrics))
    if evaluations is not None:
        (folder / "eval.jsonl").write_text(lines(evaluations))
    return folder


def test_all_records_of_a_run_are_shown(tmp_path):
    report, *pictures = write_report(write(tmp_path, config(), metrics(), evaluations()))
    names = [path.stem for path in pictures]
    assert names == ["loss", "index_kl", "attention_mass", "expert_load", "needles"]
    text = report.read_text()
    for path in pictures:
        assert path.read_bytes().startswith(b"\x89PNG") and f"({path.name})" in text
    assert "800 of 800 steps: dense (300 steps), indexer_warmup (200 steps), sparse (300 steps)" in text
    assert (
        "| after indexer_warmup | 500 | 3.0000 | 3.0500 | 0.400 | 0.390 | 0.0900 | 0.908 (worst 0.907) |"
        in text
    )
    assert "| MTP layer | 0.0340 | 0.9000 | 0.5000 | 3.1000 | 0.584 | 0.600 | 0.300 | 0.060 | 0.970 |" in text
    assert "| sparse | 100,655 | 20 | 3.0 |" in text


def test_a_new_run_has_a_report(tmp_path):
    first = {"step": 10, "stage": "dense", "ce": 5.0, "max_load_ratio": []}
    report, *pictures = write_report(write(tmp_path, config(), [first]))
    assert [path.stem for path in pictures] == ["loss"]
    assert "10 of 800 steps: dense (10 steps)" in report.read_text()


def test_a_warmup_alone_needs_no_loss(tmp_path):
    only = config(stages=[{"name": "indexer_warmup", "steps": 10}])
    line = {"step": 10, "stage": "indexer_warmup", "index_kl": [0.5, 0.2], "max_load_ratio": []}
    _, *pictures = write_report(write(tmp_path, only, [line]))
    assert [path.stem for path in pictures] == ["index_kl"]


def test_deep_models_show_some_layers_and_the_last(tmp_path):
    line = {"step": 10, "stage": "indexer_warmup", "index_kl": [0.5] * 62, "max_load_ratio": []}
    figure = index_kl(read_run(write(tmp_path, config(stages=[{"name": "w", "steps": 10}]), [line])))
    titles = [axes.get_title() for axes in figure.axes if axes.get_visible()]
    assert len(titles) == 12 and titles[0] == "layer 0" and titles[-1] == "layer 61"


def test_every_axis_has_a_label_with_its_unit(tmp_path):
    record = read_run(write(tmp_path, config(), metrics(), evaluations()))
    for name, (_, draw) in FIGURES.items():
        axes = draw(record).axes[0]
        assert axes.get_ylabel() and (
            "[" in axes.get_ylabel() or "/" in axes.get_ylabel() or name == "needles"
        )


class TestBadFolders:
    def test_missing_files_are_named(self, tmp_path):
        with pytest.raises(ValueError, match=r"must have config.json and metrics.jsonl.*no config.json"):
            read_run(tmp_path)
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(ValueError, match="has no metrics.jsonl"):
            read_run(tmp_path)

    def test_no_step_yet(self, tmp_path):
        with pytest.raises(ValueError, match="at least one step, has none"):
            read_run(write(tmp_path))

    def test_broken_json(self, tmp_path):
        write(tmp_path, metrics=metrics())
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(
            ValueError, match="config.json is not valid JSON .*start the run again with its folder"
        ):
            read_run(tmp_path)

    def test_the_command_reports_it_in_one_line(self, tmp_path, capsys):
        assert main([str(tmp_path)]) == 2
        assert capsys.readouterr().err.startswith("python -m train.reports: a run's folder must have")


def test_the_command_prints_the_paths_it_wrote(tmp_path, capsys):
    assert main([str(write(tmp_path, config(), metrics()))]) == 0
    assert capsys.readouterr().out.split() == [
        str(tmp_path / name) for name in ("report.md", "loss.png", "index_kl.png", "expert_load.png")
    ]
