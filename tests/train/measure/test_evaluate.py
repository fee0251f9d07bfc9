"""Evaluation against NumPy float64 on the model's own q and k, one query at a time, written from the equations."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as kernels
from dsa_jax.cache import place
from dsa_jax.config import tiny
from dsa_jax.indexer import index_queries
from dsa_jax.mla import compress, expand, query_heads
from dsa_jax.norm import rms_norm
from dsa_jax.rope import rotation
from dsa_jax.transformer import Transformer
from pallas_kernels.keys import visible
from tests.oracle import operations as oracle
from train.data.synthetic import Needles
from train.measure import evaluate

T, K = 48, 6
CONFIG = tiny(
    vocab_size=64, d_model=32, n_layers=2, n_heads=3, d_ff=32, d_expert=16, q_lora_rank=16, kv_lora_rank=16,
    qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=8, index_n_heads=4, index_head_dim=16, index_topk=K,
    dtype="float32",
)  # fmt: skip


@functools.cache
def params():
    shapes = jax.eval_shape(Transformer(CONFIG).init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), shapes)


@functools.cache
def batch():
    """First row: two documents and padding. Second row: one document."""
    rng = np.random.default_rng(0)
    segment_ids = np.ones((2, T), np.int32)
    segment_ids[0] = np.repeat([1, 2, 0], [20, 23, 5])
    targets = rng.integers(0, CONFIG.vocab_size, (2, T)).astype(np.int32)
    targets[0, 19], targets[0, 42:] = -1, -1
    tokens = rng.integers(0, CONFIG.vocab_size, (2, T)).astype(np.int32)
    arrays = {"tokens": tokens, "targets": targets, "segment_ids": segment_ids}
    return {name: jnp.asarray(array) for name, array in arrays.items()}


@jax.jit
def layer_inputs(params, tokens, ids):
    """[3 B T D]: of the two main layers, and of the MTP layer's block, as its output less what it added."""
    model = Transformer(CONFIG)
    _, _, main = model.apply(params, tokens, segment_ids=ids, capture=("out",))
    following, parts = jnp.roll(tokens, -1, axis=1), ("attn", "ffn", "out")
    _, _, mtp = model.apply(
        params, main["hidden"], following, segment_ids=ids, capture=parts, method="mtp_logits"
    )
    embedded = params["params"]["embed"][tokens]
    return jnp.stack([embedded, main["out"][0], mtp["out"] - mtp["ffn"] - mtp["attn"]])


@jax.jit
def projected(x, parameters, ids):
    """The operands of one layer's attention and indexer, and the interval of keys that each query may see."""
    placement, _ = place(ids, None)
    rope = rotation(placement.positions, CONFIG)
    attn = parameters["attn"]
    h = rms_norm(x, parameters["attn_norm"], CONFIG.norm_eps)
    queries, keys = compress(h, rope, placement, attn, CONFIG)
    attention = (*query_heads(queries, attn, CONFIG), expand(keys.latent, attn, CONFIG)[0], keys.k_rope)
    q, weights = index_queries(queries, attn["indexer"], CONFIG)
    return attention, (q, keys.index_k, weights, placement.key_start, placement.key_stop)


