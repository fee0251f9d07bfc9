"""Argument checks, and what one block of queries may hold."""

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels as pk
from pallas_kernels import blocking


def zeros(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


def test_contradicting_arguments_are_refused_with_both_values():
    q, k, w, i = zeros(1, 4, 2, 8), zeros(1, 6, 8), zeros(1, 4, 2), zeros(1, 4, dtype=jnp.int32)
    with pytest.raises(ValueError, match=r"k must have shape \(1, 6, 8\).*got \(1, 6, 7\)"):
        pk.index_scores(q, zeros(1, 6, 7), w, i, i)
    with pytest.raises(ValueError, match="one dtype, got float32 and bfloat16"):
        pk.index_scores(q, k.astype(jnp.bfloat16), w, i, i)
    with pytest.raises(ValueError, match=r"weights must have shape \(1, 4, 2\).*got \(1, 4, 3\)"):
        pk.index_scores(q, k, zeros(1, 4, 3), i, i)
    with pytest.raises(ValueError, match="k must be at least 1, got k=0"):
        pk.select_topk(zeros(1, 4, 6), 0)
    with pytest.raises(ValueError, match="given together"):
        pk.select_topk(zeros(1, 4, 6), 1, key_start=i)
    with pytest.raises(ValueError, match=r"q_rope must have shape \(1, 4, 2, 3\).*got \(1, 5, 2, 3\)"):
        pk.sparse_mla(q, zeros(1, 5, 2, 3), k, zeros(1, 6, 3), zeros(1, 4, 2, dtype=jnp.int32), scale=1.0)
    with pytest.raises(ValueError, match="one dtype"):
        pk.sparse_mla(
            q,
            zeros(1, 4, 2, 3),
            k.astype(jnp.bfloat16),
            zeros(1, 6, 3),
            zeros(1, 4, 2, dtype=jnp.int32),
            scale=1.0,
        )
    with pytest.raises(ValueError, match=r"rows must have shape \(5, 8\).*got \(5, 7\)"):
        pk.grouped_matmul(zeros(5, 7), zeros(2, 8, 4), zeros(2, dtype=jnp.int32))
    with pytest.raises(ValueError, match=r"group_sizes must have shape \(2,\).*got \(3,\)"):
        pk.grouped_matmul(zeros(5, 8), zeros(2, 8, 4), zeros(3, dtype=jnp.int32))
    with pytest.raises(ValueError, match="go together, got float8_e4m3fn and no weight_scales"):
        pk.grouped_matmul(zeros(5, 8), zeros(2, 8, 4, dtype=jnp.float8_e4m3fn), zeros(2, dtype=jnp.int32))
    with pytest.raises(ValueError, match=r"weight_scales must have shape \(2, 2, 1\).*got \(2, 1, 1\)"):
        pk.grouped_matmul(
            zeros(5, 200),
            zeros(2, 200, 4, dtype=jnp.float8_e4m3fn),
            zeros(2, dtype=jnp.int32),
            weight_scales=zeros(2, 1, 1),
        )


@pytest.mark.parametrize("n_queries", [1, 3, 4, 5, 8])
def test_blocks_join_to_the_whole(n_queries):
    x = jnp.arange(2 * n_queries * 3.0).reshape(2, n_queries, 3)
    i = jnp.arange(2 * n_queries).reshape(2, n_queries)
    doubled, index = blocking.map_query_blocks(lambda x, i: (2 * x, i), 4, x, i)
    assert (doubled == 2 * x).all() and (index == i).all()


def test_padding_queries_have_no_keys():
    assert blocking.split_queries(jnp.zeros((1, 3), jnp.int32), 4).tolist() == [[[0, 0, 0, -1]]]


@pytest.mark.parametrize("T", [1024, 4096])
def test_workspace_does_not_grow_with_the_number_of_queries(T):
    """[T S I] float32 would be 2 GiB at T = 4096; [T K C] 1 GiB."""
    S, I, J, N, C, R, K = 2048, 64, 32, 16, 128, 32, 512
    shape = lambda *s, dtype=jnp.float32: jax.ShapeDtypeStruct(s, dtype)  # noqa: E731
    bounds = shape(1, T, dtype=jnp.int32)
    score = jax.jit(lambda *a: pk.index_scores(*a, implementation="xla"))
    attend = jax.jit(lambda *a: pk.sparse_mla(*a, scale=1.0, implementation="xla"))
    for function, arguments in (
        (score, (shape(1, T, I, J), shape(1, S, J), shape(1, T, I), bounds, bounds)),
        (
            attend,
            (
                shape(1, T, N, C),
                shape(1, T, N, R),
                shape(1, S, C),
                shape(1, S, R),
                shape(1, T, K, dtype=jnp.int32),
            ),
        ),
    ):
        memory = function.lower(*arguments).compile().memory_analysis()
        moved = (
            memory.argument_size_in_bytes + memory.output_size_in_bytes
        )  # splitting into blocks may copy these
        assert memory.temp_size_in_bytes - moved < 3 * blocking.WORKSPACE_BYTES


@pytest.mark.parametrize("with_topk", [True, False])
@pytest.mark.parametrize("workspace", [2**13, 2**9])
def test_masked_mha_is_the_same_in_a_small_workspace(monkeypatch, with_topk, workspace):
    """All rows and heads at once, two heads of a row with all queries, and one head with few queries."""
    B, T, S, N = 2, 6, 24, 4
    q_nope, q_rope, k_nope, k_rope, v, d_out, d_lse = (
        jax.random.normal(jax.random.key(i), shape)
        for i, shape in enumerate(
            [(B, T, N, 8), (B, T, N, 4), (B, S, N, 8), (B, S, 4), (B, S, N, 5), (B, T, N, 5), (B, T, N)]
        )
    )
    stop = jnp.asarray([[0, 1, 5, 12, 23, 24], [24, 9, 0, 3, 3, 20]])
    start = jnp.minimum(jnp.asarray([[0, 0, 2, 0, 20, 0], [1, 0, 0, 2, 3, 11]]), stop)
    topk = jnp.where(jnp.arange(7) < 6, jnp.arange(7) * 3 + jnp.arange(T)[:, None] % 3, -1)
    topk = jnp.broadcast_to(topk, (B, T, 7)).astype(jnp.int32) if with_topk else None

    def results():
        attend = lambda *x: pk.masked_mha(*x, start, stop, topk, scale=0.3, implementation="xla")  # noqa: E731
        out, pullback = jax.vjp(attend, q_nope, q_rope, k_nope, k_rope, v)
        return out, pullback((d_out, jnp.where(jnp.isfinite(out[1]), d_lse, 0.0)))

    whole = results()
    monkeypatch.setattr(blocking, "WORKSPACE_BYTES", workspace)
    jax.clear_caches()
    for ours, expected in zip(jax.tree.leaves(results()), jax.tree.leaves(whole), strict=True):
        assert ours.shape == expected.shape
        assert jnp.allclose(ours, expected, rtol=1e-5, atol=1e-6)
