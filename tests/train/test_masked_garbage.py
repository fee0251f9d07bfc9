"""Padding, tokens without a target and other documents reach no loss, gradient or evaluation, whatever they hold."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax.cache import init_cache
from dsa_jax.generate import generate
from dsa_jax.transformer import Transformer
from tests.train.small import CONFIG, T, batch_of, initial
from train.config import dense, indexer_warmup, sparse
from train.loss import cross_entropy, loss_fn
from train.measure.evaluate import indexer_quality, score

GARBAGE = (np.nan, np.inf, 1e38)
ABSENT = CONFIG.vocab_size - 1  # a token of padding only
STAGES = {
    "dense": dense(1, lr=1e-3),
    "indexer_warmup": indexer_warmup(1),
    "sparse": sparse(1, lr=1e-3, index_lr=1e-3),
}


def padded_batch():
    """Padding before, between and behind the documents; its tokens occur nowhere else."""
    batch = batch_of([12, 20], [9, 13])
    tokens, ids = jnp.minimum(batch["tokens"], ABSENT - 1), batch["segment_ids"]
    ids = ids.at[1, :4].set(0).at[0, 12].set(0)
    targets = jnp.where(ids == 0, -1, jnp.minimum(batch["targets"], ABSENT - 1)).at[0, 11].set(-1)
    return {"tokens": jnp.where(ids == 0, ABSENT, tokens), "targets": targets, "segment_ids": ids}


def params_with(value):
    """Embeddings of the token that is never read, of the model and of the MTP layer."""
    tree = initial()["params"]
    mtp = tree["mtp"] | {"embed": tree["mtp"]["embed"].at[ABSENT].set(value)}
    return {"params": tree | {"embed": tree["embed"].at[ABSENT].set(value), "mtp": mtp}}


def assert_same(found, expected):
    for (path, x), y in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))
        assert np.isfinite(x).all(), path


@pytest.mark.parametrize(
    ("stage", "form"), [("dense", "mha"), ("indexer_warmup", "mqa"), ("sparse", "mha"), ("sparse", "mqa")]
)
def test_padding_reaches_no_loss_and_no_gradient(stage, form):
    config = dataclasses.replace(CONFIG, attention_form=form)
    of_batch = functools.partial(loss_fn, batch=padded_batch(), config=config, stage=STAGES[stage])
    run = jax.jit(jax.value_and_grad(of_batch, has_aux=True))
    expected = run(params_with(0.0))
    for value in GARBAGE:
        assert_same(run(params_with(value)), expected)


def test_padding_reaches_no_evaluation():
    batch, config = padded_batch(), dataclasses.replace(CONFIG, index_topk=4)

    def run(value):
        return [
            dataclasses.asdict(score(params_with(value), config, [batch], attention))
            for attention in ("dense", "sparse")
        ] + indexer_quality(params_with(value), config, batch)

    assert len(run(0.0)) == 2 + 3  # two layers and that of MTP
    for value in GARBAGE:
        assert_same(run(value), run(0.0))


def test_a_token_without_target_reaches_no_gradient_of_the_head():
    rng = np.random.default_rng(0)
    hidden, head = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((2, 7, 6), (6, 11)))
    targets = jnp.asarray(rng.integers(11, size=(2, 7)), jnp.int32).at[:, ::3].set(-1)
    run = jax.jit(jax.value_and_grad(cross_entropy, (0, 1)))
    without = (targets < 0)[..., None]
    expected = run(jnp.where(without, 0.0, hidden), head, targets)
    for value in GARBAGE:
        assert_same(run(jnp.where(without, value, hidden), head, targets), expected)


@pytest.mark.parametrize("form", ["mha", "mqa"])
def test_a_broken_document_leaves_the_other_documents_as_they_were(form):
    batch = padded_batch()
    broken = jnp.asarray(batch["segment_ids"] == 2) & (jnp.arange(2)[:, None] == 0)
    tokens = jnp.where(broken, ABSENT, batch["tokens"])
    model = Transformer(dataclasses.replace(CONFIG, attention_form=form))
    run = jax.jit(lambda p: model.apply(p, tokens, segment_ids=batch["segment_ids"])[0])
    expected, found = run(params_with(0.0)), run(params_with(np.nan))
    np.testing.assert_array_equal(found[~broken], expected[~broken])
    assert np.isnan(found[broken]).all()  # and its own results are not hidden


@pytest.mark.parametrize("form", ["mha", "mqa"])
def test_slots_that_nothing_was_written_to_reach_no_logits(form):
    config = dataclasses.replace(CONFIG, attention_form=form, max_seq_len=2 * T)
    batch, model = padded_batch(), Transformer(config)

    @jax.jit
    def run(cache):
        logits = []
        for part in (slice(0, 20), slice(20, T)):
            ids = batch["segment_ids"][:, part]
            found, cache, _ = model.apply(initial(), batch["tokens"][:, part], segment_ids=ids, cache=cache)
            logits.append(jnp.where((ids != 0)[..., None], found, 0.0))
        return logits

    empty = init_cache(config, 2, T + 8)
    expected = run(empty)
    for value in GARBAGE:
        keys = {name: jnp.full_like(x, value) for name, x in empty.keys._asdict().items()}
        assert_same(run(dataclasses.replace(empty, **keys)), expected)


def test_the_padding_of_prompts_reaches_no_generated_token():
    """Prompts are padded with token 0, which occurs in none of them and is never generated."""
    rng = np.random.default_rng(3)
    prompts = [rng.integers(1, CONFIG.vocab_size, n).tolist() for n in (3, 15, 9)]

    def run(value):
        tree = initial()["params"]
        tree = tree | {"embed": tree["embed"].at[0].set(value), "head": tree["head"].at[:, 0].set(0.0)}
        return generate({"params": tree}, CONFIG, prompts, max_new_tokens=4, prefill_chunk=4)

    expected = run(0.0)
    assert not any(0 in row for row in expected)
    for value in GARBAGE:
        assert run(value) == expected
