"""Each part of the loss against an independent computation, and the separation of packed documents."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dsa_jax.sharding import make_mesh
from dsa_jax.transformer import Transformer
from pallas_kernels import blocking
from tests.train.small import CONFIG, T, batch_of, initial
from train.config import sparse
from train.loss import after_next, cross_entropy, cross_entropy_per_token, loss_fn

STAGE = sparse(1, lr=1e-3, index_lr=1e-3, mtp_weight=0.3, balance_weight=0.01)


def naive(hidden, head, targets):
    log_p = jax.nn.log_softmax(hidden @ head, axis=-1)
    chosen = jnp.take_along_axis(log_p, jnp.maximum(targets, 0)[..., None], -1)[..., 0]
    return -(chosen * (targets >= 0)).sum()


# blocks of 1 token, of 4 (11 = 4 + 4 + 3), of all
@pytest.mark.parametrize("workspace", [1, 4 * 3 * 17 * 4, 2**28])
def test_blocked_cross_entropy_and_its_gradients_are_the_naive_ones(monkeypatch, workspace):
    monkeypatch.setattr(blocking, "WORKSPACE_BYTES", workspace)
    rng = np.random.default_rng(0)
    hidden, head = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((3, 11, 6), (6, 17)))
    targets = jnp.asarray(rng.integers(17, size=(3, 11)), jnp.int32).at[:, ::4].set(-1)
    ours = jax.value_and_grad(cross_entropy, (0, 1))(hidden, head, targets)
    theirs = jax.value_and_grad(naive, (0, 1))(hidden, head, targets)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, theirs)


MESHES = [{"data": 2, "context": 2, "tensor": 2}, {"data": 2, "context": 4}, {"expert": 2, "tensor": 4}]


@pytest.mark.devices(8)
@pytest.mark.parametrize("n_vocab", [240, 171])  # 171: every device has the whole vocabulary
@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_on_a_mesh_every_device_has_its_own_tokens_and_vocabulary(monkeypatch, axes, n_vocab):
    rng = np.random.default_rng(0)
    hidden, head = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((4, 32, 8), (8, n_vocab)))
    hidden *= 10  # so that the log-sum-exps of the parts differ much
    targets = jnp.asarray(rng.integers(n_vocab, size=(4, 32)), jnp.int32).at[:, ::4].set(-1)
    want = jax.value_and_grad(naive, (0, 1))(hidden, head, targets)
    right = (targets >= 0) & ((hidden @ head).argmax(-1) == targets)

    monkeypatch.setattr(blocking, "WORKSPACE_BYTES", 1)  # blocks of one token
    mesh = make_mesh(**axes)
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))  # noqa: E731
    tokens = (("data", "expert"), "context")
    arrays = put(hidden, *tokens), put(head, ("data", "expert", "context"), None), put(targets, *tokens)
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.value_and_grad(cross_entropy, (0, 1))).lower(*arrays).compile()
        got = compiled(*arrays)
        np.testing.assert_array_equal(jax.jit(cross_entropy_per_token)(*arrays)[1], right)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max()), got, want
    )
    n_tokens = 4 * 32 * mesh.shape["tensor"] // 8
    logits = n_tokens * n_vocab // (mesh.shape["tensor"] if n_vocab % 2 == 0 else 1)
    sizes = [
        math.prod(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", compiled.as_text())
    ]
    assert max(sizes) < logits


def test_without_a_target_there_is_no_loss_and_no_gradient():
    hidden, head, none = jnp.ones((1, 4, 3)), jnp.ones((3, 5)), jnp.full((1, 4), -1, jnp.int32)
    loss, gradient = jax.value_and_grad(cross_entropy)(hidden, head, none)
    assert loss == 0 and (gradient == 0).all()


def test_mtp_targets_are_the_tokens_after_the_next_in_the_same_document():
    targets = jnp.asarray([[11, 12, -1, 21, 22, 23, -1, -1]], jnp.int32)
    segment_ids = jnp.asarray([[1, 1, 1, 2, 2, 2, 2, 0]], jnp.int32)
    expected = [[12, -1, -1, 22, 23, -1, -1, -1]]
    np.testing.assert_array_equal(after_next(targets, segment_ids), expected)


def test_mtp_targets_stay_in_their_document_even_if_its_last_token_has_a_target():
    """In rows cut out of longer documents, the next token of each document's last one is in another row."""
    targets, segment_ids = jnp.asarray([[11, 12, 21, 22]], jnp.int32), jnp.asarray([[1, 1, 2, 2]], jnp.int32)
    np.testing.assert_array_equal(after_next(targets, segment_ids), [[12, -1, 22, -1]])


