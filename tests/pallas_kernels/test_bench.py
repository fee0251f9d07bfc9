"""The benchmark program, at tiny shapes."""

import json

import pytest

from pallas_kernels import bench
from pallas_kernels.cases import CASES


def test_it_measures_every_case_of_an_operation_and_writes_them_down(tmp_path, capsys):
    path = tmp_path / "numbers.json"
    assert bench.main(["select_topk", "--tiny", "--implementation", "xla", "--json", str(path)]) == 0
    numbers = json.loads(path.read_text())
    names = [case.name for case in CASES if case.operation == "select_topk"]
    assert [row["name"] for row in numbers["rows"]] == names
    assert all(row["error"] == {"rows that differ": 0} and row["milliseconds"] > 0 for row in numbers["rows"])
    assert set(numbers["ceilings"]) == {"bfloat16", "float8_e4m3fn", "copy"}
    assert names[0] in capsys.readouterr().out


def test_a_refused_case_is_listed_with_the_reason(capsys):
    assert bench.main(["index_scores", "--tiny", "--implementation", "mosaic_tpu"]) == 0
    assert "has no 'mosaic_tpu' implementation yet" in capsys.readouterr().out


def test_an_unknown_operation_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench.main(["matmul"])
    assert "OPERATION must be of" in capsys.readouterr().err
