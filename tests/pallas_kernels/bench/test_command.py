"""The benchmark program, at tiny shapes."""

import json

import pytest

from pallas_kernels.bench import command as bench
from pallas_kernels.cases import CASES, Case


def test_it_measures_every_case_of_an_operation_and_writes_them_down(tmp_path, capsys):
    path = tmp_path / "numbers.json"
    assert bench.main(["select_topk", "--tiny", "--implementation", "xla", "--json", str(path)]) == 0
    numbers = json.loads(path.read_text())
    names = [case.name for case in CASES if case.operation == "select_topk"]
    assert [row["name"] for row in numbers["rows"]] == names
    assert all(row["error"] == {"rows that differ": 0} and row["milliseconds"] > 0 for row in numbers["rows"])
    assert set(numbers["ceilings"]) == {"bfloat16", "float8_e4m3fn", "copy"}
    assert set(numbers["ceiling_methods"]) == set(numbers["ceilings"])
    methods = {"one call", "queued calls", "kernel sum"}
    assert {row["method"] for row in numbers["rows"]} | set(numbers["ceiling_methods"].values()) <= methods
    assert all({"wall_us", "kernels_us", "span_us", "gaps_us"} <= set(row) for row in numbers["rows"])
    assert names[0] in capsys.readouterr().out


def test_grouped_products_are_measured_with_bfloat16_and_fp8_weights(tmp_path):
    path = tmp_path / "numbers.json"
    assert bench.main(["grouped_matmul", "--tiny", "--case", "256 rows", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["dtype"] for row in rows] == ["bfloat16", "float8_e4m3fn"]
    assert all(row["error"]["relative"] < 1e-2 and row["milliseconds"] > 0 for row in rows)


def test_a_refused_case_is_listed_with_the_reason(capsys):
    assert bench.main(["index_scores", "--tiny", "--implementation", "mosaic_tpu"]) == 0
    assert "has no 'mosaic_tpu' implementation yet" in capsys.readouterr().out


def test_a_layer_is_timed_in_all_its_forms_and_checked(tmp_path, capsys):
    path = tmp_path / "numbers.json"
    operations = ["dsa_attention", "dsa_attention_mha", "dense_attention"]
    arguments = [*operations, "--tiny", "--implementation", "xla", "--case", "8K,", "--json", str(path)]
    assert bench.main(arguments) == 0
    rows = {
        row["operation"]: row for row in json.loads(path.read_text())["rows"] if row["name"] == "8K, causal"
    }
    assert set(rows) == set(operations)
    errors = rows["dsa_attention"]["error"]
    assert errors["out"] < 3e-3 and errors["lse"] < 1e-5 and errors["keys that differ"] == 0
    if "refused" not in rows["dense_attention"]:
        assert rows["dense_attention"]["milliseconds"] > 0
    assert "times as fast as dsa_attention_mha" in capsys.readouterr().out


def test_the_work_of_a_causal_layer_is_what_its_queries_do():
    S, K = 40, 16
    case = Case(operation="dsa_attention", name="", T=S, S=S, K=K, dtype="bfloat16", mask="causal")
    visible = [t + 1 for t in range(S)]
    assert case.visible_keys == sum(visible) // S
    assert case.chosen_keys == pytest.approx(sum(min(K, n) for n in visible) / S, rel=0.02)


def test_an_unknown_operation_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench.main(["matmul"])
    assert "OPERATION must be one of" in capsys.readouterr().err
