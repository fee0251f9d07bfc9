"""Properties of the whole model: forms, caches, padding, packing, gradients, logits, sizes."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax.cache import init_cache
from dsa_jax.checkpoint.names import leaf_shapes
from dsa_jax.config import deepseek_v32, glm5, tiny
from dsa_jax.moe import swiglu
from dsa_jax.norm import rms_norm
from dsa_jax.transformer import Transformer
from tests.dsa_jax.models import config_of, params_of, tokens_of

CONFIG = config_of("tiny_calm")  # index_topk 16
PARAMS = params_of("tiny_calm")
TOKENS = tokens_of("tiny_calm")


@functools.cache
def compiled(**switches):
    model = Transformer(dataclasses.replace(CONFIG, **switches))
    return jax.jit(lambda p, t, s, cache: model.apply(p, t, segment_ids=s, cache=cache)[:2])


def logits_of(tokens, *, segment_ids=None, **switches):
    ids = jnp.ones_like(tokens) if segment_ids is None else segment_ids
    return np.asarray(compiled(**switches)(PARAMS, tokens, ids, None)[0])


def cached_run(tokens, chunks, *, segment_ids=None, capacity=80, **switches):
    """The same tokens in pieces through one cache."""
    run = compiled(**switches)
    cache, pieces, begin = init_cache(CONFIG, tokens.shape[0], capacity), [], 0
    ids = jnp.ones_like(tokens) if segment_ids is None else segment_ids
    for size in chunks:
        logits, cache = run(PARAMS, tokens[:, begin : begin + size], ids[:, begin : begin + size], cache)
        pieces.append(np.asarray(logits))
        begin += size
    return np.concatenate(pieces, axis=1), cache


def close(a, b, atol=2e-5):
    np.testing.assert_allclose(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("prompt", [1, 15, 16, 17, 40])
def test_decode_equals_the_full_forward(prompt):
    """Prompts below, at, just above and far above index_topk, then one token per step past it."""
    cached, cache = cached_run(TOKENS, [prompt] + [1] * (64 - prompt))
    close(cached, logits_of(TOKENS))
    assert cache.length.tolist() == [64, 64]


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63])
def test_a_prefix_gives_a_prefix(length):
    close(logits_of(TOKENS[:, :length]), logits_of(TOKENS)[:, :length])


@pytest.mark.parametrize("chunks", [[21] * 3 + [1], [16, 48]])
@pytest.mark.parametrize("form", ["mha", "mqa"])
def test_chunked_prefill_equals_one_shot(chunks, form):
    close(cached_run(TOKENS, chunks, attention_form=form)[0], logits_of(TOKENS))


def test_padded_rows_equal_the_rows_alone():
    long, short = TOKENS[:1], TOKENS[1:, :37]
    pad = jnp.zeros((1, 64 - 37), jnp.int32)
    alone = logits_of(short)
    right = jnp.concatenate([long, jnp.concatenate([short, pad], axis=1)])
    left = jnp.concatenate([long, jnp.concatenate([pad, short], axis=1)])
    for tokens, where in ((right, slice(0, 37)), (left, slice(27, 64))):
        ids = jnp.ones_like(tokens).at[1].set(0).at[1, where].set(1)
        padded = logits_of(tokens, segment_ids=ids)
        close(padded[:1], logits_of(long))
        close(padded[1:, where], alone)
        assert np.isfinite(padded).all()
        cached, cache = cached_run(tokens, [20, 20, 24], segment_ids=ids)
        close(cached[1:, where], alone)
        # a call with nothing but padding takes no slot
        assert cache.length.tolist() == [64, 37 if where.start == 0 else 64 - 20]


def test_decoding_continues_after_padding_on_either_side():
    short, next_tokens = TOKENS[:, :30], TOKENS[:, 30:36]
    pad = jnp.zeros((2, 10), jnp.int32)
    one, zero = jnp.ones_like(short), jnp.zeros_like(pad)
    expected = logits_of(TOKENS[:, :36])[:, 30:]
    for tokens, ids in (
        (jnp.concatenate([short, pad], 1), jnp.concatenate([one, zero], 1)),
        (jnp.concatenate([pad, short], 1), jnp.concatenate([zero, one], 1)),
    ):
        tokens = jnp.concatenate([tokens, next_tokens], axis=1)
        ids = jnp.concatenate([ids, jnp.ones_like(next_tokens)], axis=1)
        cached, _ = cached_run(tokens, [40] + [1] * 6, segment_ids=ids)
        close(cached[:, 40:], expected)


@pytest.mark.parametrize("form", [pytest.param("mha", marks=pytest.mark.slow), "mqa"])
def test_packed_documents_equal_the_documents_alone(form):
    lengths = [20, 1, 43]
    ids = np.repeat([3, 1, 3], lengths)  # equal ids that are not adjacent are two documents
    ids = jnp.asarray(ids)[None].repeat(2, 0)
    packed = logits_of(TOKENS, segment_ids=ids, attention_form=form)
    cached, _ = cached_run(TOKENS, [30, 34], segment_ids=ids, attention_form=form)
    begin = 0
    for length in lengths:
        alone = logits_of(TOKENS[:, begin : begin + length])
        close(packed[:, begin : begin + length], alone)
        close(cached[:, begin : begin + length], alone)
        begin += length


def test_sparse_equals_dense_when_topk_covers_all_keys_and_only_then():
    dense = logits_of(TOKENS, attention="dense")
    close(logits_of(TOKENS, index_topk=64), dense)
    close(logits_of(TOKENS, index_topk=100, attention_form="mqa"), dense)
    sparse = logits_of(TOKENS)
    close(sparse[:, :16], dense[:, :16])  # no query sees more than index_topk keys
    assert np.abs(sparse[:, 16:] - dense[:, 16:]).max() > 0.01


@pytest.mark.parametrize("query_block", [7, pytest.param(48, marks=pytest.mark.slow)])
def test_query_block_changes_memory_only(query_block):
    for form in ("mha", "mqa"):
        close(logits_of(TOKENS, query_block=query_block, attention_form=form), logits_of(TOKENS))


def lm_loss(model, params, tokens):
    log_p = jax.nn.log_softmax(model.apply(params, tokens)[0][:, :-1])
    return -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1).mean()


def test_gradients_agree_between_forms_blocks_and_remat():
    def gradient(**switches):
        model = Transformer(dataclasses.replace(CONFIG, **switches))
        return jax.jit(jax.grad(lambda p: lm_loss(model, p, TOKENS)))(PARAMS)

    reference = gradient(attention_form="mha")
    for switches in (
        dict(attention_form="mqa", query_block=24),
        dict(attention_form="mqa", remat="layer"),
        dict(attention_form="mha", query_block=24, remat="layer"),
    ):
        for a, b in zip(jax.tree.leaves(reference), jax.tree.leaves(gradient(**switches)), strict=True):
            assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(a) + 1e-12


def test_no_gradient_of_the_loss_reaches_the_indexer():
    model = Transformer(CONFIG)
    gradient = jax.jit(jax.grad(lambda p: lm_loss(model, p, TOKENS)))(PARAMS)["params"]
    for stack in ("dense_layers", "moe_layers"):
        assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient[stack]["attn"]["indexer"]))
    assert np.abs(gradient["moe_layers"]["attn"]["wq_a"]).max() > 0
    assert (gradient["moe_layers"]["ffn"]["gate_bias"] == 0).all()  # updated by its own rule, not by the loss


def test_bfloat16_stays_near_float32():
    reference, rounded = logits_of(TOKENS), logits_of(TOKENS, dtype="bfloat16")
    assert np.linalg.norm(rounded - reference) < 0.05 * np.linalg.norm(reference)


def test_the_feed_forward_part_reads_the_sum_before_it_is_rounded():
    """Only the residual stream is rounded to bfloat16, as in DeepSeek's code."""
    model = Transformer(dataclasses.replace(CONFIG, dtype="bfloat16"))
    run = jax.jit(lambda p: model.apply(p, TOKENS, capture=("input", "attn", "ffn"))[2])
    aux, layer = run(PARAMS), jax.tree.map(lambda x: x[0], PARAMS["params"]["dense_layers"])
    residual = aux["input"][0].astype(jnp.float32) + aux["attn"][0].astype(jnp.float32)

    @jax.jit
    def feed_forward(residual):
        h = rms_norm(residual, layer["ffn_norm"], CONFIG.norm_eps, jnp.bfloat16)
        return swiglu(h, layer["ffn"]).astype(jnp.float32)

    found = aux["ffn"][0].astype(jnp.float32)
    close_to_sum, to_rounded = (
        float(jnp.abs(found - feed_forward(x)).mean())
        for x in (residual, residual.astype(jnp.bfloat16).astype(jnp.float32))
    )
    assert 10 * close_to_sum < to_rounded


