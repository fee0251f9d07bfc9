"""`dsa-jax aot`: what it compiles, its output, and how it refuses bad input."""

import dataclasses
import importlib.util
import json
import math
import re

import jax
import pytest

from dsa_jax.commands.cli import main as dsa_jax
from dsa_jax.config import tiny
from dsa_jax.sharding import make_mesh
from train.aot import main
from train.aot.chips import CHIPS
from train.aot.choosing import meshes, ranked
from train.aot.compiling import dumped, memory_planned, program, refusal
from train.aot.job import read_job, read_topology
from train.aot.options import Options
from train.measure.flops import training_flops

TINY = ["--config", "tiny", "--seq-len", "64", "--batch", "8"]
simulated = pytest.mark.devices(8)
needs_libtpu = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"),
    reason="compiling for TPU needs libtpu: pip install 'dsa-jax[tpu]'",
)


def written(tmp_path, *arguments):
    """(exit code, content of the JSON file) for the tiny model."""
    file = tmp_path / "out.json"
    code = main([*TINY, "--json", str(file), *arguments])
    return code, json.loads(file.read_text())


@needs_libtpu
@pytest.mark.tpu_compile
def test_a_step_compiles_for_a_tpu_and_is_reported(tmp_path, capsys):
    dump = tmp_path / "dump"
    arguments = ["--topology", "v5p:2x2x1", "--mode", "decode", "--mesh", "expert=2", "--layers", "2"]
    code, content = written(tmp_path, *arguments, "--dump", str(dump))
    (found,) = content["results"]
    assert code == 0 and found["fits"] and content["devices"] == 4
    assert found["mesh"] == {"data": 2, "expert": 2, "context": 1, "tensor": 1}
    memory = found["memory"]
    assert (
        memory["peak"]
        == sum(memory[n] for n in ("arguments", "outputs", "temporaries", "code")) - memory["aliased"]
    )
    assert any(c["kind"] == "all-gather" and "data" in c["axes"] for c in found["collectives"])
    assert all(c["bytes"] > 0 and c["runs"] > 0 for c in found["collectives"])
    planned = memory_planned(dumped(dump, "-buffer-assignment.txt"))
    for name in ("arguments", "outputs", "aliased"):
        assert planned[name] == memory[name]
    assert planned["temporaries"] == pytest.approx(memory["temporaries"], abs=2**16)
    assert found["unknown_loops"] == []
    assert found["seconds_estimated"]["memory"] == found["hbm_traffic"] / CHIPS["v5p"].hbm_bandwidth > 0
    assert found["alive_at_peak"] and found["compile_seconds"] > 0 and found["host_peak_bytes"] > 2**28
    printed = capsys.readouterr().out
    for words in (
        "fits, ",
        "capacity",
        "all-gather",
        "estimated, not measured",
        "alive at peak",
        "docs.cloud.google.com",
    ):
        assert words in printed


@needs_libtpu
@pytest.mark.tpu_compile
@pytest.mark.slow
def test_a_plan_is_the_program_without_its_code(tmp_path, capsys):
    arguments = ["--topology", "v5p:2x2x1", "--mode", "decode", "--mesh", "expert=2", "--layers", "1"]
    code, content = written(tmp_path, *arguments, "--plan", "--dump", str(tmp_path / "plan"))
    (found,) = content["results"]
    assert code == 0 and not found["compiled"] and "code" not in found["memory"]
    assert found["memory"]["temporaries"] > 0 and found["collectives"] and found["alive_at_peak"]
    assert "planned, not compiled" in capsys.readouterr().out
    assert main([*TINY, *arguments, "--plan", "--dump", str(tmp_path / "plan")]) == 2
    assert "holds an earlier dump; name another folder" in capsys.readouterr().err


