"""The contract of every operation, for every implementation that this backend can run.

A kernel joins by appearing in the operation's table; the tests do not change.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.test_util import check_grads

import pallas_kernels as pk
from pallas_kernels.dispatch import PREFERRED
from tests.oracle import operations as oracle

IMPLEMENTATIONS = ["xla", *PREFERRED.get(jax.default_backend(), ())]
DTYPES = [jnp.float32, jnp.bfloat16]
TOLERANCE = {jnp.float32: 2e-6, jnp.bfloat16: 1e-2}  # relative, 2-norm


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    return request.param


def call(operation, *args, implementation, **kwargs):
    """Runs the operation, or skips where a kernel says that it cannot serve these arguments."""
    try:
        return operation(*args, implementation=implementation, **kwargs)
    except NotImplementedError as refusal:
        pytest.skip(str(refusal))


def relative_error(value, reference):
    value, reference = np.asarray(value, np.float64), np.asarray(reference, np.float64)
    assert np.isfinite(value).all()
    return np.linalg.norm(value - reference) / max(np.linalg.norm(reference), 1e-30)


def same_visible(value, reference, dtype):
    """-inf in the same places, and the rest within tolerance."""
    value, reference = np.asarray(value), np.asarray(reference)
    np.testing.assert_array_equal(np.isneginf(value), np.isneginf(reference))
    visible = np.isfinite(reference)
    assert relative_error(value[visible], reference[visible]) < TOLERANCE[dtype]


def normal(rng, *shape, dtype=np.float32):
    return jnp.asarray(rng.standard_normal(shape), dtype)


def intervals(rng, B, T, S):
    """Causal, packed and empty intervals mixed."""
    start = rng.integers(0, max(S // 2, 1), (B, T)).astype(np.int32)
    stop = np.minimum(start + rng.integers(0, S + 1, (B, T)), S).astype(np.int32)
    stop[:, 0] = start[:, 0]  # no key at all
    return jnp.asarray(start), jnp.asarray(stop)


# index_scores


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("B", "T", "S", "I", "J"), [(2, 7, 37, 4, 128), (1, 1, 1, 64, 128), (1, 130, 300, 32, 128)]
)
def test_index_scores_equal_the_equation(implementation, dtype, B, T, S, I, J):
    rng = np.random.default_rng(B * T + S)
    q, k = normal(rng, B, T, I, J, dtype=dtype), normal(rng, B, S, J, dtype=dtype)
    weights = normal(rng, B, T, I)  # of either sign
    start, stop = intervals(rng, B, T, S)
    scores = call(pk.index_scores, q, k, weights, start, stop, implementation=implementation)
    assert scores.dtype == jnp.float32
    same_visible(scores, oracle.index_scores(q, k, weights, start, stop), jnp.float32)


def test_index_scores_of_fp8_operands_apply_the_key_scale(implementation):
    rng = np.random.default_rng(0)
    B, T, S, I, J = 2, 9, 70, 32, 128
    q = jnp.asarray(rng.standard_normal((B, T, I, J)).astype(ml_dtypes.float8_e4m3fn))
    k = jnp.asarray(rng.standard_normal((B, S, J)).astype(ml_dtypes.float8_e4m3fn))
    weights, k_scale = normal(rng, B, T, I), jnp.exp2(jnp.asarray(rng.integers(-6, 3, (B, S)), jnp.float32))
    start, stop = intervals(rng, B, T, S)
    scores = call(pk.index_scores, q, k, weights, start, stop, k_scale=k_scale, implementation=implementation)
    reference = oracle.index_scores(q, k, weights, start, stop, k_scale)
    visible = np.isfinite(reference)
    assert relative_error(scores[visible], reference[visible]) < 2e-4


def test_index_scores_gradient_equals_finite_differences():
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        q, k, w = (jnp.asarray(rng.standard_normal(s)) for s in ((1, 5, 3, 4), (1, 6, 4), (1, 5, 3)))
        scale = jnp.asarray(rng.uniform(0.5, 2.0, (1, 6)))
        stop = jnp.arange(1, 6)[None]

        def total(*arrays):
            q, k, w, scale = map(jnp.asarray, arrays)  # check_grads perturbs in NumPy
            scores = pk.index_scores(q, k, w, stop * 0, stop, k_scale=scale, implementation="xla")
            return jnp.sum(jnp.where(jnp.isfinite(scores), scores, 0.0) ** 2)

        check_grads(total, (q, k, w, scale), order=1, modes=["rev"], eps=1e-6, rtol=1e-6)


# select_topk


@pytest.mark.parametrize("k", [1, 3, 16, 64, 500])
def test_select_topk_equals_a_stable_sort(implementation, k):
    rng = np.random.default_rng(k)
    B, T, S = 2, 33, 131
    scores = rng.standard_normal((B, T, S)).astype(np.float32)
    scores[0, 1] = 0.0  # one plateau
    scores[0, 2] = np.maximum(scores[0, 2], 0.0)  # ReLU: zeros at the boundary
    scores[0, 3, ::2] = -0.0
    scores[0, 3, 1::2] = 0.0  # equal zeros of both signs
    scores[0, 4] = -np.inf
    scores[0, 5, 5:] = -np.inf
    scores[0, 6] = rng.integers(0, 3, S)
    scores[0, 7] = -np.abs(scores[0, 7]) * 1e30
    start, stop = intervals(rng, B, T, S)
    whole = call(pk.select_topk, jnp.asarray(scores), k, implementation=implementation)
    np.testing.assert_array_equal(whole, oracle.select_topk(scores, k))
    # what lies outside the interval may be anything
    outside = np.asarray((np.arange(S) < start[..., None]) | (np.arange(S) >= stop[..., None]))
    scores[outside] = np.inf
    part = call(
        pk.select_topk, jnp.asarray(scores), k, key_start=start, key_stop=stop, implementation=implementation
    )
    np.testing.assert_array_equal(part, oracle.select_topk(scores, k, start, stop))


def test_select_topk_ranks_nan_above_every_number(implementation):
    scores = jnp.asarray([[[1.0, jnp.inf, jnp.nan, 2.0]]])
    assert call(pk.select_topk, scores, 2, implementation=implementation).tolist() == [[[1, 2]]]


def test_select_topk_is_the_same_on_every_run(implementation):
    scores = jnp.asarray(np.random.default_rng(0).integers(0, 4, (1, 64, 999)), jnp.float32)
    runs = [call(pk.select_topk, scores, 100, implementation=implementation) for _ in range(5)]
    assert all((run == runs[0]).all() for run in runs)


# sparse_mla


def attention_inputs(rng, B, T, N, C, R, S, K, dtype):
    q_latent, q_rope = normal(rng, B, T, N, C, dtype=dtype), normal(rng, B, T, N, R, dtype=dtype)
    latent, k_rope = normal(rng, B, S, C, dtype=dtype), normal(rng, B, S, R, dtype=dtype)
    indices = np.full((B, T, K), -1, np.int32)
    for b in range(B):
        for t in range(T):
            count = rng.integers(0, min(K, S) + 1)
            places = rng.permutation(K)[:count]  # -1 anywhere, not only at the end
            indices[b, t, places] = rng.permutation(S)[:count]
    indices[:, 0] = -1  # no key at all
    return q_latent, q_rope, latent, k_rope, jnp.asarray(indices)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("B", "T", "N", "C", "R", "S", "K"),
    [
        (2, 5, 4, 128, 32, 40, 16),
        (1, 3, 16, 512, 64, 30, 64),
        (1, 70, 2, 128, 64, 200, 100),
        (3, 1, 128, 512, 64, 90, 70),
    ],
)
def test_sparse_mla_equals_softmax_over_the_listed_keys(implementation, dtype, B, T, N, C, R, S, K):
    inputs = attention_inputs(np.random.default_rng(T + S), B, T, N, C, R, S, K, dtype)
    scale = (C + R) ** -0.5
    out, lse = call(pk.sparse_mla, *inputs, scale=scale, implementation=implementation)
    assert out.dtype == dtype and lse.dtype == jnp.float32
    out_reference, lse_reference = oracle.sparse_mla(*inputs, scale)
    assert relative_error(out, out_reference) < TOLERANCE[dtype]
    same_visible(lse, lse_reference, jnp.float32 if dtype == jnp.float32 else jnp.bfloat16)
    assert (np.asarray(out, np.float32)[np.isneginf(lse_reference)] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_sparse_mla_gradients_equal_xla_in_float32(implementation, dtype):
    inputs = attention_inputs(np.random.default_rng(3), 2, 9, 16, 512, 64, 50, 24, dtype)
    cotangent = normal(np.random.default_rng(4), 2, 9, 16, 512)

    def total(implementation, *arrays):
        out, lse = pk.sparse_mla(*arrays, inputs[4], scale=0.05, implementation=implementation)
        return jnp.sum(out * cotangent) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0.0) ** 2)

    reference = jax.grad(lambda *a: total("xla", *a), (0, 1, 2, 3))(
        *(x.astype(jnp.float32) for x in inputs[:4])
    )
    try:
        gradients = jax.grad(lambda *a: total(implementation, *a), (0, 1, 2, 3))(*inputs[:4])
    except NotImplementedError as refusal:
        pytest.skip(str(refusal))
    for gradient, expected in zip(gradients, reference, strict=True):
        assert gradient.dtype == dtype
        assert relative_error(gradient, expected) < TOLERANCE[dtype]


def test_sparse_mla_gradient_equals_finite_differences():
    with jax.enable_x64(True):
        rng = np.random.default_rng(5)
        *arrays, indices = attention_inputs(rng, 1, 4, 2, 3, 2, 7, 5, np.float64)

        def total(*arrays):
            out, lse = pk.sparse_mla(*map(jnp.asarray, arrays), indices, scale=0.7, implementation="xla")
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0.0) ** 2)

        check_grads(total, tuple(arrays), order=1, modes=["rev"], eps=1e-6, rtol=1e-6)


def test_unselected_keys_have_zero_gradient():
    rng = np.random.default_rng(6)
    *arrays, indices = attention_inputs(rng, 1, 6, 2, 8, 4, 40, 4, np.float32)
    gradient = jax.grad(lambda c: pk.sparse_mla(*arrays[:2], c, arrays[3], indices, scale=1.0)[0].sum())(
        arrays[2]
    )
    unselected = np.setdiff1d(np.arange(40), np.asarray(indices))
    assert unselected.size and (np.asarray(gradient)[0, unselected] == 0).all()


# grouped_matmul


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("sizes", "X", "Y"), [([3, 0, 40, 129], 128, 96), ([0, 700, 1, 0], 200, 136), ([1], 64, 256)]
)
def test_grouped_matmul_multiplies_each_row_by_its_groups_matrix(implementation, dtype, sizes, X, Y):
    rng = np.random.default_rng(sum(sizes))
    rows, weights = normal(rng, sum(sizes) + 5, X, dtype=dtype), normal(rng, len(sizes), X, Y, dtype=dtype)
    out = call(pk.grouped_matmul, rows, weights, jnp.asarray(sizes), implementation=implementation)
    assert out.dtype == dtype and out.shape == (sum(sizes) + 5, Y)
    assert (out[sum(sizes) :] == 0).all()
    expected = oracle.grouped_matmul(rows, weights, sizes)
    assert relative_error(out[: sum(sizes)], expected) < TOLERANCE[dtype]


def test_grouped_matmul_scales_fp8_weights_by_block(implementation):
    rng, sizes, X, Y = np.random.default_rng(8), [30, 0, 20], 200, 300
    weights = jnp.asarray(rng.standard_normal((3, X, Y)), jnp.float8_e4m3fn)
    scales = jnp.asarray(rng.uniform(0.5, 2.0, (3, 2, 3)), jnp.float32)
    rows = normal(rng, sum(sizes), X)
    options = {"weight_scales": scales, "implementation": implementation}
    out = call(pk.grouped_matmul, rows, weights, jnp.asarray(sizes), **options)
    assert relative_error(out, oracle.grouped_matmul(rows, weights, sizes, scales)) < TOLERANCE[jnp.float32]


@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_matmul_gradients_equal_xla_in_float32(implementation, dtype):
    rng, sizes = np.random.default_rng(9), jnp.asarray([100, 0, 29])
    arrays = normal(rng, 129, 128, dtype=dtype), normal(rng, 3, 128, 64, dtype=dtype)
    cotangent = normal(rng, 129, 64)

    def total(implementation, rows, weights):
        out = call(pk.grouped_matmul, rows, weights, sizes, implementation=implementation)
        return (out * cotangent).sum()

    expected = jax.grad(lambda *a: total("xla", *a), (0, 1))(*(x.astype(jnp.float32) for x in arrays))
    found = jax.grad(lambda *a: total(implementation, *a), (0, 1))(*arrays)
    assert [x.dtype for x in found] == [dtype, dtype]
    assert all(relative_error(x, y) < TOLERANCE[dtype] for x, y in zip(found, expected, strict=True))
    assert (found[1][1] == 0).all()  # of a group without rows


def test_grouped_matmul_gradient_equals_finite_differences():
    with jax.enable_x64(True):
        rng, sizes = np.random.default_rng(10), jnp.asarray([3, 0, 4])
        arrays = rng.standard_normal((7, 5)), rng.standard_normal((3, 5, 4))

        def total(rows, weights):
            out = pk.grouped_matmul(jnp.asarray(rows), jnp.asarray(weights), sizes, implementation="xla")
            return jnp.sum(jnp.sin(out))

        check_grads(total, arrays, order=1, modes=["rev"], eps=1e-3, rtol=1e-3)
