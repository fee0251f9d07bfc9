"""The tasks are deterministic, well formed, and solvable from the row alone."""

import dataclasses

import numpy as np
import pytest

from train.data.synthetic import AssociativeRecall, MultiQueryRecall, Needles, accuracy


class Text:
    """Rows of 40 tokens, ids 100 ... 199, in two documents; the last row is half padding."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        tokens = np.random.default_rng(index).integers(100, 200, 40).astype(np.int32)
        segment_ids = np.repeat(np.array([1, 2], np.int32), 20)
        targets = np.append(tokens[1:], -1).astype(np.int32)
        targets[19] = -1
        if index == 4:
            segment_ids[20:], targets[20:], tokens[20:] = 0, -1, 2
        return {"tokens": tokens, "targets": targets, "segment_ids": segment_ids}


ASSOCIATIVE = AssociativeRecall(seq_len=48, n_keys=12, n_values=5, n_pairs=8, seed=3)
MULTI_QUERY = MultiQueryRecall(seq_len=64, n_keys=12, n_values=5, n_pairs=8, seed=3)
NEEDLES = Needles(
    Text(), seq_len=96, n_needles=4, first_key=100, n_keys=50, first_value=150, n_values=50, seed=3
)
RANDOM_HAYSTACK = dataclasses.replace(NEEDLES, haystack=None)
JOINED = dataclasses.replace(NEEDLES, n_values=8, first_fact=200)  # 50 keys x 8 values are 200 ... 599
TASKS = [
    ASSOCIATIVE,
    dataclasses.replace(ASSOCIATIVE, n_queries=3),
    MULTI_QUERY,
    NEEDLES,
    RANDOM_HAYSTACK,
    JOINED,
]


def answer(task, tokens: list[int], t: int) -> int:
    """The value for the key tokens[t], found in tokens[: t + 1] as a causal model must."""
    key, before = tokens[t], tokens[:t]
    if isinstance(task, AssociativeRecall):
        first = 2 + (key - task.first_query) * task.n_values
        (pair,) = [token for token in before if first <= token < first + task.n_values]
        return task.first_answer + pair - first
    if isinstance(task, MultiQueryRecall):
        return tokens[before.index(key) + 1]
    assert tokens[t - 1] == task.query_marker
    if task.first_fact is not None:
        (fact,) = [
            f for f in before if f in task.facts and (f - task.first_fact) // 8 == key - task.first_key
        ]
        assert tokens[tokens.index(fact) - 1] == task.marker
        return task.first_value + (fact - task.first_fact) % 8
    (marker_at,) = [s for s, token in enumerate(before) if token == task.marker and tokens[s + 1] == key]
    return tokens[marker_at + 2]


@pytest.mark.parametrize("task", TASKS)
def test_every_row_can_be_solved_by_looking_back(task):
    for index in range(50):
        row = task[index]
        asked = np.flatnonzero(row["targets"] >= 0)
        assert len(asked) == task.asked
        predictions = np.zeros_like(row["tokens"])
        predictions[asked] = [answer(task, row["tokens"].tolist(), t) for t in asked]
        assert accuracy(predictions, row["targets"]) == 1.0


@pytest.mark.parametrize("task", TASKS)
def test_rows_are_one_full_segment_and_targets_are_the_next_token(task):
    for index in range(20):
        row = task[index]
        assert {name: (array.shape, array.dtype) for name, array in row.items()} == {
            name: ((task.seq_len,), np.int32) for name in ("tokens", "targets", "segment_ids")
        }
        assert (row["segment_ids"] == 1).all()
        asked = np.flatnonzero(row["targets"] >= 0)
        np.testing.assert_array_equal(row["targets"][asked], row["tokens"][asked + 1])


@pytest.mark.parametrize("task", TASKS)
def test_a_row_depends_only_on_seed_and_index(task):
    again, other = dataclasses.replace(task), dataclasses.replace(task, seed=4)
    later_first = again[7], again[0]
    for index, row in zip((7, 0), later_first, strict=True):
        np.testing.assert_array_equal(row["tokens"], task[index]["tokens"])
    assert (task[0]["tokens"] != other[0]["tokens"]).any()
    assert (task[0]["tokens"] != task[1]["tokens"]).any()


@pytest.mark.parametrize("task", TASKS)
def test_iteration_ends_after_the_last_row(task):
    assert len(list(dataclasses.replace(task, rows=3))) == 3
    with pytest.raises(IndexError, match="0 ... 2, got -1"):
        dataclasses.replace(task, rows=3)[-1]


@pytest.mark.parametrize("task", [ASSOCIATIVE, MULTI_QUERY])
def test_ids_stay_below_vocab_size_and_padding_is_not_used(task):
    tokens = np.concatenate([task[index]["tokens"] for index in range(200)])
    assert tokens.min() == 1 and tokens.max() == task.vocab_size - 1


@pytest.mark.parametrize("task", [ASSOCIATIVE, MULTI_QUERY, NEEDLES, JOINED])
def test_the_shortest_row_holds_exactly_the_task(task):
    least = {AssociativeRecall: 1 + 8 + 16, MultiQueryRecall: 1 + 16 + 16, Needles: 12 + 12 + 1}[type(task)]
    least -= 4 if task is JOINED else 0
    assert (dataclasses.replace(task, seq_len=least)[0]["targets"] >= 0).sum() == task.asked
    with pytest.raises(ValueError, match=f"at least {least}, got {least - 1}"):
        dataclasses.replace(task, seq_len=least - 1)


@pytest.mark.parametrize("task", [ASSOCIATIVE, MULTI_QUERY])
def test_answers_are_close_to_uniform_so_guessing_does_not_help(task):
    targets = np.concatenate([task[index]["targets"] for index in range(300)])
    _, counts = np.unique(targets[targets >= 0], return_counts=True)
    assert len(counts) == task.n_values
    assert counts.max() / counts.sum() < 1.2 / task.n_values


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("task", [NEEDLES, RANDOM_HAYSTACK, JOINED])
def test_the_needle_asked_for_is_at_the_given_depth(depth, task):
    task = dataclasses.replace(task, depth=depth)
    for index in range(20):
        row, where = task[index], task.answers(index)
        np.testing.assert_array_equal(where["positions"], np.flatnonzero(row["targets"] >= 0))
        assert abs(where["depths"][0] - depth) <= 0.5001 / task.n_text
        (t,) = where["positions"]
        value_at = t - where["distances"][0]
        assert answer(task, row["tokens"].tolist(), t) == row["targets"][t]
        marker_at = value_at - task.needle_tokens + 1
        assert row["tokens"][marker_at] == task.marker
        if task.first_fact is None:
            assert row["tokens"][marker_at + 1] == row["tokens"][t]
        text_before = marker_at - task.needle_tokens * (row["tokens"][:marker_at] == task.marker).sum()
        assert text_before == round(depth * task.n_text)


def test_random_needles_cover_all_depths():
    where = [NEEDLES.answers(index) for index in range(100)]
    depths = np.concatenate([answers["depths"] for answers in where])
    counts, _ = np.histogram(depths, bins=4, range=(0, 1))
    assert counts.min() > 0.2 * len(depths)
    for index, answers in enumerate(where):
        row = NEEDLES[index]
        values = row["tokens"][answers["positions"] - answers["distances"]]
        np.testing.assert_array_equal(values, row["targets"][answers["positions"]])


def test_the_haystack_is_read_without_padding_and_wraps_around():
    text = Text()
    pure = dataclasses.replace(NEEDLES, n_queries=1, n_needles=1)
    rows = [text[index % 5]["tokens"][: 20 if index % 5 == 4 else 40] for index in range(4, 10)]
    read = pure[4]["tokens"].tolist()
    at = read.index(pure.marker)
    kept = np.array(read[:at] + read[at + 3 : -3])
    np.testing.assert_array_equal(kept, np.concatenate(rows)[: pure.n_text])


def test_text_loss_adds_the_haystack_targets_that_still_follow():
    task = dataclasses.replace(NEEDLES, text_loss=True)
    for index in range(10):
        row, plain = task[index], NEEDLES[index]
        np.testing.assert_array_equal(row["tokens"], plain["tokens"])
        at = np.flatnonzero(row["targets"] >= 0)
        np.testing.assert_array_equal(row["targets"][at], row["tokens"][at + 1])
        asked = plain["targets"] >= 0
        np.testing.assert_array_equal(row["targets"][asked], plain["targets"][asked])
        # Without targets: ends of documents and of joined rows, the token before each needle, needles, queries.
        assert len(at) >= task.n_text - 5 - task.n_needles - 1 + task.asked
        markers = np.flatnonzero(row["tokens"] == task.marker)
        for at in markers:
            assert (row["targets"][max(at - 1, 0) : at + 3] == -1).all()


def test_accuracy_counts_positions_with_a_target():
    targets = np.array([[-1, 2, -1], [0, 1, -1]])
    predictions = np.array([[2, 2, 2], [0, 0, -1]])
    assert accuracy(predictions, targets) == pytest.approx(2 / 3)
    assert accuracy(np.eye(3)[predictions], targets) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="all targets are -1"):
        accuracy(predictions, np.full_like(targets, -1))
    with pytest.raises(ValueError, match=r"\(2, 3\), or one axis more, got \(2, 2\)"):
        accuracy(predictions[:, :2], targets)


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        (ASSOCIATIVE, {"n_pairs": 13}, "n_pairs must not exceed n_keys, got 13 > 12"),
        (ASSOCIATIVE, {"n_queries": 9}, "1 ... n_pairs = 8, got 9"),
        (MULTI_QUERY, {"n_values": 0}, "n_values must be positive, got 0"),
        (MULTI_QUERY, {"n_queries": 0}, "1 ... n_pairs = 8, got 0"),
        (NEEDLES, {"depth": 1.5}, "depth must be in 0 ... 1, got 1.5"),
        (NEEDLES, {"depth": 0.5, "n_queries": 2}, "n_queries must be 1, got 2"),
        (NEEDLES, {"marker": 4}, "must differ, both are 4"),
        (NEEDLES, {"marker": 120}, "marker must not be a key, a value or a fact, got 120"),
        (JOINED, {"query_marker": 599}, "query_marker must not be a key, a value or a fact, got 599"),
        (NEEDLES, {"first_key": -1}, "not negative, got -1"),
        (RANDOM_HAYSTACK, {"text_loss": True}, "give a haystack, got None"),
    ],
)
def test_contradicting_sizes_are_refused_with_both_values(task, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(task, **changes)


def test_a_haystack_that_contains_a_marker_is_refused():
    task = dataclasses.replace(NEEDLES, first_key=300, first_value=400, marker=int(Text()[0]["tokens"][3]))
    with pytest.raises(ValueError, match="must not contain marker"):
        task[0]


def test_a_haystack_that_contains_a_fact_is_refused():
    with pytest.raises(ValueError, match=r"must not contain facts range\(120, 520\)"):
        dataclasses.replace(JOINED, first_fact=120)[0]
