"""Every file that a user hands to the training side, damaged in every way: one sentence with its path, exit code 2.

Prepared folders and a run's own files are tested where they are read.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import pytest

import train.__main__ as training
import train.aot as aot
import train.data.prepare as preparing
from dsa_jax.checkpoint import write_hf
from tests.damage import ANY_FILE, BINARY, JSON, cases, copied, damage, the_one_line
from tests.train.data.test_prepare import END, TEXTS, glm_tokenizer
from tests.train.small import CONFIG, initial

Command = Callable[[Path], int]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    (root / "texts").mkdir()
    (root / "texts" / "a.txt").write_text(TEXTS[0])
    (root / "texts" / "b.py").write_text(TEXTS[1])
    (root / "texts" / "c.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS[2:]))
    named = {"eos_token": END}
    glm_tokenizer(
        root / "glm", tokenizer_config=named, special_tokens_map=named, generation_config={"eos_token_id": 0}
    )
    write_hf(root / "hf", jax.device_get(initial()), CONFIG)
    return root


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch) -> None:
    def start(*args, **kwargs):
        pytest.fail("the command went on")

    monkeypatch.delenv("DSA_JAX_TRACEBACK", raising=False)
    monkeypatch.setattr("train.trainer.train", start)
    monkeypatch.setattr("train.aot.command.introduce", start)
    monkeypatch.setattr("train.data.prepare.write_splits", start)


def prepare(root: Path) -> int:
    return preparing.main([str(root / "texts"), "--out", str(root / "out"), "--vocab-size", "300"])


def prepare_with_tokenizer(root: Path) -> int:
    tokenizer = root / "glm" / "tokenizer.json"
    return preparing.main(
        [str(root / "texts" / "c.jsonl"), "--out", str(root / "out"), "--tokenizer", str(tokenizer)]
    )


def init_from(root: Path) -> int:
    return training.main(["nano_cpu", "--init-from", str(root / "hf"), "--folder", str(root / "run")])


def aot_of(what: str) -> Command:
    needed = ["--topology", "h200:8", "--mode", "decode", "--seq-len", "64", "--batch", "8"]
    return lambda root: aot.main(["--config", str(root / what), *needed])


NAMING = set(JSON) - {"missing", "an object of other keys", "NaN"}  # these leave a file that names no token
FILES: dict[str, tuple[Iterable[str], dict[str, Command]]] = {
    "texts/a.txt": (set(ANY_FILE) - {"missing", "a folder"} | {"invalid UTF-8"}, {"prepare": prepare}),
    "texts/b.py": (set(ANY_FILE) - {"missing", "a folder"} | {"invalid UTF-8"}, {"prepare": prepare}),
    "texts/c.jsonl": (set(JSON) - {"missing", "a folder", "empty"}, {"prepare": prepare}),
    "glm/tokenizer.json": (JSON, {"prepare": prepare_with_tokenizer}),
    "glm/tokenizer_config.json": (NAMING, {"prepare": prepare_with_tokenizer}),
    "glm/special_tokens_map.json": (NAMING, {"prepare": prepare_with_tokenizer}),
    "glm/generation_config.json": (NAMING, {"prepare": prepare_with_tokenizer}),
    "hf/config.json": (JSON, {"train": init_from, "aot": aot_of("hf"), "aot of a file": aot_of("hf/config.json")}),
    "hf/model.safetensors": (set(BINARY) - set(ANY_FILE), {"train": init_from}),
}  # fmt: skip


@pytest.mark.parametrize(("file", "command", "kind"), cases(FILES))
def test_a_damaged_file_is_one_sentence_with_its_path(inputs, tmp_path, capsys, file, command, kind) -> None:
    root = copied(inputs, tmp_path / "root")
    damage(root / file, kind)
    assert FILES[file][1][command](root) == 2
    # Documents are named from the folder that was given: "texts/a.txt:1".
    path = Path(file) if kind != "without permission" and file.startswith("texts/") else root / file
    the_one_line(capsys, path)
    assert not (root / "out").exists() and not (root / "run").exists()


@pytest.mark.parametrize("empty", ["file", "folder", "absent"])
def test_sources_without_a_document_are_named(tmp_path, capsys, empty) -> None:
    source = tmp_path / "source.txt"
    if empty == "file":
        source.write_text("")
    elif empty == "folder":
        source.mkdir()
    assert preparing.main([str(source), "--out", str(tmp_path / "out")]) == 2
    the_one_line(capsys, source)


def test_init_from_a_folder_that_is_none_is_one_sentence(tmp_path, capsys) -> None:
    for place in ("absent", "empty"):
        assert training.main(["nano_cpu", "--init-from", str(tmp_path / place)]) == 2
        the_one_line(capsys, tmp_path / place)
        (tmp_path / "empty").mkdir(exist_ok=True)


def test_an_unknown_key_is_accepted_with_the_option_that_the_message_names(
    inputs, tmp_path, capsys, monkeypatch
) -> None:
    """By `python -m train` and `dsa-jax aot`, as by the commands of dsa_jax."""
    root = copied(inputs, tmp_path / "root")
    file = root / "hf" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sliding_window": 128}))
    started = []
    for work in ("train.trainer.train", "train.aot.command.introduce"):
        monkeypatch.setattr(
            work, lambda *args: started.append(args) or (_ for _ in ()).throw(ValueError("started"))
        )
    command = ["nano_cpu", "--init-from", str(root / "hf"), "--run.seq-len", "32"]
    needed = ["--topology", "h200:8", "--mode", "decode", "--seq-len", "64", "--batch", "8"]
    for main, arguments in (
        (training.main, command),
        (aot.main, ["--config", str(root / "hf"), *needed]),
        (aot.main, ["--config", str(file), *needed]),
    ):
        assert main(arguments) == 2
        assert "pass --ignore sliding_window" in the_one_line(capsys, file)
        assert not started
        assert main([*arguments, "--ignore", "sliding_window"]) == 2
        assert started.pop() and "started" in capsys.readouterr().err