@simulated
def test_memory_is_the_compilers_plan(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(CHIPS, "h200", dataclasses.replace(CHIPS["h200"], hbm_bytes=2e6))
    dump = tmp_path / "dump"
    arguments = ["--topology", "h200:8", "--mode", "prefill", "--mesh", "data=4,tensor=2", "--layers", "1"]
    code, content = written(tmp_path, *arguments, "--dump", str(dump))
    (found,) = content["results"]
    mesh = make_mesh(data=4, tensor=2)
    step, shapes = program(job(mode="prefill", layers=1), mesh)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        stats = step.trace(*shapes).lower().compile().memory_analysis()
    assert code == 1 and "does not fit, by 0.0 GiB" in capsys.readouterr().out
    assert found["memory"]["arguments"] == stats.argument_size_in_bytes
    assert found["memory"]["temporaries"] == stats.temp_size_in_bytes
    assert found["flops_per_device"] == sum(found["flops"].values()) / 8
    assert dumped(dump, ".txt").startswith("HloModule jit_prefill")


@simulated
def test_suggest_compiles_the_best_and_ranks_them(tmp_path, capsys):
    arguments = ["--topology", "h200:8", "--mode", "decode", "--layers", "1", "--suggest", "--tries", "2"]
    code, content = written(tmp_path, *arguments)
    first, second = content["results"]
    assert code == 0 and first["fits"] and first["mesh"] != second["mesh"]
    total = [sum(found["seconds_estimated"].values()) for found in (first, second)]
    assert total == sorted(total)
    assert "quick estimate" in capsys.readouterr().out


def job(**changes):
    asked = dict(config="tiny", topology="h200:8", mode="train", seq_len=64, batch=8)
    return read_job(Options(**(asked | changes)))


@simulated
def test_a_training_step_has_the_operations_of_the_mathematics():
    per_token = training_flops(dataclasses.replace(tiny(), attention="dense"), 64, "indexer")
    assert job(mode="warmup").flops() == pytest.approx({n: value * 8 * 64 for n, value in per_token.items()})


@simulated
def test_suggested_meshes_divide_the_job_and_those_that_fit_come_first():
    wide = job()
    found = meshes(wide)
    assert {"data": 8, "expert": 1, "context": 1, "tensor": 1} in found
    assert {"data": 2, "expert": 2, "context": 1, "tensor": 2} in found
    for sizes in found:
        assert math.prod(sizes.values()) == 8
        wide.check(sizes)
    assert not any(sizes["tensor"] == 8 for sizes in found)  # of 4 heads
    small = dataclasses.replace(wide, chip=dataclasses.replace(wide.chip, hbm_bytes=8e6))
    order = [guess.bytes <= 8e6 for guess in ranked(small)]
    assert order == sorted(order, reverse=True)


@simulated
def test_the_operations_of_a_prompt_are_the_sum_of_its_chunks():
    whole = job(mode="prefill").flops()
    last = job(mode="prefill", chunk=16).flops()
    one = job(mode="decode").flops()
    assert whole["projections"] == 4 * last["projections"] == 64 * one["projections"]
    assert whole["head"] == last["head"] == one["head"]  # of the last token only
    assert last["indexer"] > whole["indexer"] / 4  # its queries see more keys


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v5p"], "CHIP:SHAPE .* v5e, v5p, v6e, tpu7x, h200, as in v5p:8x8x16.* got 'v5p'"),
        (["--topology", "v9:2x2"], "got 'v9:2x2'"),
        (["--topology", "v6e:32x16"], "a pod of v6e has at most 256 chips, got v6e:32x16 with 512"),
        (
            ["--mesh", "data=4,pipeline=2"],
            "--mesh takes each of data, expert, context, tensor once.*'pipeline=2'",
        ),
        (["--mesh", "data=4,data=2"], "once.*'data=2'"),
        (["--mesh", "data=3"], "the mesh data=3, .* has 3 devices, but there are 8; data=.* would work"),
        (
            ["--mesh", "tensor=8"],
            "n_heads must be a multiple of the mesh's tensor=8, got 4; .*tensor=4 would work",
        ),
        (
            ["--mesh", "data=8", "--batch", "4"],
            "the batch must be a multiple of .*data=8.*got 4; .* would work",
        ),
        (["--mesh", "context=8", "--seq-len", "60"], "the sequence length .* context=8, got 60; .*context=4"),
        (
            ["--config", "no-such-model"],
            "--config must be one of deepseek-v3.2, glm-5, glm-5.2, tiny, .* got 'no-such-model'",
        ),
        (["--batch", "0"], r"--batch must be at least 1 and below 2\*\*31, got 0"),
        (
            ["--chunk", "16"],
            "--chunk is for --mode prefill and at most --seq-len=64, got 16 and --mode train",
        ),
        (["--plan"], "--plan is for TPUs, got --topology h200:8"),
        (["--suggest", "--mesh", "data=8"], "--suggest chooses the mesh itself, got --mesh data=8 too"),
    ],
)
@simulated
def test_bad_input_is_refused_in_one_sentence(arguments, message, capsys):
    assert main([*TINY, "--topology", "h200:8", "--mode", "train", *arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("dsa-jax aot: ") and printed.count("\n") == 1
    assert re.search(message, printed), printed


@needs_libtpu
@pytest.mark.tpu_compile
def test_a_shape_that_no_pod_has_is_refused_with_one_that_has(capsys):
    assert main([*TINY, "--topology", "v5p:3x3x3", "--mode", "train"]) == 2
    assert "2x2x1" in (printed := capsys.readouterr().err)
    assert "v5p:4x4x4 would work" in printed
    assert len(read_topology("v5p:4x4x4")[1]) == 64
    assert len(read_topology("tpu7x:2x2x1")[1]) == 8


def test_refusals_of_xla_are_parsed():
    message = "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for "
    message += "HLO temporaries (180.00G) exceeds available HBM (95.73G). HLO module: jit_step."
    assert refusal(message) == (180 * 2**30, round(95.73 * 2**30))
    assert refusal("RESOURCE_EXHAUSTED: Used 17.52G of 15.75G hbm. Exceeded hbm capacity by 1.77G.") == (
        round(17.52 * 2**30),
        15.75 * 2**30,
    )
    assert refusal("INTERNAL: something else") is None


@simulated
def test_the_dsa_jax_command_finds_it_or_says_how_to_install_it(monkeypatch, capsys):
    class Point:
        name = "aot"

        def load(self):
            return main

    monkeypatch.setattr("dsa_jax.commands.cli.entry_points", lambda group: [Point()])
    assert dsa_jax(["aot", *TINY, "--topology", "h200:8", "--mode", "train", "--mesh", "data=3"]) == 2
    assert "dsa-jax aot: the mesh" in capsys.readouterr().err
    monkeypatch.setattr("dsa_jax.commands.cli.entry_points", lambda group: [])
    assert dsa_jax(["aot"]) == 2
    assert "install the package again: pip install -e ." in capsys.readouterr().err


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    assert "For example" in printed and "How to read it" in printed and "--suggest" in printed