def test_a_row_that_outgrows_its_cache_gets_nan_logits():
    ids = jnp.ones_like(TOKENS).at[1, 40:].set(0)
    logits, _ = cached_run(TOKENS, [64], segment_ids=ids, capacity=48)
    assert np.isnan(logits[0]).all() and np.isfinite(logits[1]).all()


def test_mtp_with_its_own_cache_equals_one_call():
    model = Transformer(CONFIG)
    hidden = jax.jit(model.apply)(PARAMS, TOKENS)[2]["hidden"][:, :-1]
    run = jax.jit(lambda p, h, t, cache: model.apply(p, h, t, cache=cache, method="mtp_logits")[:2])
    whole, _ = run(PARAMS, hidden, TOKENS[:, 1:], None)
    cache, begin = init_cache(CONFIG, 2, 64, n_layers=1), 0
    for size in (30, 1, 32):
        tokens = TOKENS[:, 1 + begin : 1 + begin + size]
        part, cache = run(PARAMS, hidden[:, begin : begin + size], tokens, cache)
        close(part, whole[:, begin : begin + size])
        begin += size


@pytest.mark.parametrize("mtp_hidden", ["post_norm", "pre_norm"])
def test_logits_are_the_product_of_the_final_hidden_state_and_the_head(mtp_hidden):
    model, tree = Transformer(dataclasses.replace(CONFIG, mtp_hidden=mtp_hidden)), PARAMS["params"]
    apply = jax.jit(model.apply, static_argnames=("return_logits", "method"))
    logits, _, _ = apply(PARAMS, TOKENS)
    none, _, aux = apply(PARAMS, TOKENS, return_logits=False)
    assert none is None
    close(aux["final_hidden"] @ tree["head"], logits)

    inputs = aux["hidden"][:, :-1], TOKENS[:, 1:]
    logits, _, _ = apply(PARAMS, *inputs, method="mtp_logits")
    none, _, aux = apply(PARAMS, *inputs, method="mtp_logits", return_logits=False)
    assert none is None
    close(aux["final_hidden"] @ tree["mtp"]["head"], logits)


