"""`--dry-run` at the real size, and `compare_tensors`, on headers and small checkpoints."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dsa_jax.checkpoint import convert
from dsa_jax.checkpoint.compare_tensors import compare_tensors, parse_layers
from dsa_jax.checkpoint.dry_run import dry_run
from dsa_jax.checkpoint.request import Request
from tests.vectors.weights import write_sparse_release

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def orbax(release, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("orbax") / "fp8"
    convert(release, path)
    return path


DRY_RUN = """
import resource, sys
from pathlib import Path
from dsa_jax.checkpoint.dry_run import dry_run
from dsa_jax.checkpoint.request import Request
report = dry_run(Request(source=Path(sys.argv[1])))
print(*report.lines(), sep="\\n")
print(report.elements, report.elements - report.config.param_count(), len(report.faults))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_the_671b_release_is_counted_as_deepseek_counts_it(tmp_path) -> None:
    """685,396,921,376 is the published size of V3.2-Exp: all stored elements, block scales included.

    Runs in a process of its own: its memory is measured, and the shape checks of these tests would slow it down.
    """
    n_bytes = write_sparse_release(tmp_path / "v32", "v32", mtp=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", DRY_RUN, str(tmp_path / "v32")]
    started = time.perf_counter()
    run = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert time.perf_counter() - started < 60
    *lines, counts, peak = run.stdout.splitlines()
    assert counts == "685396921376 41591584 0" and n_bytes == 689_469_018_240
    assert int(peak) * 1024 < 2_000_000_000
    assert "all        92,425 tensors     685,396,921,376 elements     689,469,018,240 bytes" in lines
    shown = {line.split()[0]: line for line in lines if line}
    last_expert = shown["model.layers.60.mlp.experts.255.down_proj.weight"]
    assert "F8_E4M3   -> moe_layers/ffn/experts/w_down[57, 255]" in last_expert
    assert "mtp/proj" in shown["model.layers.61.eh_proj.weight"]


def test_every_problem_is_listed_at_once(release, tmp_path) -> None:
    path = tmp_path / "damaged"
    shutil.copytree(release, path)
    (path / "model-00001-of-00003.safetensors").unlink()
    shard = path / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    report = dry_run(Request(source=path))
    text = "\n".join(report.lines())
    assert "problem: 1 shards missing" in text and "problem: 1 unreadable shards" in text
    assert report.written_bytes is None and "no problems" not in text


def test_both_directions_and_forms_are_planned(release, orbax) -> None:
    kept = dry_run(Request(source=release)).written_bytes
    bf16 = dry_run(Request(source=release, dtype="bfloat16")).written_bytes
    assert kept is not None and bf16 is not None and 1.5 * kept < bf16 < 2 * kept
    back = dry_run(Request(source=orbax, max_shard_bytes=1_000_000))
    total = sum(entry.size for entry in dry_run(Request(source=release)).tensors.values())
    assert back.format == "hf" and back.written_bytes == total
    assert any("F8_E4M3 in model-00001-of-" in line for line in back.lines())


def test_a_conversion_compares_as_identical(release, orbax, tmp_path) -> None:
    """Except for the norms and the router: we store them in float32, the release in bfloat16."""
    report = compare_tensors(release, orbax)
    other = {row.dtypes for row in report.rows if row.verdict != "identical"}
    assert report.passed and other == {("BF16", "F32")} and report.count("identical") > 150
    convert(release, tmp_path / "bf16", dtype="bfloat16")
    report = compare_tensors(tmp_path / "bf16", release)
    assert report.passed and report.count("equal") > 100 and report.count("identical") > 10


def test_one_changed_weight_is_found_with_its_size(release, orbax, tmp_path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(release, changed)
    for file in changed.glob("*.safetensors"):
        raw = bytearray(file.read_bytes())
        length = int.from_bytes(raw[:8], "little")
        entry = json.loads(raw[8 : 8 + length]).get("model.norm.weight")
        if entry:
            begin = 8 + length + entry["data_offsets"][0]
            raw[begin : begin + 2] = np.float32(3.0).view(np.uint32).item().to_bytes(4, "little")[2:]
            file.write_bytes(raw)
    report = compare_tensors(changed, orbax)
    assert not report.passed and report.count("different") == 1
    (row,) = [row for row in report.rows if row.verdict == "different"]
    assert row.name == "model.norm.weight" and row.layer is None and 0.5 < row.max_difference < 4
    assert "| model.norm.weight | BF16, F32 |" in report.to_markdown()
    content = json.loads(report.to_json())
    assert content["passed"] is False and len(content["rows"]) == len(report.rows)


def test_only_the_chosen_layers_are_read(release, orbax) -> None:
    whole, part = compare_tensors(release, orbax), compare_tensors(release, orbax, layers=(0, 4))
    assert {row.layer for row in part.rows} == {0, 4} and part.bytes_read < 0.6 * whole.bytes_read
    assert "| 4 | " in part.to_markdown()
    with pytest.raises(ValueError, match=r"layers must lie in 0 \.\. 4, got \[5\]"):
        compare_tensors(release, orbax, layers=(5,))
    assert parse_layers("0-2, 61") == (0, 1, 2, 61)
    for text in ("", "a", "1-", "-2"):
        with pytest.raises(ValueError, match="--layers takes"):
            parse_layers(text)


def test_checkpoints_of_different_models_are_not_compared(release, orbax, tmp_path) -> None:
    shutil.copytree(release, tmp_path / "other")
    values = json.loads((release / "config.json").read_text()) | {"routed_scaling_factor": 1.0}
    (tmp_path / "other" / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="different models: route_scale is 1.0 and 2.5"):
        compare_tensors(tmp_path / "other", orbax)
