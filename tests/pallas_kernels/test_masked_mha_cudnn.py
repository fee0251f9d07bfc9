"""masked_mha by cuDNN: how calls are made, with a stand-in for cuDNN on CPU, and the numbers on a Hopper GPU."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels.masked_mha import cudnn, xla
from pallas_kernels.masked_mha.xla import Operands, VisibleKeys

ON_GPU = jax.default_backend() == "gpu"
N, P, R, H = 2, 32, 16, 32
SCALE = (P + R) ** -0.5
KINDS = ("causal", "packed", "window", "beyond", "selected", "selected beyond", "chunk")


def make(kind, B=2, T=24, dtype=jnp.bfloat16, seed=0):
    """(operands, keys, gradient of out). In "packed" the last queries are padding without keys."""
    S = T + 16 if kind == "chunk" else T
    rng = np.random.default_rng(seed)
    t = np.arange(T)
    start, stop = np.zeros((B, T), int), np.tile(t + 1 + S - T, (B, 1))
    if kind == "packed":
        start[:], start[:, -3:], stop[:, -3:] = t // 5 * 5, T, 0
    if kind == "window":
        start = np.maximum(stop - 4, 0)
    if kind.endswith("beyond"):
        stop[:] = S
    indices = None
    if kind.startswith("selected"):
        indices = np.stack([[rng.permutation(S)[:7] for _ in t] for _ in range(B)])
        indices[:, ::6], indices[:, :, -1] = -1, -1
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)  # noqa: E731
    operands = Operands(
        normal(B, T, N, P), normal(B, T, N, R), normal(B, S, N, P), normal(B, S, R), normal(B, S, N, H)
    )
    return (
        operands,
        VisibleKeys(*(None if x is None else jnp.asarray(x) for x in (start, stop, indices))),
        normal(B, T, N, H),
    )


def attention(q, k, v, mask, *, scale, causal):
    """What cuDNN does: a masked pair gets a large negative bias, so a query without keys attends to all alike."""
    logits = jnp.einsum("BTNX,BSNX->BNTS", *(x.astype(jnp.float32) for x in (q, k))) * scale
    if causal:
        logits = jnp.where(jnp.tril(jnp.ones(logits.shape[-2:], bool)), logits, -jnp.inf)
    if mask is not None:
        logits += jnp.where(mask, 0.0, -2.0e38)
    out = jnp.einsum("BNTS,BSNH->BTNH", jax.nn.softmax(logits), v.astype(jnp.float32))
    return out.astype(q.dtype), jax.nn.logsumexp(logits, axis=-1)


def gradient(q, k, v, mask, lse, out, d_out, *, scale, causal):
    assert np.isfinite(lse).all() and not np.isnan(np.asarray(d_out, np.float32)).any()
    _, pull = jax.vjp(lambda *x: attention(*x, mask, scale=scale, causal=causal)[0], q, k, v)
    return pull(d_out)


@pytest.fixture
def stand_in(monkeypatch):
    """cuDNN on CPU; returns the calls as (queries, whether the causal bound is given, whether there is a mask)."""
    calls = []

    def attend(q, k, v, mask, *, scale, causal):
        calls.append((q.shape[1], causal, mask is not None))
        return attention(q, k, v, mask, scale=scale, causal=causal)

    monkeypatch.setattr(cudnn, "cudnn_attention", attend)
    monkeypatch.setattr(cudnn, "cudnn_attention_gradient", gradient)
    monkeypatch.setattr(cudnn, "require_hopper", lambda: None)
    return calls


def equal(ours, reference, tolerance=1e-2):
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        np.testing.assert_array_equal(np.isneginf(x), np.isneginf(y))
        seen = np.isfinite(y)
        assert np.linalg.norm(x[seen] - y[seen]) <= tolerance * np.linalg.norm(y[seen])


def both(operands, keys, d_out):
    """Results and gradients by cuDNN and, in float32, by xla."""
    results = cudnn.forward(operands, keys, scale=SCALE)
    gradients = cudnn.backward(operands, keys, results, (d_out, None), scale=SCALE)
    wide, d_out = jax.tree.map(lambda x: x.astype(jnp.float32), (operands, d_out))
    reference = xla.forward(wide, keys, scale=SCALE)
    return (results, gradients), (reference, xla.backward(wide, keys, reference, (d_out, None), scale=SCALE))


@pytest.mark.parametrize("kind", KINDS)
def test_with_a_stand_in_it_equals_xla(kind, stand_in):
    with jax.disable_jit():  # one branch runs, and the stand-in sees values
        equal(*both(*make(kind)))
    chosen = {"causal": (24, True, False), "beyond": (24, False, True), "selected beyond": (24, False, True)}
    assert stand_in == [chosen.get(kind, (24, kind != "chunk", True))]


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_queries_at_a_time_give_the_same(kind, stand_in, monkeypatch):
    monkeypatch.setattr(cudnn, "MASK_BYTES", 2 * 2 * 40 * 10)  # 10 queries of 2 rows and up to 40 keys
    with jax.disable_jit():
        equal(*both(*make(kind)))
    assert (len(stand_in) > 1) == (kind != "causal")


@pytest.mark.parametrize("kind", ["causal", "packed", "selected"])
@pytest.mark.parametrize("name", ["k_nope", "k_rope", "v"])
def test_a_broken_key_reaches_the_queries_that_see_it_and_no_other(kind, name, stand_in):
    operands, keys, _ = make(kind)
    array = getattr(operands, name)
    broken = operands._replace(**{name: array.at[0, 7].set(jnp.nan)})
    seen = xla.seen_keys(keys.key_start, keys.key_stop, [x for x in keys[2:] if x is not None], 24)[..., 7]
    seen = np.asarray(seen & (jnp.arange(2) == 0)[:, None])
    with jax.disable_jit():
        out, lse = cudnn.forward(broken, keys, scale=SCALE)
        clean = cudnn.forward(operands, keys, scale=SCALE)
    assert seen.any() and not seen.all()
    assert np.isnan(np.asarray(out, np.float32)[seen]).all() and np.isnan(lse[seen]).all()
    for x, y in zip((out, lse), clean, strict=True):
        np.testing.assert_array_equal(np.asarray(x, np.float32)[~seen], np.asarray(y, np.float32)[~seen])


def test_what_it_does_not_serve_is_refused_with_a_reason(stand_in):
    operands, keys, _ = make("causal")
    for changed, reason in (
        (jax.tree.map(lambda x: x.astype(jnp.float32), operands), "used for bfloat16, got \\['float32'\\]"),
        (operands._replace(v=operands.v[..., :16]), r"must be one of .*, got \(48, 16\)"),
        (Operands(*(x[:, :23] for x in operands)), "even numbers of queries and keys beside a mask, got 23"),
    ):
        with pytest.raises(NotImplementedError, match=reason):
            cudnn.forward(changed, keys, scale=SCALE)
    results = cudnn.forward(operands, keys, scale=SCALE)
    with pytest.raises(NotImplementedError, match="no gradient of the log-sum-exp"):
        cudnn.backward(operands, keys, results, results, scale=SCALE)


def test_an_unused_lse_asks_for_no_gradient_of_it(monkeypatch):
    """Otherwise every training step would fall back to xla."""
    asked = []

    def record(operands, keys, results, cotangents, *, scale):
        asked.append(cotangents[1] is not None)
        return xla.backward(operands, keys, results, cotangents, scale=scale)

    monkeypatch.setitem(sys.modules["pallas_kernels.masked_mha"]._BACKWARD, "xla", record)
    operands, keys, d_out = make("causal", dtype=jnp.float32)

    def total(operands, of_lse):
        out, lse = pk.masked_mha(*operands, *keys[:2], scale=SCALE)
        return (out * d_out).sum() + (
            jax.lax.stop_gradient(lse).sum() if of_lse == "stopped" else lse.sum() * of_lse
        )

    for of_lse, expected in ((0, True), ("stopped", False), (1.0, True)):
        jax.grad(jax.checkpoint(functools.partial(total, of_lse=of_lse)))(operands)
        assert asked.pop() is expected


@pytest.mark.skipif(ON_GPU, reason="needs a machine without a Hopper GPU")
def test_other_devices_are_refused():
    operands, keys, _ = make("causal")
    with pytest.raises(NotImplementedError, match="need jax 0.11|run on Hopper GPUs"):
        pk.masked_mha(*operands, *keys[:2], scale=SCALE, implementation="cudnn")


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a Hopper GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_cudnn_equals_xla_in_float32(kind):
    ours, reference = jax.jit(both)(*make(kind, T=130))
    equal(ours, reference)