@pytest.mark.parametrize("return_logits", [True, False])
def test_without_logits_nothing_of_the_head_is_computed(return_logits):
    """The result of no operation has the vocabulary as its last axis; with logits, that of one has."""
    model = Transformer(dataclasses.replace(CONFIG, vocab_size=509))  # a size that nothing else has
    params = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    program = jax.jit(functools.partial(model.apply, return_logits=return_logits)).lower(params, TOKENS)
    assert bool(re.search(r"\[(\d+,)*509\]", program.compile().as_text())) == return_logits


def test_a_row_that_outgrows_its_cache_gets_a_nan_hidden_state():
    ids = jnp.ones_like(TOKENS).at[1, 40:].set(0)
    run = jax.jit(functools.partial(Transformer(CONFIG).apply, return_logits=False))
    _, _, aux = run(PARAMS, TOKENS, segment_ids=ids, cache=init_cache(CONFIG, 2, 48))
    assert jnp.isnan(aux["final_hidden"][0]).all() and jnp.isfinite(aux["final_hidden"][1]).all()


def test_capture_and_inputs_are_checked():
    model = Transformer(CONFIG)
    with pytest.raises(ValueError, match=r"capture must name some of .* got \['scores'\]"):
        model.apply(PARAMS, TOKENS, capture=("scores",))
    with pytest.raises(ValueError, match="needs attention='sparse', got 'dense'"):
        Transformer(dataclasses.replace(CONFIG, attention="dense")).apply(
            PARAMS, TOKENS, capture=("topk_indices",)
        )
    with pytest.raises(ValueError, match="logits_at needs return_logits=True, got False"):
        model.apply(PARAMS, TOKENS, logits_at=jnp.zeros(2, jnp.int32), return_logits=False)
    with pytest.raises(ValueError, match=r"tokens must be integers of shape \[B T\], got float32"):
        model.apply(PARAMS, TOKENS.astype(jnp.float32))
    with pytest.raises(
        ValueError, match=r"segment_ids must have the shape of tokens \(2, 64\), got \(2, 63\)"
    ):
        model.apply(PARAMS, TOKENS, segment_ids=TOKENS[:, 1:])
    with pytest.raises(ValueError, match="the cache holds 3 rows, tokens have 2"):
        model.apply(PARAMS, TOKENS, cache=init_cache(CONFIG, 3, 64))
    with pytest.raises(ValueError, match="cache capacity must be within"):
        init_cache(CONFIG, 1, CONFIG.max_seq_len + 1)
    with pytest.raises(ValueError, match="n_mtp_layers=1, got n_mtp_layers=0"):
        Transformer(dataclasses.replace(CONFIG, n_mtp_layers=0)).apply(
            PARAMS, jnp.zeros((2, 64, 256)), TOKENS, method="mtp_logits"
        )


def abstract_params(config):
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    return jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens)["params"]


def test_the_released_model_has_exactly_its_parameters():
    """685,396,921,376 published for V3.2-Exp, less the 41,591,584 scales of its FP8 blocks."""
    leaves = jax.tree.leaves(abstract_params(deepseek_v32()))
    assert sum(leaf.size for leaf in leaves) == 685_396_921_376 - 41_591_584
    assert deepseek_v32().param_count() == 685_396_921_376 - 41_591_584


@pytest.mark.parametrize(
    "config", [deepseek_v32(), glm5(), tiny(), tiny(mtp_shared_embeddings=True, n_dense_layers=0)]
)
def test_parameters_have_the_shapes_of_the_table_of_names(config):
    flat = jax.tree_util.tree_flatten_with_path(abstract_params(config))[0]
    ours = {tuple(key.key for key in path): leaf.shape for path, leaf in flat}
    assert ours == leaf_shapes(config)
    always = {path for path, leaf in flat if leaf.dtype == jnp.float32}
    assert len(always) == len(flat) or config.param_dtype != "float32"
