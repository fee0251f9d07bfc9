"""index_kl against autodiff of the written-out formula in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import blocking
from pallas_kernels.index_kl import dense

SCALE = 0.3


def naive(q, k, weights, logits, seen, token_weights):
    """Everything of size T x S x heads at once. logits [B T N S], seen [B T S]."""
    a = jax.nn.softmax(jnp.where(seen[:, :, None], logits, -1e30), axis=-1)
    p = jax.lax.stop_gradient(a.sum(axis=2) / a.sum(axis=(2, 3))[..., None])
    scores = jnp.einsum("BTIS,BTI->BTS", jax.nn.relu(jnp.einsum("BTIJ,BSJ->BTIS", q, k)), weights)
    log_q = jax.nn.log_softmax(jnp.where(seen, scores, -1e30), axis=-1)
    kl = jnp.where(seen & (p > 0), p * (jnp.log(jnp.where(p > 0, p, 1.0)) - log_q), 0.0).sum(axis=-1)
    return (token_weights * jnp.where(seen.any(-1), kl, 0.0)).sum()


def case(rng, dtype, B=2, T=11, S=11, I=4, J=8, N=3, P=6, R=4, C=7, K=5):
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)  # noqa: E731
    arrays = dict(
        q=normal(B, T, I, J), k=normal(B, S, J), weights=normal(B, T, I),
        q_nope=normal(B, T, N, P), q_rope=normal(B, T, N, R), k_nope=normal(B, S, N, P), k_rope=normal(B, S, R),
        q_latent=normal(B, T, N, C), latent=normal(B, S, C),
        token_weights=jnp.asarray(rng.uniform(0, 1, (B, T)), dtype),
    )  # fmt: skip
    start = jnp.asarray(np.repeat([[0, 4]], [4, 7], axis=1).repeat(B, 0), jnp.int32)  # two documents
    stop = jnp.arange(1, T + 1)[None].repeat(B, 0).at[0, 3].set(0)  # and a query without keys
    indices = np.full((B, T, K), -1, np.int32)
    for b in range(B):
        for t in range(T):
            visible = rng.permutation(np.arange(int(start[b, t]), int(stop[b, t])))[: K - t % 2]
            indices[b, t, K - len(visible) :] = visible  # -1 first
    return arrays, start, stop, jnp.asarray(indices)


def lse_of(logits, seen):
    return jax.nn.logsumexp(jnp.where(seen[:, :, None], logits, -jnp.inf), axis=-1)


def dense_form(a, start, stop):
    """The dense loss of (q, k, weights), and naive's logits and seen."""
    slots = jnp.arange(a["k"].shape[1])
    seen = (start[..., None] <= slots) & (slots < stop[..., None])
    logits = jnp.einsum("BTNP,BSNP->BTNS", a["q_nope"], a["k_nope"])
    logits = SCALE * (logits + jnp.einsum("BTNR,BSR->BTNS", a["q_rope"], a["k_rope"]))
    attention = (a["q_nope"], a["q_rope"], a["k_nope"], a["k_rope"], lse_of(logits, seen), start, stop)
    ours = lambda *indexer: pk.index_kl_dense(*indexer, *attention, a["token_weights"], scale=SCALE)  # noqa: E731
    return ours, logits, seen


def selected_form(a, indices):
    """The same of the loss over the listed keys."""
    seen = (indices[..., None] == jnp.arange(a["k"].shape[1])).any(axis=2)
    logits = jnp.einsum("BTNC,BSC->BTNS", a["q_latent"], a["latent"])
    logits = SCALE * (logits + jnp.einsum("BTNR,BSR->BTNS", a["q_rope"], a["k_rope"]))
    attention = (a["q_latent"], a["q_rope"], a["latent"], a["k_rope"], lse_of(logits, seen), indices)
    ours = lambda *indexer: pk.index_kl_selected(*indexer, *attention, a["token_weights"], scale=SCALE)  # noqa: E731
    return ours, logits, seen


