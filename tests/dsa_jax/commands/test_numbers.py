"""Every number of the command line is checked before any weights are read."""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dsa_jax.checkpoint import write_hf
from dsa_jax.checkpoint.request import Request
from dsa_jax.commands.cli import main
from dsa_jax.commands.compare import Compare
from dsa_jax.commands.convert import Convert
from dsa_jax.commands.generate import Generate
from dsa_jax.commands.verify import Verify
from dsa_jax.config import tiny
from dsa_jax.generate import Sampling, truncate
from dsa_jax.transformer import Transformer

VALUES = ("nan", "inf", "-inf", "-1", "0", str(2**31), str(2**63))
# Option -> those of VALUES that it takes. Whole numbers and lists of them refuse "nan" and "inf" as well.
TAKEN = {
    "generate": {
        "max-new-tokens": (),
        "temperature": ("0", str(2**31), str(2**63)),
        "top-p": (),
        "top-k": ("0",),
        "seed": ("0", str(2**31)),
        "token-ids": ("0",),
        "stop": ("0",),
    },
    "compare": {
        "seq-len": (),
        "batch": (),
        "seed": ("0", str(2**31), str(2**63)),
        "logits": ("0", str(2**31), str(2**63)),
        "index-scores": ("0", str(2**31), str(2**63)),
        "topk-equal": ("0",),
        "experts-equal": ("0",),
        "layers": ("0",),
    },
    "convert": {"max-memory": (str(2**31), str(2**63)), "max-shard": (str(2**31), str(2**63))},
    "verify": {},
}
TEXT = {"token_ids", "stop", "layers", "max_memory", "max_shard"}  # numbers written as text
COMMANDS = {"generate": Generate, "compare": Compare, "convert": Convert, "verify": Verify}
CASES = [
    (command, option, value, value in taken)
    for command, options in TAKEN.items()
    for option, taken in options.items()
    for value in VALUES
]


class Loading(Exception):
    """Takes the place of reading the weights."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    config = tiny(
        vocab_size=64, d_model=64, d_ff=64, d_expert=32, n_layers=2, n_heads=2, q_lora_rank=32, index_topk=8,
        max_seq_len=256, n_mtp_layers=0, param_dtype="float32", fp8=None,
    )  # fmt: skip
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    write_hf(folder, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes), config)
    return folder


@pytest.fixture(autouse=True)
def loading_is_noticed(monkeypatch) -> None:
    def load(*args, **kwargs):
        raise Loading

    monkeypatch.delenv("DSA_JAX_TRACEBACK", raising=False)
    monkeypatch.setattr("dsa_jax.checkpoint.load_params", load)
    monkeypatch.setattr("dsa_jax.checkpoint.compare_tensors.compare_tensors", load)
    monkeypatch.setattr(Request, "open", load)


def command_line(command: str, checkpoint: Path, option: str, value: str) -> list[str]:
    needed = {
        "generate": {"--model": str(checkpoint), "--token-ids": "1,2", "--max-new-tokens": "2"},
        "compare": {"--model": str(checkpoint)},
        "convert": {},
    }[command]
    if option == "layers":
        needed["--checkpoint"] = str(checkpoint)
    places = [str(checkpoint), str(checkpoint.parent / "out")] if command == "convert" else []
    given = needed | {f"--{option}": value}
    return [command, *places, *(f"{name}={value}" for name, value in given.items())]


def test_the_table_names_every_number_option() -> None:
    for name, command in COMMANDS.items():
        numbers = {
            field.name
            for field in dataclasses.fields(command)
            if field.type in (int, float, "int", "float") or field.name in TEXT
        }
        assert {option.replace("-", "_") for option in TAKEN[name]} == numbers, name


@pytest.mark.parametrize(("command", "option", "value", "taken"), CASES)
def test_a_number_is_taken_or_refused_before_weights_are_read(
    checkpoint, capsys, command, option, value, taken
) -> None:
    arguments = command_line(command, checkpoint, option, value)
    if taken:
        with pytest.raises(Loading):
            main(arguments)
        return
    try:
        assert main(arguments) == 2
    except SystemExit as stopped:  # tyro's own check of a whole number
        assert stopped.code == 2
        return
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dsa-jax: ")
    number = str(float(value)) if value in ("nan", "inf", "-inf") else value
    assert number.lstrip("-") in line or str(float(value)) in line, line


@pytest.mark.parametrize("value", VALUES)
def test_a_dry_run_checks_the_same_sizes(checkpoint, value) -> None:
    for option in ("max-memory", "max-shard"):
        arguments = [*command_line("convert", checkpoint, option, value), "--dry-run"]
        if value in TAKEN["convert"][option]:
            with pytest.raises(Loading):
                main(arguments)
        else:
            assert main(arguments) == 2


@pytest.mark.parametrize("text", ["3-1", "0-9223372036854775808", "10000"])
def test_ranges_of_layers_rise_and_end(checkpoint, capsys, text) -> None:
    assert main(command_line("compare", checkpoint, "layers", text)) == 2
    assert f"--layers takes ranges that rise, up to layer 9999, got {text!r}" in capsys.readouterr().err


def test_the_smallest_settings_still_keep_the_best_token() -> None:
    logits = jnp.asarray([[1.0, 30.0, -5.0]])
    for sampling in (Sampling(temperature=1e-6), Sampling(temperature=1.0, top_p=1e-300)):
        left = truncate(logits, sampling)
        assert int(jnp.argmax(left)) == 1 and not jnp.isnan(left).any()
    for temperature in (1e-7, 1e-300, float("nan"), float("inf"), -1.0):
        with pytest.raises(ValueError, match="temperature must be 0"):
            Sampling(temperature=temperature)


BROKEN = {
    "pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "is a Git LFS pointer",
    ),
    "other version": (b'{"version": "9.0", "model": {"type": "New"}}', "is not a tokenizer that tokenizers"),
    "cut short": (b'{"version": "1.0", "mod', "is not a tokenizer that tokenizers"),
    "empty": (b"", "is not a tokenizer that tokenizers"),
    "bytes": (b"\xff\xfe\x00", "is not a tokenizer that tokenizers"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_tokenizer_that_cannot_be_read_gives_its_path_and_the_remedy(
    checkpoint, tmp_path, capsys, kind
) -> None:
    content, message = BROKEN[kind]
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    (folder / "tokenizer.json").write_bytes(content)
    (tmp_path / "text").write_text("text")
    generate = ["generate", "--model", str(folder), "--max-new-tokens", "2"]
    compare = ["compare", "--model", str(folder), "--text", str(tmp_path / "text")]
    for arguments in ([*generate, "--prompt", "text"], compare):
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{folder / 'tokenizer.json'} {message}" in line and "download the file again" in line

    with pytest.raises(Loading):  # token ids need no tokenizer
        main([*generate, "--token-ids", "1,2"])
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith("note: ") and message in note and note.endswith("new tokens are printed as ids")


def test_a_text_that_is_not_utf8_is_named(checkpoint, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("dsa_jax.commands.compare.read_tokenizer", lambda folder: object())
    (tmp_path / "text").write_bytes(b"\xff\xfe")
    assert main(["compare", "--model", str(checkpoint), "--text", str(tmp_path / "text")]) == 2
    assert f"{tmp_path / 'text'} is not UTF-8 text" in capsys.readouterr().err
