"""`dsa-jax convert`, `verify` and `compare --checkpoint` from the command line."""

import json
from pathlib import Path

import pytest

from dsa_jax.commands.cli import main
from dsa_jax.commands.inputs import parse_size


@pytest.fixture(scope="module")
def orbax(release, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("orbax") / "fp8"
    assert main(["convert", str(release), str(path), "--max-memory", "2GiB"]) == 0
    return path


def test_convert_says_what_it_wrote(release, tmp_path, capsys) -> None:
    assert main(["convert", str(release), str(tmp_path / "bf16"), "--dtype", "bfloat16"]) == 0
    output = capsys.readouterr().out
    assert "bytes of tensors" in output and "MB/s" in output and "peak memory" in output
    assert (
        main(["convert", str(tmp_path / "bf16"), str(tmp_path / "hf"), "--format", "hf", "--quantize", "fp8"])
        == 0
    )
    assert main(["verify", str(tmp_path / "hf")]) == 0
    assert "344 tensors match their checksums" in capsys.readouterr().out


def test_dry_run_prints_tensors_targets_and_counts_and_writes_nothing(release, tmp_path, capsys) -> None:
    assert main(["convert", str(release), str(tmp_path / "out"), "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert "-> moe_layers/ffn/experts/w_up[2, 7]" in output and "no problems in the headers" in output
    assert not (tmp_path / "out").exists()


def test_compare_writes_its_report_and_exits_by_it(release, orbax, tmp_path, capsys) -> None:
    files = ["--markdown", str(tmp_path / "r.md"), "--json", str(tmp_path / "r.json")]
    arguments = ["compare", "--model", str(release), "--checkpoint", str(orbax), "--layers", "0,3-4", *files]
    assert main(arguments) == 0
    assert (tmp_path / "r.md").read_text() == capsys.readouterr().out
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["passed"] and {row["layer"] for row in content["rows"]} == {0, 3, 4}


def test_verify_exits_with_1_and_names_the_tensor(orbax, tmp_path, capsys) -> None:
    assert main(["convert", str(orbax), str(tmp_path / "hf")]) == 0
    shard = tmp_path / "hf" / "model.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    assert main(["verify", str(tmp_path / "hf")]) == 1
    assert "model.layers.4.shared_head.head.weight differs from its checksum" in capsys.readouterr().out


def test_a_folder_without_checksums_is_still_checked(release, capsys) -> None:
    assert main(["verify", str(release)]) == 0
    assert "are readable; the folder has no checksums" in capsys.readouterr().out


def test_generate_takes_a_converted_checkpoint_with_fp8_kept(release, orbax, capsys) -> None:
    arguments = ["--token-ids", "5,6,7", "--max-new-tokens", "3", "--stop", "none"]
    texts = []
    for folder, dtype in ((release, "bfloat16"), (orbax, "bfloat16"), (orbax, "fp8"), (release, "fp8")):
        capsys.readouterr()
        assert main(["generate", "--model", str(folder), "--dtype", dtype, *arguments]) == 0
        texts.append(capsys.readouterr().out)
    assert len(set(texts)) == 1


@pytest.mark.parametrize(
    ("text", "size"), [("2GiB", 2 << 30), ("500 MB", 500_000_000), ("1000000", 1_000_000), ("1.5kB", 1500)]
)
def test_sizes_are_read_with_their_units(text, size) -> None:
    assert parse_size("--x", text) == size


@pytest.mark.parametrize("text", ["", "GiB", "2TB", "-1", "0", "2GiBB", "nan", "infGB"])
def test_other_sizes_are_refused(text) -> None:
    with pytest.raises(ValueError, match="--x"):
        parse_size("--x", text)