@functools.cache
def expected(layer):
    """The numbers of one layer, and its KL for every recency tau, by loops over rows and queries."""
    tree, ids = params()["params"], batch()["segment_ids"]
    parameters = [tree["dense_layers"], tree["moe_layers"], tree["mtp"]["layer"]][layer]
    if layer < CONFIG.n_layers:
        parameters = jax.tree.map(lambda leaf: leaf[0], parameters)
    x = layer_inputs(params(), batch()["tokens"], ids)[layer]
    attention, index = projected(x, {name: parameters[name] for name in ("attn", "attn_norm")}, ids)
    q_nope, q_rope, k_nope, k_rope = (np.asarray(x, np.float64) for x in attention)
    scores, (key_start, key_stop) = oracle.index_scores(*index), np.asarray(index[-2:])
    ids = np.asarray(ids)

    rows, recency = [], []
    for b in range(2):
        for t in range(T):
            start, stop = key_start[b, t], key_stop[b, t]
            is_last = t == T - 1 or ids[b, t + 1] != ids[b, t]
            if stop - start <= K or (layer == CONFIG.n_layers and is_last):
                continue
            logits = np.einsum("NP,SNP->NS", q_nope[b, t], k_nope[b, start:stop])
            logits = CONFIG.softmax_scale * (logits + q_rope[b, t] @ k_rope[b, start:stop].T)
            a = np.exp(logits - logits.max(axis=1, keepdims=True))
            p = (a / a.sum(axis=1, keepdims=True)).mean(axis=0)
            kl_to = lambda w, p=p: (p * np.log(p / (w / w.sum()))).sum()  # noqa: E731
            index = scores[b, t, start:stop]
            chosen, best = np.argsort(-index, kind="stable")[:K], np.argsort(-p, kind="stable")[:K]
            rows.append(
                dict(
                    kl=kl_to(np.exp(index)), entropy=-(p * np.log(p)).sum(), kl_uniform=kl_to(np.ones_like(p)),
                    recall=p[chosen].sum(), recall_oracle=p[best].sum(), recall_recency=p[-K:].sum(),
                    recall_random=K / len(p), overlap=len(set(chosen) & set(best)) / K,
                )
            )  # fmt: skip
            distance = np.arange(len(p))[::-1]
            taus = evaluate.RECENCY_TAUS.astype(np.float64)
            recency.append([kl_to(np.exp(-distance / tau)) for tau in taus])
    means = {name: np.mean([row[name] for row in rows]) for name in rows[0]}
    curve = dict(zip(evaluate.RECENCY_TAUS, np.mean(recency, axis=0), strict=True))
    return means | dict(queries=len(rows), layer=layer), curve


@functools.cache
def quality(**changes):
    return evaluate.indexer_quality(params(), dataclasses.replace(CONFIG, **changes), batch())


