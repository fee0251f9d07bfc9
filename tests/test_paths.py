"""Every public function that takes a path takes a str and any os.PathLike, and means the same by them."""

import inspect
import json
import os
import re
from pathlib import Path

import jax
import pytest

import dsa_jax
import dsa_jax.checkpoint
import train.data.prepare
import train.export
import train.metrics
import train.reports.record
import train.reports.report
import train.trainer
from dsa_jax.checkpoint.compare_tensors import compare_tensors
from dsa_jax.demo.model import load
from tests.train.small import CONFIG, initial, small_run
from train.config import to_json
from train.data.rows import PackedRows


class Named:
    """Not a Path, and all that os.PathLike asks for."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


def trained(path):
    """Refused for its data, after the folder was looked at and before anything is compiled."""
    run = small_run(init_from=None)
    (Path(path) / "config.json").write_text(json.dumps(to_json(run)))
    return train.trainer.train(run, path, params={})


# name: (function, what it is called with beside the path, whether the path is one that holds nothing useful)
FUNCTIONS = {
    "load_config": dsa_jax.load_config,
    "load_params": lambda path: dsa_jax.load_params(path, CONFIG),
    "verify": dsa_jax.checkpoint.verify,
    "convert from": lambda path: dsa_jax.checkpoint.convert(path, "/nowhere/out"),
    "convert to": lambda path: dsa_jax.checkpoint.convert("/nowhere", path),
    "convert by a config": lambda path: dsa_jax.checkpoint.convert("/nowhere", "/nowhere/out", config_file=path),
    "write_hf": lambda path: dsa_jax.write_hf(path, {}, CONFIG),
    "compare_tensors": lambda path: compare_tensors(path, path),
    "the demo's load": load,
    "train": trained,
    "export": lambda path: train.export.export(path, "/nowhere/out"),
    "export's trained": train.export.trained,
    "PackedRows": lambda path: PackedRows(path, "train", 8),
    "prepare into": lambda path: train.data.prepare.prepare(["/nowhere"], path),
    "prepare with": lambda path: train.data.prepare.prepare(["/nowhere"], "/nowhere/out", tokenizer_file=path),
    "write_report": train.reports.report.write_report,
    "read_run": train.reports.record.read_run,
    "read_lines": train.metrics.read_lines,
}  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_str_and_a_path_like_object_are_refused_as_a_path_is(function, tmp_path):
    """The folder holds a file of no use, which every function refuses in words of its own."""
    (tmp_path / "useless").write_text("{}")
    said = []
    for path in (tmp_path, str(tmp_path), Named(tmp_path)):
        with pytest.raises((ValueError, OSError)) as error:
            function(path)
        said.append((type(error.value), re.sub(r"0x[0-9a-f]+", "", str(error.value))))
    assert said[0] == said[1] == said[2]


def test_files_to_carry_may_be_str(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    dsa_jax.write_hf(
        str(tmp_path / "out"), jax.device_get(initial()), CONFIG, carried=[str(tmp_path / "tokenizer.json")]
    )
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


def test_no_exported_function_asks_for_a_path_object_alone():
    exported = [(module, name) for module in (dsa_jax, dsa_jax.checkpoint) for name in module.__all__]
    functions = [
        function for module, name in exported if inspect.isfunction(function := getattr(module, name))
    ]
    functions += [train.trainer.train, train.export.export, train.data.prepare.prepare, PackedRows.__init__]
    for function in functions:
        for name, parameter in inspect.signature(function).parameters.items():
            text = str(parameter.annotation)
            assert "Path" not in text or os.PathLike.__name__ in text, (function, name, text)