@functools.cache
def compiled_loss():
    return jax.jit(functools.partial(loss_fn, config=CONFIG, stage=STAGE))


def mean_nll(logits, targets):
    """Over the targets, in float64."""
    logits, targets = np.asarray(logits, np.float64), np.asarray(targets)
    log_z = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    nll = [log_z[b, t] - logits[b, t, targets[b, t]] for b, t in zip(*np.nonzero(targets >= 0), strict=True)]
    return np.mean(nll)


def test_every_part_equals_a_computation_from_the_models_outputs():
    batch = batch_of([20, 9], [T])
    batch["targets"] = batch["targets"].at[1, -1].set(5)  # this document continues in another row
    tokens, targets, ids = (np.asarray(batch[name]) for name in ("tokens", "targets", "segment_ids"))
    following, has_next = np.roll(tokens, -1, axis=1), np.zeros_like(tokens, bool)
    following[1, -1], has_next[1, -1] = 5, True
    second = np.full_like(targets, -1)  # the token after the next
    for b in range(2):
        for t in range(T - 1):
            has_next[b, t] = ids[b, t] != 0 and ids[b, t] == ids[b, t + 1]
            if t < T - 2 and has_next[b, t] and ids[b, t] == ids[b, t + 2]:
                second[b, t] = tokens[b, t + 2]
    second[1, -2] = 5
    assert (second >= 0).sum() == 18 + 7 + 31 and has_next.sum() == 19 + 8 + 32
    total, metrics = compiled_loss()(initial(), batch)

    model = Transformer(dataclasses.replace(CONFIG, index_loss=True))

    @jax.jit
    def outputs(params, tokens, ids, following, mtp_ids):
        capture = ("index_kl", "experts")
        logits, _, aux = model.apply(params, tokens, segment_ids=ids, capture=capture)
        mtp_logits, _, mtp = model.apply(
            params, aux["hidden"], following, segment_ids=mtp_ids, method="mtp_logits", capture=capture
        )
        return logits, mtp_logits, aux, mtp

    logits, mtp_logits, aux, mtp = outputs(initial(), tokens, ids, following, np.where(has_next, ids, 0))

    np.testing.assert_allclose(metrics["ce"], mean_nll(logits, targets), rtol=1e-5)
    np.testing.assert_allclose(metrics["mtp"], mean_nll(mtp_logits, second), rtol=1e-5)

    kl = [*np.asarray(aux["index_kl"], np.float64)[:, ids != 0], np.asarray(mtp["index_kl"])[has_next]]
    np.testing.assert_allclose(metrics["index_kl"], [layer.mean() for layer in kl], rtol=1e-4)

    chosen = [np.asarray(aux["experts"])[0, ids != 0], np.asarray(mtp["experts"])[has_next]]
    loads = [np.bincount(layer.ravel(), minlength=CONFIG.n_routed_experts) for layer in chosen]
    np.testing.assert_array_equal(metrics["expert_load"], loads)
    np.testing.assert_allclose(metrics["balance"], np.sum(aux["balance"]) + mtp["balance"], rtol=1e-5)

    weighted = metrics["ce"] + 0.3 * metrics["mtp"] + 0.01 * metrics["balance"] + metrics["index_kl"].sum()
    np.testing.assert_allclose(total, weighted, rtol=1e-6)


def test_packed_documents_count_like_documents_in_rows_of_their_own():
    packed = batch_of([18, 14], [], seed=3)
    apart = {name: jnp.full_like(array, -1 if name == "targets" else 0) for name, array in packed.items()}
    for name, array in packed.items():
        apart[name] = apart[name].at[0, :18].set(array[0, :18]).at[1, :14].set(array[0, 18:])
    ours, theirs = compiled_loss()(initial(), packed)[1], compiled_loss()(initial(), apart)[1]
    for name in ("ce", "mtp", "index_kl"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-6, err_msg=name)
    np.testing.assert_array_equal(ours["expert_load"], theirs["expert_load"])


def test_padding_is_never_read():
    batch = batch_of([20], [T])
    other = batch | {"tokens": batch["tokens"].at[0, 20:].set(7)}
    ours, theirs = compiled_loss()(initial(), batch), compiled_loss()(initial(), other)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, theirs)
