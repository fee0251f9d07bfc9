"""Rows and batches: each token once, targets within their document, and exact resuming."""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from train.data.rows import BatchIterator, Mixture, PackedRows, RowSource, batches
from train.data.synthetic import AssociativeRecall

BOS, EOS, PAD = 0, 1, 2
LENGTHS = (5, 2, 9, 3, 14, 4)


class Numbers:
    """Row i holds only the value ``first + i``."""

    def __init__(self, n_rows: int, first: int = 0, seq_len: int = 3) -> None:
        self.n_rows, self.first, self.seq_len = n_rows, first, seq_len

    def __len__(self) -> int:
        return self.n_rows

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        row = np.full(self.seq_len, self.first + index, np.int32)
        return {"tokens": row, "targets": row, "segment_ids": np.ones_like(row)}


def numbers(iterator, count: int | None = None) -> list[list[int]]:
    """The rows of ``Numbers`` in each batch."""
    return [batch["tokens"][:, 0].tolist() for batch in itertools.islice(iterator, count)]


def write(folder: Path, lengths: tuple[int, ...]) -> list[np.ndarray]:
    """Writes a prepared folder of documents with these lengths, including bos and eos; returns the documents."""
    folder.mkdir(exist_ok=True)
    ids = itertools.count(10)
    documents = [np.array([BOS, *itertools.islice(ids, length - 2), EOS], np.uint16) for length in lengths]
    np.save(folder / "train.npy", np.concatenate(documents))
    np.save(folder / "train_starts.npy", np.cumsum([0, *lengths[:-1]]))
    manifest = {
        "splits": {"train": {"tokens": sum(lengths)}},
        "vocab_size": 512,
        "special_tokens": {"bos": BOS, "eos": EOS, "pad": PAD},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return documents


def test_a_row_in_full(tmp_path):
    write(tmp_path, (4, 2, 3))
    first, second = PackedRows(tmp_path, "train", 5)
    assert first["tokens"].tolist() == [0, 10, 11, 1, 0]
    assert first["targets"].tolist() == [10, 11, 1, -1, 1]
    assert first["segment_ids"].tolist() == [1, 1, 1, 1, 2]
    assert second["tokens"].tolist() == [1, 0, 12, 1, PAD]
    assert second["targets"].tolist() == [-1, 12, 1, -1, -1]
    assert second["segment_ids"].tolist() == [1, 2, 2, 2, 0]


@pytest.mark.parametrize("seq_len", [1, 2, 4, 7, 16, 37, 38, 100])
def test_rows_hold_every_token_once_and_every_target_inside_its_document(tmp_path, seq_len):
    documents = write(tmp_path, LENGTHS)
    rows = list(PackedRows(tmp_path, "train", seq_len))
    assert len(rows) == -(-sum(LENGTHS) // seq_len)
    whole = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    for row in rows:
        assert {(array.shape, array.dtype) for array in row.values()} == {((seq_len,), np.dtype(np.int32))}
    n_real = sum(LENGTHS)
    np.testing.assert_array_equal(whole["tokens"][:n_real], np.concatenate(documents))
    following = np.concatenate([[*document[1:].astype(int), -1] for document in documents])
    np.testing.assert_array_equal(whole["targets"][:n_real], following)
    padding = {name: set(array[n_real:].tolist()) for name, array in whole.items()}
    assert n_real % seq_len == 0 or padding == {"tokens": {PAD}, "targets": {-1}, "segment_ids": {0}}


@pytest.mark.parametrize("seq_len", [4, 7, 16, 37])
def test_equal_segment_ids_in_a_row_mean_the_same_document(tmp_path, seq_len):
    write(tmp_path, LENGTHS)
    document = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    for index, row in enumerate(PackedRows(tmp_path, "train", seq_len)):
        mine = document[index * seq_len : (index + 1) * seq_len]
        np.testing.assert_array_equal(row["segment_ids"][: len(mine)], mine - mine[0] + 1)


def test_rows_stay_on_disk(tmp_path):
    write(tmp_path, LENGTHS)
    assert isinstance(PackedRows(tmp_path, "train", 4)._tokens, np.memmap)


def test_a_folder_that_is_not_a_prepared_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no manifest.json: make it with `python -m train.data.prepare"):
        PackedRows(tmp_path, "train", 4)
    write(tmp_path, LENGTHS)
    with pytest.raises(ValueError, match="must be one of train, got 'validation'"):
        PackedRows(tmp_path, "validation", 4)
    with pytest.raises(ValueError, match="seq_len must be positive, got 0"):
        PackedRows(tmp_path, "train", 0)
    with pytest.raises(IndexError, match="0 ... 9, got 10"):
        PackedRows(tmp_path, "train", 4)[10]
    np.save(tmp_path / "train.npy", np.zeros(5, np.uint16))
    with pytest.raises(ValueError, match="manifest's 37 tokens.*, has 5"):
        PackedRows(tmp_path, "train", 4)


def test_sources_and_iterators_satisfy_the_protocols(tmp_path):
    write(tmp_path, LENGTHS)
    for source in (PackedRows(tmp_path, "train", 4), AssociativeRecall(32, 8, 4, 4), Numbers(4)):
        assert isinstance(source, RowSource)
        assert isinstance(batches(source, 2, 0), BatchIterator)


def test_a_batch_stacks_rows(tmp_path):
    write(tmp_path, LENGTHS)
    rows = PackedRows(tmp_path, "train", 4)
    batch = next(batches(rows, 3, 0, shuffle=False))
    for name, array in batch.items():
        assert array.dtype == np.int32
        np.testing.assert_array_equal(array, np.stack([rows[index][name] for index in range(3)]))


def test_every_epoch_has_every_row_once_in_a_new_order():
    taken = np.array(numbers(batches(Numbers(12), 4, seed=5), 6)).reshape(2, 12)
    assert [sorted(epoch) for epoch in taken.tolist()] == [list(range(12))] * 2
    assert taken[0].tolist() != taken[1].tolist() != list(range(12))
    assert numbers(batches(Numbers(12), 4, seed=6), 3) != numbers(batches(Numbers(12), 4, seed=5), 3)


def test_a_given_number_of_epochs_ends():
    assert numbers(batches(Numbers(7), 3, 0, shuffle=False, epochs=1)) == [[0, 1, 2], [3, 4, 5]]
    assert len(numbers(batches(Numbers(7), 3, 0, epochs=3))) == 7
    with pytest.raises(ValueError, match="at least one batch of 8 rows, got 7 rows"):
        batches(Numbers(7), 8, 0, epochs=1)


MIXTURE = Mixture([Numbers(5), Mixture([Numbers(100, 100), Numbers(7, 500)], [1, 1])], [1, 3.0])


@pytest.mark.parametrize("source", [Numbers(10), MIXTURE], ids=["source", "mixture"])
@pytest.mark.parametrize("taken", [0, 1, 7])
def test_resumed_equals_uninterrupted(source, taken):
    uninterrupted = numbers(batches(source, 3, seed=1), 12)
    first = batches(source, 3, seed=1)
    numbers(first, taken)
    state = json.loads(json.dumps(first.get_state()))
    assert numbers(batches(source, 3, seed=1, start=state), 12 - taken) == uninterrupted[taken:]
    numbers(first, 2)
    first.set_state(state)
    assert numbers(first, 12 - taken) == uninterrupted[taken:]


@pytest.mark.parametrize("source", [Numbers(10), MIXTURE], ids=["source", "mixture"])
@pytest.mark.parametrize("parts", [((0, 1), (2, 3)), ((0, 2), (3, 1)), ((0,), (1, 2, 3), (1, 2, 3))])
def test_processes_together_have_the_rows_of_a_single_process(source, parts):
    alone = numbers(batches(source, 4, seed=1), 8)
    shares = [numbers(batches(source, 4, seed=1, rows=rows), 8) for rows in parts]
    for rows, share in zip(parts, shares, strict=True):
        assert share == [[batch[row] for row in rows] for batch in alone]
    # A state can be restored with any rows.
    one = batches(source, 4, seed=1)
    numbers(one, 3)
    assert numbers(batches(source, 4, seed=1, rows=parts[1], start=one.get_state()), 5) == shares[1][3:]


def test_a_mixture_keeps_its_shares_throughout_and_repeats_small_sources():
    rows = sum(numbers(batches(MIXTURE, 8, seed=2), 20), [])
    for first in range(0, len(rows), 40):
        kinds = np.digitize(rows[first : first + 40], [100, 500])
        assert np.bincount(kinds).tolist() == [10, 15, 15]
    small = [row for row in rows if row < 100]
    assert [sorted(small[first : first + 5]) for first in range(0, 40, 5)] == [list(range(5))] * 8


def test_text_and_tasks_mix_in_one_batch(tmp_path):
    write(tmp_path, LENGTHS)
    task = AssociativeRecall(seq_len=16, n_keys=8, n_values=4, n_pairs=3)
    mixture = Mixture([PackedRows(tmp_path, "train", 16), task], [0.5, 0.5])
    batch = next(batches(mixture, 8, seed=0))
    is_task = (batch["segment_ids"] == 1).all(1) & (batch["tokens"][:, 0] == 1)
    assert is_task.sum() == 4


def test_sizes_that_do_not_fit_are_refused_with_both_values():
    with pytest.raises(ValueError, match="batch must be positive, got 0"):
        batches(Numbers(10), 0, 0)
    with pytest.raises(ValueError, match=r"rows must be some of 0 ... 3, got \[2, 4\]"):
        batches(Numbers(10), 4, 0, rows=[2, 4])
    with pytest.raises(ValueError, match=r"rows must be some of 0 ... 3, got \[\]"):
        batches(Numbers(10), 4, 0, rows=[])
    with pytest.raises(ValueError, match="Numbers has none"):
        batches(Numbers(0), 4, 0)
    with pytest.raises(ValueError, match="2 sources and 1 weights"):
        Mixture([Numbers(2), Numbers(3)], [1.0])
    with pytest.raises(ValueError, match=r"positive and finite, got \(1.0, 0.0\)"):
        Mixture([Numbers(2), Numbers(3)], [1.0, 0.0])
    with pytest.raises(ValueError, match=r"rows of one length, got \[3, 4\]"):
        Mixture([Numbers(2), Numbers(3, seq_len=4)], [1.0, 1.0])


def test_without_grain_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ImportError, match="pip install grain"):
        batches(Numbers(4), 2, 0)
