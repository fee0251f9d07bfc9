"""What a mask or a -1 leaves out reaches no result and no gradient, whatever it holds.

Two documents share each row, some queries have no key, and the cache has slots that nothing was written to. Every
operation runs twice: with garbage in all that a query must not read, and with zeros there. The results must be equal.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import blocking
from pallas_kernels.dispatch import PREFERRED
from pallas_kernels.grouped_matmul import mosaic_tpu

GARBAGE = (np.nan, np.inf, -np.inf, 1e38, -1e38)
IMPLEMENTATIONS = ["xla", *filter(None, [PREFERRED.get(jax.default_backend())])]
B, T, S, K = 2, 7, 9, 4  # queries 0 .. 3 are document 0 with the keys 1 .. 4, the others see keys 5 .. 7
I, J, N, P, R, C, H = 2, 8, 2, 4, 4, 8, 5
START = np.repeat([[1, 5]], [4, 3], axis=1).repeat(B, 0)
STOP = np.arange(2, 2 + T)[None].repeat(B, 0)
STOP[:, 2] = STOP[1, 5] = 0  # padding: no key, and no query sees what its own key would be
SEEN = (START[..., None] <= np.arange(S)) & (np.arange(S) < STOP[..., None])
LISTED = SEEN & (np.arange(S) != 3)  # what top-k left out, besides
INDICES = np.full((B, T, K), -1)
for b, t in np.ndindex(B, T):
    found = np.flatnonzero(LISTED[b, t])
    INDICES[b, t, (np.arange(len(found)) + t) % K] = found[::-1]  # -1 in any place
START, STOP, INDICES = (jnp.asarray(x, jnp.int32) for x in (START, STOP, INDICES))
PER_QUERY = {"q", "weights", "q_nope", "q_rope", "q_latent", "token_weights"}
SHAPES = dict(
    q=(B, T, I, J), k=(B, S, J), weights=(B, T, I), k_scale=(B, S), q_nope=(B, T, N, P), q_rope=(B, T, N, R),
    k_nope=(B, S, N, P), k_rope=(B, S, R), v=(B, S, N, H), q_latent=(B, T, N, C), latent=(B, S, C),
    scores=(B, T, S), token_weights=(B, T),
)  # fmt: skip
INTERVAL = {"key_start": START, "key_stop": STOP}


def index_scores(a, implementation):
    return pk.index_scores(**a, **INTERVAL, implementation=implementation)


def sparse_mla(a, implementation):
    return pk.sparse_mla(**a, topk_indices=INDICES, scale=0.3, implementation=implementation)


def masked_mha(indices, a, implementation):
    return pk.masked_mha(**a, **INTERVAL, topk_indices=indices, scale=0.3, implementation=implementation)


def index_kl_dense(a, implementation):
    logits = jnp.einsum("BTNP,BSNP->BTNS", a["q_nope"], a["k_nope"])
    logits += jnp.einsum("BTNR,BSR->BTNS", a["q_rope"], a["k_rope"])
    lse = lse_of(logits, SEEN)
    return pk.index_kl_dense(**a, **INTERVAL, lse=lse, scale=0.3, implementation=implementation)


def index_kl_selected(a, implementation):
    logits = jnp.einsum("BTNC,BSC->BTNS", a["q_latent"], a["latent"])
    logits += jnp.einsum("BTNR,BSR->BTNS", a["q_rope"], a["k_rope"])
    lse = lse_of(logits, LISTED)
    return pk.index_kl_selected(**a, topk_indices=INDICES, lse=lse, scale=0.3, implementation=implementation)


def lse_of(logits, seen):
    logits = jnp.where(seen[:, :, None], logits * 0.3, -jnp.inf)
    return jax.lax.stop_gradient(jax.nn.logsumexp(logits, axis=-1))


INDEXER = ("q", "k", "weights", "token_weights")
OPERATIONS = {  # the operation, its arrays, the pairs of query and key that it reads
    "index_scores": (index_scores, ("q", "k", "weights", "k_scale"), SEEN),
    "sparse_mla": (sparse_mla, ("q_latent", "q_rope", "latent", "k_rope"), LISTED),
    "masked_mha": (
        functools.partial(masked_mha, None), ("q_nope", "q_rope", "k_nope", "k_rope", "v"), SEEN
    ),
    "masked_mha of a list": (
        functools.partial(masked_mha, INDICES), ("q_nope", "q_rope", "k_nope", "k_rope", "v"), LISTED
    ),
    "index_kl_dense": (index_kl_dense, (*INDEXER, "q_nope", "q_rope", "k_nope", "k_rope"), SEEN),
    "index_kl_selected": (index_kl_selected, (*INDEXER, "q_latent", "q_rope", "latent", "k_rope"), LISTED),
}  # fmt: skip


def random_arrays(names, dtype):
    rng = np.random.default_rng(0)
    float32 = {"weights", "k_scale", "token_weights"}
    return {
        name: jnp.asarray(rng.standard_normal(SHAPES[name]), jnp.float32 if name in float32 else dtype)
        for name in names
    }


def filled(a, value, queries, keys):
    """The arrays with this value at these queries [B T] and keys [B S]."""

    def fill(name, x):
        mask = queries if name in PER_QUERY else keys
        return jnp.where(mask.reshape(*mask.shape, *[1] * (x.ndim - 2)), jnp.asarray(value, x.dtype), x)

    return {name: fill(name, x) for name, x in a.items()}


def runs(operation, implementation, a, rng):
    """A compiled function: arrays -> results and gradients, as trees of NumPy arrays."""
    shapes = jax.eval_shape(lambda a: operation(a, implementation), a)
    cotangents = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), shapes)

    @jax.jit
    def run(a, cotangents):
        results, pull = jax.vjp(lambda a: operation(a, implementation), a)
        return results, pull(cotangents)[0]

    def checked(a, cotangents=cotangents):
        return jax.tree.map(np.asarray, run(a, cotangents))

    try:
        checked(a)
    except NotImplementedError as refusal:
        pytest.skip(str(refusal))
    return checked, cotangents


def assert_equal(found, expected, of_queries=None, of_keys=None):
    """Results and gradients are equal bit for bit, at these queries [B T] and keys [B S] if they are given."""
    (results, gradients), (expected_results, expected_gradients) = found, expected
    pairs = [("result", of_queries, *pair) for pair in zip(*map(jax.tree.leaves, (results, expected_results)),
                                                          strict=True)]  # fmt: skip
    for name, gradient in gradients.items():
        where = of_queries if name in PER_QUERY else of_keys
        pairs.append((f"gradient of {name}", where, gradient, expected_gradients[name]))
    for name, where, x, y in pairs:
        if where is not None and x.ndim > 1:
            x, y = x[where], y[where]
        elif where is not None:
            continue  # a sum over everything
        np.testing.assert_array_equal(x, y, err_msg=name)
        assert not np.isnan(x.astype(np.float32)).any(), name


@pytest.fixture(params=[None, 600], ids=["whole", "in blocks"])
def workspace(request, monkeypatch):
    """Blocks of a few queries and heads, the last of them partly padding."""
    if request.param:
        monkeypatch.setattr(blocking, "WORKSPACE_BYTES", request.param)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_no_query_reads_is_without_effect(workspace, implementation, name, dtype):
    operation, names, read = OPERATIONS[name]
    rng = np.random.default_rng(1)
    a = random_arrays(names, dtype)
    run, cotangents = runs(operation, implementation, a, rng)
    unread = ~read.any(axis=2), ~read.any(axis=1)
    assert all(mask.any() for mask in unread)
    expected = run(filled(a, 0.0, *unread))
    for value in GARBAGE:
        assert_equal(run(filled(a, value, *unread)), expected)
    broken = jax.tree.map(
        lambda x: jnp.where(unread[0].reshape(B, T, *[1] * (x.ndim - 2)), jnp.nan, x) if x.ndim > 2 else x,
        cotangents,
    )
    if name != "index_scores":  # whose result has the keys' axis too
        assert_equal(run(filled(a, 0.0, *unread), broken), expected)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_broken_document_leaves_the_other_document_as_it_was(workspace, implementation, name):
    """Its own results are not hidden: with a NaN they are NaN."""
    operation, names, read = OPERATIONS[name]
    a = random_arrays(names, jnp.float32)
    run, cotangents = runs(operation, implementation, a, np.random.default_rng(2))
    for broken in (slice(4, T), slice(0, 4)):
        queries = np.zeros((B, T), bool)
        queries[:, broken] = True
        keys = (read & queries[..., None]).any(axis=1)
        of_other = {"of_queries": ~queries, "of_keys": (read & ~queries[..., None]).any(axis=1)}
        expected = run(filled(a, 0.0, queries, keys))
        for value in GARBAGE:
            assert_equal(run(filled(a, value, queries, keys)), expected, **of_other)
        (first, *_), _ = jax.tree.flatten(run(filled(a, np.nan, 0 * queries > 0, keys))[0])
        seeing = queries & read.any(axis=2)
        if first.ndim > 1:
            assert np.isnan(first[seeing]).any(axis=tuple(range(1, first.ndim - 1))).any(axis=-1).all()
        else:
            assert np.isnan(first)
        nan = jax.tree.map(lambda x, at=broken: x.at[:, at].set(jnp.nan) if x.ndim > 1 else x, cotangents)
        assert_equal(run(a, nan), run(a), **of_other)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_later_keys_reach_no_earlier_query(implementation, name):
    operation, names, read = OPERATIONS[name]
    a = random_arrays(names, jnp.float32)
    run, _ = runs(operation, implementation, a, np.random.default_rng(3))
    keys = np.zeros((B, S), bool)
    keys[:, [2, 6, 7]] = True
    earlier = ~(read & keys[:, None]).any(axis=2)
    assert earlier.any() and not earlier.all()
    expected = run(filled(a, 0.0, earlier & False, keys))
    for value in GARBAGE:
        found = run(filled(a, value, earlier & False, keys))
        assert_equal(found, expected, of_queries=earlier, of_keys=keys & False)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_query_with_token_weight_0_is_left_out_of_the_index_loss(implementation):
    for name in ("index_kl_dense", "index_kl_selected"):
        operation, names, read = OPERATIONS[name]
        a = random_arrays(names, jnp.float32)
        queries = np.zeros((B, T), bool)
        queries[:, [1, 5]] = True
        a["token_weights"] = jnp.where(queries, 0.0, a["token_weights"])
        run, _ = runs(operation, implementation, a, np.random.default_rng(4))
        weighted = {key: value for key, value in a.items() if key != "token_weights"}
        (loss, _), gradients = run(a)
        for value in GARBAGE:
            broken = filled(weighted, value, queries, np.zeros((B, S), bool))
            (found, _), broken_gradients = run(broken | {"token_weights": a["token_weights"]})
            assert found == loss
            for gradient, expected in zip(*map(jax.tree.leaves, (broken_gradients, gradients)), strict=True):
                np.testing.assert_array_equal(gradient, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_hidden_scores_are_never_selected(implementation):
    scores = random_arrays(["scores"], jnp.float32)["scores"]
    select = jax.jit(lambda x: pk.select_topk(x, 3, **INTERVAL, implementation=implementation))
    expected = select(jnp.where(SEEN, scores, 0.0))
    for value in GARBAGE:
        np.testing.assert_array_equal(select(jnp.where(SEEN, scores, value)), expected)
    gradient = jax.grad(lambda x: select(x).astype(jnp.float32).sum())(jnp.where(SEEN, scores, jnp.nan))
    assert (gradient == 0).all()


GROUPED = {
    **{name: functools.partial(pk.grouped_matmul, implementation=name) for name in IMPLEMENTATIONS},
    "mosaic_tpu interpreted": functools.partial(mosaic_tpu.grouped_matmul, interpret=True),
}


@pytest.mark.parametrize("sizes", [(3, 0, 4), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("name", GROUPED)
def test_rows_behind_the_last_group_give_0_and_reach_no_gradient(name, sizes):
    rng, rows = np.random.default_rng(5), 11
    a = [jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((rows, 6), (3, 6, 5))]
    d_out = jnp.asarray(rng.standard_normal((rows, 5)), jnp.float32)
    behind = jnp.arange(rows)[:, None] >= sum(sizes)

    @jax.jit
    def run(rows, weights, d_out):
        out, pull = jax.vjp(lambda *a: GROUPED[name](*a, jnp.asarray(sizes, jnp.int32)), rows, weights)
        return out, *pull(d_out)

    expected = run(jnp.where(behind, 0.0, a[0]), a[1], jnp.where(behind, 0.0, d_out))
    for of_rows, of_d_out in itertools.product(GARBAGE, (0.0, np.nan)):
        found = run(jnp.where(behind, of_rows, a[0]), a[1], jnp.where(behind, of_d_out, d_out))
        for x, y in zip(found, expected, strict=True):
            np.testing.assert_array_equal(x, y)
    out, d_rows, _ = found
    assert (out[sum(sizes) :] == 0).all() and (d_rows[sum(sizes) :] == 0).all()