def check_against_autodiff(a, ours, logits, seen):
    """Loss, kl and gradients of one of the forms; query [0, 3] has no keys."""

    def loss(*indexer):
        total, kl = ours(*indexer)
        return 2.0 * total, kl

    def expected(*indexer):
        return 2.0 * naive(*indexer, logits, seen, a["token_weights"])

    indexer = (a["q"], a["k"], a["weights"])
    total, kl = loss(*indexer)
    (total_again, kl_again), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*indexer)
    for found in (total, total_again):
        np.testing.assert_allclose(found, expected(*indexer), rtol=1e-12)
    for found, of_naive in zip(gradients, jax.grad(expected, (0, 1, 2))(*indexer), strict=True):
        np.testing.assert_allclose(found, of_naive, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(kl, kl_again, rtol=1e-12)
    assert kl[0, 3] == 0 and (kl >= -1e-12).all()
    assert (gradients[0][0, 3] == 0).all() and (gradients[2][0, 3] == 0).all()


@pytest.mark.parametrize("block", [None, 2])
@pytest.mark.parametrize("form", ["dense", "selected"])
def test_loss_and_gradients_equal_autodiff_in_float64(form, block, monkeypatch):
    if block:
        monkeypatch.setattr("pallas_kernels.index_kl.selected.block_size", lambda *_: block)
        monkeypatch.setattr(blocking, "block_size", lambda *_: block)
    with jax.enable_x64(True):
        a, start, stop, indices = case(np.random.default_rng(0), np.float64)
        given = dense_form(a, start, stop) if form == "dense" else selected_form(a, indices)
        check_against_autodiff(a, *given)


@pytest.mark.parametrize(
    ("numbers", "wide", "of_attention", "of_indexer"),
    [(8, 4, (4, 3), (4, 2)), (6, 128, (4, 2), (4, 2)), (2, 128, (2, 1), (2, 1))],
)
def test_few_heads_at_a_time_give_what_all_heads_give(numbers, wide, of_attention, of_indexer, monkeypatch):
    """Blocks of 2 or 4 of 11 queries, each with several groups of the 6 heads and of the 4 index heads."""
    B, S = 2, 11
    monkeypatch.setattr(blocking, "WORKSPACE_BYTES", 4 * B * S * 4 * numbers)  # of 4 queries
    monkeypatch.setattr(dense, "WIDE", wide)
    per_query = lambda heads: B * S * 4 * (2 + 2 * heads)  # noqa: E731
    assert blocking.block_of_heads(11, 6, wide, per_query) == of_attention
    assert blocking.block_of_heads(11, 4, wide, per_query) == of_indexer
    with jax.enable_x64(True):
        a, start, stop, _ = case(np.random.default_rng(4), np.float64, B=B, N=6)
        check_against_autodiff(a, *dense_form(a, start, stop))


@pytest.mark.parametrize(
    ("S", "heads", "block_of_heads"),
    [(2**17, 128, (128, 1)), (2**15, 128, (128, 4)), (2**12, 128, (128, 32)), (64, 3, (64, 3))],
)
def test_a_block_has_many_queries_however_long_the_row(S, heads, block_of_heads):
    assert blocking.block_of_heads(S, heads, dense.WIDE, lambda n: S * 4 * (2 + 2 * n)) == block_of_heads


def test_a_silent_indexer_is_uniform():
    """With weights of 0 the loss must be log(number of keys) - H(p): a mask or scale error shows here."""
    a, _, _, _ = case(np.random.default_rng(1), np.float32)
    start, stop = jnp.zeros((2, 11), jnp.int32), jnp.arange(1, 12)[None].repeat(2, 0)
    seen = jnp.arange(11) < stop[..., None]
    logits = jnp.einsum("BTNP,BSNP->BTNS", a["q_nope"], a["k_nope"])
    logits = SCALE * (logits + jnp.einsum("BTNR,BSR->BTNS", a["q_rope"], a["k_rope"]))
    p = jax.nn.softmax(jnp.where(seen[:, :, None], logits, -jnp.inf), axis=-1).mean(axis=2)
    entropy = -jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0).sum(axis=-1)
    attention = (a["q_nope"], a["q_rope"], a["k_nope"], a["k_rope"], lse_of(logits, seen), start, stop)
    _, kl = pk.index_kl_dense(a["q"], a["k"], 0 * a["weights"], *attention, a["token_weights"], scale=SCALE)
    np.testing.assert_allclose(kl, jnp.log(stop) - entropy, atol=1e-5)


def test_nothing_but_the_indexer_has_a_gradient():
    a, start, stop, _ = case(np.random.default_rng(2), np.float32)
    lse = jnp.zeros((2, 11, 3))

    def loss(q_nope, q_rope, k_nope, k_rope, lse, token_weights):
        args = (a["q"], a["k"], a["weights"], q_nope, q_rope, k_nope, k_rope, lse, start, stop, token_weights)
        return pk.index_kl_dense(*args, scale=SCALE)[0]

    inputs = (a["q_nope"], a["q_rope"], a["k_nope"], a["k_rope"], lse, a["token_weights"])
    for gradient in jax.grad(loss, range(6))(*inputs):
        assert (gradient == 0).all()


def test_contradicting_shapes_are_refused():
    a, start, stop, _ = case(np.random.default_rng(3), np.float32)
    args = (a["q"], a["k"], a["weights"], a["q_nope"], a["q_rope"], a["k_nope"], a["k_rope"])
    with pytest.raises(ValueError, match=r"token_weights must have shape \(2, 11\).*got \(2, 10\)"):
        pk.index_kl_dense(*args, jnp.zeros((2, 11, 3)), start, stop, a["token_weights"][:, 1:], scale=1.0)
    with pytest.raises(ValueError, match=r"key_stop must have shape \(2, 11\).*got \(1, 11\)"):
        pk.index_kl_dense(*args, jnp.zeros((2, 11, 3)), start, stop[:1], a["token_weights"], scale=1.0)


@pytest.mark.parametrize("T", [1024, 4096])
def test_workspace_does_not_grow_with_the_number_of_queries(T):
    S, I, J, N, P, R = T, 16, 128, 16, 128, 64
    shape = lambda *s, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(s, dtype)  # noqa: E731
    bounds = shape(1, T, dtype=jnp.int32)
    f32 = functools.partial(shape, dtype=jnp.float32)
    arguments = (
        shape(1, T, I, J), shape(1, S, J), f32(1, T, I), shape(1, T, N, P), shape(1, T, N, R), shape(1, S, N, P),
        shape(1, S, R), f32(1, T, N), bounds, bounds, f32(1, T),
    )  # fmt: skip
    gradient = jax.jit(jax.grad(lambda *a: pk.index_kl_dense(*a, scale=1.0)[0], (0, 1, 2)))
    memory = gradient.lower(*arguments).compile().memory_analysis()
    moved = memory.argument_size_in_bytes + memory.output_size_in_bytes
    # [T S I] float32 alone would be 1 GiB at T = 4096; CPU multiplies bfloat16 through float32 copies
    assert memory.temp_size_in_bytes - 3 * moved < 4 * blocking.WORKSPACE_BYTES
