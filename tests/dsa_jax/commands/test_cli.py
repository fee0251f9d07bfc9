"""The `dsa-jax` command: what it prints, what it writes, and its exit codes."""

import importlib.metadata
import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models

from dsa_jax.checkpoint import load_config, load_params, write_hf
from dsa_jax.commands.cli import main
from dsa_jax.config import tiny
from dsa_jax.generate import generate
from dsa_jax.parity.compare import run_ours
from dsa_jax.transformer import Transformer

PROMPT = "5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24"  # 20 tokens, index_topk is 8
LIMIT = 64


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny(
        vocab_size=64, d_model=64, d_ff=64, d_expert=32, n_layers=2, n_heads=2, q_lora_rank=32, index_topk=8,
        max_seq_len=LIMIT, n_mtp_layers=0, init_std=0.1, param_dtype="float32", fp8=None,
    )  # fmt: skip
    params = jax.jit(Transformer(config).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    write_hf(folder, params, config)
    return folder


@pytest.fixture(scope="module")
def vectors(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of numbers from our own model: comparing with it must pass."""
    config = load_config(checkpoint, dtype="float32", param_dtype="float32")
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 24))
    path = tmp_path_factory.mktemp("vectors") / "ours.npz"
    np.savez(path, **run_ours(load_params(checkpoint, config), config, tokens))
    return path


def run(*args: object) -> int:
    return main([str(arg) for arg in args])


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The one line that bad input gives."""
    assert run(*args) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("dsa-jax: ")
    return line


def test_generate_prints_and_writes_what_the_library_generates(checkpoint, tmp_path, capsys):
    path = tmp_path / "new" / "out.json"
    args = ["--model", checkpoint, "--token-ids", PROMPT, "--max-new-tokens", 6]
    assert run("generate", *args, "--stop", "none", "--dtype", "float32", "--json", path) == 0
    content = json.loads(path.read_text())

    config = load_config(checkpoint, dtype="float32", param_dtype="float32")
    prompt = [int(token) for token in PROMPT.split(",")]
    (expected,) = generate(load_params(checkpoint, config), config, [prompt], max_new_tokens=6)
    assert content["new_ids"] == expected and content["prompt_ids"] == prompt
    assert capsys.readouterr().out.split() == [str(token) for token in expected]
    assert content["config"]["index_topk"] == 8 and content["config"]["attention"] == "sparse"
    assert content["seconds"]["first_token"] > 0 and content["other_tokens_per_second"] > 0


def test_generate_ends_at_a_stop_token(checkpoint, capsys):
    args = ["generate", "--model", checkpoint, "--token-ids", PROMPT, "--max-new-tokens", 6, "--stop"]
    assert run(*args, "none") == 0
    free = capsys.readouterr().out.split()
    assert run(*args, free[2]) == 0
    assert capsys.readouterr().out.split() == free[: free.index(free[2]) + 1]


def test_sampling_repeats_with_its_seed(checkpoint, capsys):
    texts = []
    for seed in (1, 1, 2):
        args = ["--token-ids", PROMPT, "--max-new-tokens", 8, "--temperature", 2.0, "--top-p", 0.95]
        assert run("generate", "--model", checkpoint, *args, "--seed", seed) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_a_prompt_is_text_when_there_is_a_tokenizer(checkpoint, tmp_path, capsys):
    folder = tmp_path / "with_tokenizer"
    shutil.copytree(checkpoint, folder)
    vocabulary = {"<bos>": 0} | {chr(ord("0") + i): i for i in range(1, 64)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<bos>"))
    tokenizer.save(str(folder / "tokenizer.json"))
    path = tmp_path / "out.json"
    args = ["--model", folder, "--prompt", "567", "--max-new-tokens", 5, "--stop", "none"]
    assert run("generate", *args, "--json", path) == 0
    content = json.loads(path.read_text())
    assert content["prompt_ids"] == [0, 5, 6, 7]
    assert content["text"] == tokenizer.decode(content["new_ids"]) == capsys.readouterr().out.rstrip("\n")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--token-ids", ",".join(["5"] * (LIMIT + 1))], f"exceed max_seq_len={LIMIT}"),
        (["--token-ids", "1,2,x"], "token ids are whole numbers separated by commas"),
        (["--token-ids", "1,64"], "token ids must be below vocab_size=64, got 64"),
        (["--token-ids", ","], "at least one token"),
        (["--token-ids", "1", "--prompt", "a"], "not both"),
        ([], "either --prompt TEXT or --token-ids 1,2,3"),
        (["--prompt", "a"], "--prompt needs a tokenizer.json"),
        (["--token-ids", "1", "--top-p", "0"], "top_p must be"),
    ],
)
def test_bad_prompts_give_one_line(checkpoint, capsys, args, message):
    assert message in refused(capsys, "generate", "--model", checkpoint, "--max-new-tokens", 4, *args)


def test_bad_folders_give_one_line(checkpoint, tmp_path, capsys):
    args = ["--token-ids", "1,2", "--max-new-tokens", 4]
    assert "no folder" in refused(capsys, "generate", "--model", tmp_path / "absent", *args)
    folder = tmp_path / "truncated"
    shutil.copytree(checkpoint, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "truncated" in refused(capsys, "generate", "--model", folder, *args)
    assert "truncated" in refused(capsys, "compare", "--model", folder, "--reference", "transformers")


def test_traceback_is_shown_on_request(checkpoint, monkeypatch):
    args = ["generate", "--model", checkpoint, "--token-ids", "99", "--max-new-tokens", 4]
    with pytest.raises(ValueError, match="got 99"):
        run(*args, "--traceback")
    monkeypatch.setenv("DSA_JAX_TRACEBACK", "1")
    with pytest.raises(ValueError, match="got 99"):
        run(*args)


def test_compare_with_equal_numbers_exits_with_0(checkpoint, vectors, tmp_path, capsys):
    path = tmp_path / "report.json"
    assert run("compare", "--model", checkpoint, "--vectors", vectors, "--json", path) == 0
    assert "within tolerance" in capsys.readouterr().out
    content = json.loads(path.read_text())
    assert content["passed"] and len(content["layers"]) == 2 and content["tokens"] == [2, 24]


def test_compare_beyond_tolerance_exits_with_1(checkpoint, vectors, tmp_path, capsys):
    arrays = dict(np.load(vectors))
    arrays["logits"][0, 0, 0] += 0.5
    np.savez(tmp_path / "other.npz", **arrays)
    args = ["compare", "--model", checkpoint, "--vectors", tmp_path / "other.npz"]
    assert run(*args) == 1
    output = capsys.readouterr().out
    assert "logits differ by 5.00e-01, more than 5.00e-05" in output and "beyond tolerance" in output
    assert run(*args, "--logits", 0.6) == 0


def test_bad_numbers_give_one_line(checkpoint, vectors, tmp_path, capsys):
    def message(**changes: object) -> str:
        arrays = dict(np.load(vectors)) | changes
        kept = {name: array for name, array in arrays.items() if array is not None}
        np.savez(tmp_path / "bad.npz", **kept)
        return refused(capsys, "compare", "--model", checkpoint, "--vectors", tmp_path / "bad.npz")

    assert "must hold 'input_ids'" in message(input_ids=None)
    assert "must hold 'logits'" in message(logits=None)
    assert "token ids must lie in" in message(input_ids=np.full((2, 24), 64))
    assert "has shape" in message(logits=np.zeros((2, 24, 63), np.float32))
    (tmp_path / "broken.npz").write_bytes(vectors.read_bytes()[:1000])
    for name, expected in (("broken.npz", "not a complete .npz file"), ("absent.npz", "no file")):
        assert expected in refused(capsys, "compare", "--model", checkpoint, "--vectors", tmp_path / name)
    both = ["--vectors", vectors, "--reference", "transformers"]
    assert "not both" in refused(capsys, "compare", "--model", checkpoint, *both)


def test_compare_without_torch_says_what_to_install(checkpoint, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "pip install 'dsa-jax[parity]'" in refused(
        capsys, "compare", "--model", checkpoint, "--seq-len", 16
    )


@pytest.mark.parametrize("command", ["generate", "compare"])
def test_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(command, "--help")
    assert stopped.value.code == 0
    assert f"dsa-jax {command} --model DIR" in capsys.readouterr().out


def test_help_lists_the_installed_plugins(monkeypatch, capsys):
    point = importlib.metadata.EntryPoint("aot", "train.aot:main", "dsa_jax.commands")
    for installed, listed in (([point], True), ([], False)):
        monkeypatch.setattr("dsa_jax.commands.cli.entry_points", lambda group, found=installed: found)
        with pytest.raises(SystemExit) as stopped:
            run("--help")
        assert stopped.value.code == 0
        output = capsys.readouterr().out
        assert ("aot" in output) is listed
        assert all(command in output for command in ("generate", "compare", "convert", "verify"))


def test_an_unknown_option_exits_with_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        run("generate", "--modle", "DIR")
    assert stopped.value.code == 2