class TestIndexerQuality:
    @pytest.mark.parametrize("layer", range(3))
    def test_equals_float64_numpy(self, layer):
        ours, (means, recency) = dict(quality()[layer]), expected(layer)
        assert recency[ours.pop("recency_tau")] == pytest.approx(min(recency.values()), rel=1e-5)
        assert ours.pop("kl_recency") == pytest.approx(min(recency.values()), rel=2e-4)
        assert set(ours) == set(means)
        for name, value in means.items():
            np.testing.assert_allclose(ours[name], value, rtol=2e-4, err_msg=name)

    def test_does_not_depend_on_the_block_size(self, monkeypatch):
        monkeypatch.setattr(evaluate, "block_size", lambda *_: 7)
        for ours, whole in zip(quality(query_block=9), quality(), strict=True):
            assert ours == pytest.approx(whole, rel=1e-4)

    def test_no_choice_is_better_than_the_oracle(self):
        for row in quality():
            assert row["recall_oracle"] > max(row["recall"], row["recall_recency"], row["recall_random"])

    def test_the_kl_equals_the_index_loss(self):
        parameters = jax.tree.map(lambda leaf: leaf[0], params()["params"]["dense_layers"])
        ids = batch()["segment_ids"]
        x = layer_inputs(params(), batch()["tokens"], ids)[0]
        attention, (q, k, weights, *bounds) = projected(
            x, {name: parameters[name] for name in ("attn", "attn_norm")}, ids
        )
        q_nope, q_rope, k_nope, k_rope = attention
        logits = jnp.einsum("BTNP,BSNP->BTNS", q_nope, k_nope) + jnp.einsum("BTNR,BSR->BTNS", q_rope, k_rope)
        seen = visible(*bounds, T)[:, :, None]
        lse = jax.nn.logsumexp(jnp.where(seen, logits * CONFIG.softmax_scale, -jnp.inf), axis=-1)
        _, kl = kernels.index_kl_dense(
            q, k, weights, *attention, lse, *bounds, jnp.ones((2, T)), scale=CONFIG.softmax_scale
        )
        counted = bounds[1] - bounds[0] > K
        assert quality()[0]["kl"] == pytest.approx(float(kl[counted].mean()), rel=1e-4)

    def test_an_indexer_without_weights_is_uniform(self):
        blind = jax.tree_util.tree_map_with_path(
            lambda path, x: x * 0 if "weights_proj" in str(path) else x, params()
        )
        for row in evaluate.indexer_quality(blind, CONFIG, batch()):
            assert row["kl"] == pytest.approx(row["kl_uniform"], rel=1e-4)

    def test_documents_without_a_selection_have_no_numbers(self):
        short = jnp.broadcast_to(1 + jnp.arange(T) // K, (2, T))
        assert evaluate.indexer_quality(params(), CONFIG, batch() | {"segment_ids": short}) == []


class TestScore:
    def logits(self, attention):
        model = Transformer(dataclasses.replace(CONFIG, attention=attention))
        logits, _, _ = jax.jit(model.apply)(params(), batch()["tokens"], segment_ids=batch()["segment_ids"])
        return np.asarray(logits, np.float64)

    @pytest.mark.parametrize("attention", ["dense", "sparse"])
    def test_equals_numpy(self, attention):
        logits, targets = self.logits(attention), batch()["targets"]
        counted = targets >= 0
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nats = -np.take_along_axis(log_p, np.maximum(targets, 0)[..., None], -1)[..., 0]
        ours = evaluate.score(params(), CONFIG, [batch()], attention)
        assert ours.n_targets == counted.sum()
        assert ours.cross_entropy == pytest.approx(nats[counted].mean(), rel=1e-5)
        assert ours.accuracy == pytest.approx((logits.argmax(-1) == targets)[counted].mean())

    def test_every_target_counts_the_same_in_any_batch(self):
        few = jnp.arange(T) < 5
        parts = [batch() | {"targets": jnp.where(kept, batch()["targets"], -1)} for kept in (few, ~few)]
        assert evaluate.cross_entropy(params(), CONFIG, parts) == pytest.approx(
            evaluate.cross_entropy(params(), CONFIG, [batch()]), rel=1e-5
        )

    def test_the_attention_is_the_one_named(self):
        ce = {name: evaluate.cross_entropy(params(), CONFIG, [batch()], name) for name in ("dense", "sparse")}
        assert ce["dense"] != ce["sparse"]
        assert evaluate.cross_entropy(params(), CONFIG, [batch()]) == ce["sparse"]

    def test_batches_without_a_target_are_refused(self):
        empty = batch() | {"targets": jnp.full((2, T), -1)}
        with pytest.raises(ValueError, match="at least one target"):
            evaluate.cross_entropy(params(), CONFIG, [empty])


class TestNeedleAccuracy:
    """The model is replaced by one that finds the needle if it is within the reach of its attention."""

    needles = Needles(None, 40, 2, first_key=8, n_keys=6, first_value=20, n_values=6)

    def far_sighted(self, params, config, batches, attention=None):
        reach = {"dense": 10**6, "sparse": 36}[attention]
        right = []
        for rows in batches:
            for tokens, targets in zip(rows["tokens"], rows["targets"], strict=True):
                (asked,) = np.flatnonzero(targets >= 0)
                key = tokens[asked]
                places = [
                    t for t in range(asked - 1) if tokens[t] == self.needles.marker and tokens[t + 1] == key
                ]
                right.append(places[0] > asked - reach and tokens[places[0] + 2] == targets[asked])
        return evaluate.Score(n_targets=len(right), cross_entropy=0.0, accuracy=float(np.mean(right)))

    def test_one_needle_per_row_at_each_length_and_depth(self, monkeypatch):
        monkeypatch.setattr(evaluate, "score", self.far_sighted)
        table = evaluate.needle_accuracy(
            params(), CONFIG, self.needles, (32, 64), (0.0, 1.0), rows=5, tokens_per_batch=128
        )
        assert [(row["length"], row["depth"], row["rows"]) for row in table] == [
            (32, 0.0, 8), (32, 1.0, 8), (64, 0.0, 6), (64, 1.0, 6),
        ]  # fmt: skip
        assert [row["accuracy_dense"] for row in table] == [1.0] * 4
        assert [row["accuracy_sparse"] for row in table] == [1.0, 1.0, 0.0, 1.0]

    def test_accuracy_is_the_score_of_the_rows(self):
        (row,) = evaluate.needle_accuracy(params(), CONFIG, self.needles, (T,), (0.5,), rows=2)
        task = dataclasses.replace(self.needles, seq_len=T, depth=0.5)
        rows = {name: jnp.stack([task[0][name], task[1][name]]) for name in batch()}
        for attention in ("dense", "sparse"):
            expected = evaluate.score(params(), CONFIG, [rows], attention).accuracy
            assert row[f"accuracy_{attention}"] == expected
