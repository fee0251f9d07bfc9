"""What was recorded when data were made is compared where they are read: tokenizer, checksums, sizes, a run's data."""

import dataclasses
import json
import logging
import shutil

import numpy as np
import pytest

from dsa_jax.checkpoint import convert, write_hf
from tests.train.small import CONFIG, initial, small_run
from train import __main__ as command
from train.config import Source, contradictions, dense, from_json, to_json
from train.data.prepare import prepare
from train.data.provenance import check_tokenizers, with_data_recorded
from train.data.rows import PackedRows
from train.data.sources import mixture
from train.export import carried_files
from train.initial import checked
from train.trainer import train

STAGE = dense(2, lr=1e-3)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint with a tokenizer, and data prepared with it and with one of their own."""
    folder = tmp_path_factory.mktemp("made")
    corpus = folder / "corpus"
    corpus.mkdir()
    for n in range(40):
        (corpus / f"{n}.txt").write_text(f"the document of number {n} says {n * n} times hello\n" * 3)
    prepare([str(corpus)], folder / "own", vocab_size=280, validation_share=0.1)
    other = folder / "other"
    other.mkdir()
    for n in range(8):
        (other / f"{n}.txt").write_text(f"quite another text {n}, and other merges of its letters\n" * 9)
    prepare([str(other)], folder / "theirs", vocab_size=280, validation_share=0.5)

    checkpoint = folder / "checkpoint"
    write_hf(checkpoint, initial(), CONFIG)
    whole = json.loads((folder / "theirs" / "tokenizer.json").read_text())
    # As another program would write it: other bytes, and parts that decide no id.
    whole["truncation"] = {"max_length": 5, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (checkpoint / "tokenizer.json").write_text(json.dumps(whole))
    prepare(
        [str(corpus)], folder / "same", tokenizer_file=checkpoint / "tokenizer.json", validation_share=0.1
    )
    convert(checkpoint, folder / "orbax")
    return folder


def run_on(folder, data, **changes):
    source = Source(kind="text", folder=str(folder / data))
    model = dataclasses.replace(CONFIG, vocab_size=300)
    start = {"init_from": str(folder / "checkpoint")} | changes
    return small_run(STAGE, model=model, data=(source,), **start)


@pytest.mark.parametrize("kind", ["checkpoint", "orbax"])
def test_data_of_another_tokenizer_than_the_checkpoints_are_refused(made, kind):
    with pytest.raises(ValueError) as error:
        check_tokenizers(run_on(made, "own", init_from=str(made / kind)))
    for words in (
        "was made with another tokenizer than that of the checkpoint",
        "`python -m train.data.prepare SOURCE --out FOLDER --tokenizer", "tokenizer.json`", "--run.any-tokenizer",
    ):  # fmt: skip
        assert words in str(error.value)


def test_the_command_refuses_them_in_one_line_and_writes_nothing(made, tmp_path, capsys):
    arguments = ["nano_cpu", "--init-from", str(made / "checkpoint"), "--folder", str(tmp_path / "run")]
    arguments += [
        "--run.data.0.kind",
        "text",
        "--run.data.0.folder",
        str(made / "own"),
        "--run.seq-len",
        "32",
    ]
    assert command.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m train: ") and "another tokenizer" in line
    assert not (tmp_path / "run").exists()


def test_who_knows_better_may_say_so_and_the_run_remembers(made, monkeypatch):
    found = []
    monkeypatch.setattr("train.trainer.train", lambda run, folder: found.append(run))
    monkeypatch.setitem(command.RUNS, "small", lambda: run_on(made, "own", init_from=None))
    arguments = ["small", "--init-from", str(made / "checkpoint"), "--run.any-tokenizer"]
    assert command.main(arguments) == 0
    assert to_json(found[0])["any_tokenizer"] is True
    assert checked(found[0]).any_tokenizer


def test_the_same_tokenizer_in_other_bytes_is_the_same(made):
    assert (made / "same" / "tokenizer.json").read_bytes() != (
        made / "checkpoint" / "tokenizer.json"
    ).read_bytes()
    checked(run_on(made, "same"))
    checked(run_on(made, "theirs"))


def test_a_checkpoint_without_a_tokenizer_is_reported(made, tmp_path, caplog):
    shutil.copytree(made / "checkpoint", tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    with caplog.at_level(logging.WARNING):
        check_tokenizers(run_on(made, "own", init_from=str(tmp_path / "bare")))
    assert "has no tokenizer.json, so nothing says whether its token ids are those of" in caplog.text


def test_more_ids_than_the_model_has_are_refused_whatever_the_option_says(made):
    run = run_on(made, "own", any_tokenizer=True)
    with pytest.raises(ValueError, match="vocab_size must hold the ids of its data, got 42 < 2"):
        mixture(dataclasses.replace(run, model=CONFIG), "train")


# -- every field of a prepared folder


def flip_a_byte(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def change_manifest(**changes):
    def change(folder):
        file = folder / "manifest.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def save(name, change):
    return lambda folder: np.save(folder / name, change(np.load(folder / name)))


TAMPERED = {
    "a flipped bit of a token": (lambda f: flip_a_byte(f / "train.npy"), r"train\.npy is no longer what"),
    "fewer tokens": (save("train.npy", lambda x: x[:-3]), r"train\.npy is no longer what"),
    "no tokens": (lambda f: (f / "train.npy").unlink(), r"train\.npy, what .* wrote, is missing"),
    "the other split's tokens": (lambda f: shutil.copy(f / "validation.npy", f / "train.npy"), "no longer what"),
    "another dtype than stated": (change_manifest(dtype="uint32"), "tokens of uint32, has [0-9]+ of uint16"),
    "one start less": (save("train_starts.npy", lambda x: x[:-1]), "over the manifest's [0-9]+ documents"),
    "a start behind the end": (save("train_starts.npy", lambda x: np.append(x[:-1], 10**9)), "must rise from 0"),
    "starts out of order": (save("train_starts.npy", lambda x: x[::-1]), "must rise from 0"),
    "no starts": (lambda f: (f / "train_starts.npy").unlink(), "the arrays of train cannot be read"),
    "starts cut short": (lambda f: (f / "train_starts.npy").write_bytes(b"\x93NUM"), "cannot be read"),
    "a manifest cut short": (lambda f: (f / "manifest.json").write_text('{"splits": '), "lacks what"),
    "a manifest without splits": (lambda f: (f / "manifest.json").write_text("{}"), "lacks what"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), TAMPERED.values(), ids=TAMPERED)
def test_a_folder_that_contradicts_its_manifest_is_refused(made, tmp_path, change, message):
    folder = tmp_path / "data"
    shutil.copytree(made / "own", folder)
    PackedRows(str(folder), "train", 8)
    change(folder)
    with pytest.raises(ValueError, match=message):
        PackedRows(folder, "train", 8)


# -- a run and its data


def test_a_run_cannot_be_resumed_with_other_data_in_the_same_folder(made, tmp_path):
    shutil.copytree(made / "own", tmp_path / "own")
    run = run_on(tmp_path, "own", init_from=None)
    stored = to_json(with_data_recorded(run))
    assert from_json(stored).data[0].data_sha256 and not contradictions(stored, with_data_recorded(run))
    shutil.rmtree(tmp_path / "own")
    shutil.copytree(made / "same", tmp_path / "own")
    (difference,) = contradictions(stored, with_data_recorded(run))
    assert difference.startswith("data[0].data_sha256: then ")


def test_a_run_records_its_data_where_it_can_be_found(made, tmp_path, monkeypatch):
    class Enough(Exception):
        pass

    def stop(*_, **__):
        raise Enough

    monkeypatch.setattr("train.trainer._Records", stop)
    with pytest.raises(Enough):
        train(run_on(made, "own", init_from=None), tmp_path / "run")
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["data"][0]["data_sha256"] == with_data_recorded(run_on(made, "own")).data[0].data_sha256


@pytest.mark.parametrize("replaced", [True, False], ids=["data prepared anew", "another tokenizer.json"])
def test_an_export_takes_no_tokenizer_but_that_of_the_data_it_was_trained_on(made, tmp_path, replaced):
    shutil.copytree(made / "own", tmp_path / "own")
    run = with_data_recorded(run_on(tmp_path, "own", init_from=None))
    assert carried_files(run) == (tmp_path / "own" / "tokenizer.json",)
    shutil.copy(made / "same" / "tokenizer.json", tmp_path / "own")
    if replaced:
        shutil.copy(made / "same" / "manifest.json", tmp_path / "own")
    with pytest.raises(
        ValueError, match="no longer holds the data" if replaced else "is no longer the tokenizer"
    ):
        carried_files(run)


# -- values that are replaced later are not what is checked


def test_rows_are_checked_against_the_checkpoints_model_not_the_named_runs(made, monkeypatch, capsys):
    """nano's own index_topk is 256 and the checkpoint's 8."""
    found = []
    monkeypatch.setattr("train.trainer.train", lambda run, folder: found.append(checked(run)))
    start = ["nano", "--init-from", str(made / "checkpoint"), "--run.any-tokenizer", "--run.data.0.folder",
             str(made / "own"), "--run.data.1.folder", str(made / "own")]  # fmt: skip
    assert command.main([*start, "--run.seq-len", "24"]) == 0
    assert (found[0].seq_len, found[0].model.index_topk) == (24, CONFIG.index_topk)
    for seq_len, message in (("8", "8 >= 8"), ("33", "33 > 32")):
        assert command.main([*start, "--run.seq-len", seq_len]) == 2
        assert message in capsys.readouterr().err


def test_a_size_of_the_model_that_the_checkpoint_decides_is_refused(made, monkeypatch, capsys):
    found = []
    monkeypatch.setattr("train.trainer.train", lambda run, folder: found.append(run))
    start = ["nano_cpu", "--init-from", str(made / "checkpoint")]
    assert command.main([*start, "--run.model.index-topk", "16"]) == 2
    assert "--run.model.index-topk would have no effect; leave it out" in capsys.readouterr().err
    assert command.main([*start, "--run.model.query-block", "16"]) == 0 and found[0].model.query_block == 16
