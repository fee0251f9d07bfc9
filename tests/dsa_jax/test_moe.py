"""Routing on tables small enough to check by hand, and the MoE layer against a loop over tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax.config import tiny
from dsa_jax.moe import balance_loss, moe, route

FOUR = dataclasses.replace(
    tiny(), n_routed_experts=4, n_expert_groups=2, n_limited_groups=1, n_activated_experts=2, route_scale=2.5
)


def chosen(scores, bias, config=FOUR):
    experts, weights = route(jnp.asarray([scores]), jnp.asarray(bias), config)
    return sorted(zip(experts[0].tolist(), weights[0].tolist(), strict=True))


def test_the_bias_changes_the_choice_and_not_the_weights():
    # without bias: group (0, 1) wins; with it: group (2, 3). Weights: scores without bias, normalised, x 2.5.
    assert [e for e, _ in chosen([0.6, 0.5, 0.4, 0.3], [0.0, 0.0, 0.0, 0.0])] == [0, 1]
    (a, wa), (b, wb) = chosen([0.6, 0.5, 0.4, 0.1], [0.0, 0.0, 1.0, 1.0])
    assert (a, b) == (2, 3)
    assert (wa, wb) == (pytest.approx(2.5 * 0.8), pytest.approx(2.5 * 0.2))


def test_a_group_is_scored_by_its_two_best_experts():
    eight = dataclasses.replace(FOUR, n_routed_experts=8)
    assert [e for e, _ in chosen([0.9, 0.1, 0.1, 0.1, 0.6, 0.5, 0.1, 0.1], [0.0] * 8, eight)] == [4, 5]


def test_negative_biases_do_not_let_masked_groups_in():
    """With 0 instead of -inf for masked experts, experts of the losing group would win here."""
    assert [e for e, _ in chosen([0.6, 0.5, 0.4, 0.3], [-1.0, -1.0, -2.0, -2.0])] == [0, 1]


def test_one_group_is_a_plain_top_k_and_normalisation_is_optional():
    plain = dataclasses.replace(FOUR, n_expert_groups=1, n_limited_groups=1, norm_topk_prob=False)
    assert chosen([0.2, 0.5, 0.4, 0.3], [0.0] * 4, plain) == [
        (1, pytest.approx(1.25)),
        (2, pytest.approx(1.0)),
    ]


def silu_mlp(x, w):
    gate = x @ w["w_gate"]
    return (gate / (1 + np.exp(-gate)) * (x @ w["w_up"])) @ w["w_down"]


@pytest.mark.parametrize("skewed", [False, True])
def test_mixture_equals_a_loop_over_tokens_and_drops_none(skewed):
    config = dataclasses.replace(tiny(), d_model=16, d_expert=8)
    E, D, F = config.n_routed_experts, 16, 8
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    parameters = {
        "gate": normal(D, E),
        "gate_bias": np.asarray([5.0, 4.0, 3.0] + [-9.0] * 5, np.float32) if skewed else 0.1 * normal(E),
        "experts": {"w_gate": normal(E, D, F), "w_up": normal(E, D, F), "w_down": normal(E, F, D)},
        "shared_experts": {"w_gate": normal(D, F), "w_up": normal(D, F), "w_down": normal(F, D)},
    }
    x = normal(2, 9, D)
    valid = np.ones((2, 9), bool)
    valid[1, 4:] = False
    y, aux = moe(jnp.asarray(x), jnp.asarray(valid), jax.tree.map(jnp.asarray, parameters), config)

    expected = silu_mlp(x.astype(np.float64), parameters["shared_experts"])
    experts, weights = np.asarray(aux["experts"]), np.asarray(aux["expert_weights"])
    for b in range(2):
        for t in range(9):
            for e, w in zip(experts[b, t], weights[b, t], strict=True):
                one = {name: value[e] for name, value in parameters["experts"].items()}
                expected[b, t] += w * silu_mlp(x[b, t].astype(np.float64), one)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    counts = np.bincount(experts[valid].ravel(), minlength=E)
    np.testing.assert_array_equal(aux["expert_load"], counts)
    assert counts.sum() == valid.sum() * config.n_activated_experts
    if skewed:  # all tokens want the group of experts 0 and 1
        assert counts[0] == counts[1] == valid.sum()


def balance_by_a_loop(scores, experts, valid):
    """sum_i f_i P_i, row by row, from equations 17 to 20 of the DeepSeek-V3 report."""
    B, T, E = scores.shape
    A = experts.shape[-1]
    rows = np.zeros(B)
    for b in range(B):
        tokens = [t for t in range(T) if valid[b, t]]
        for i in range(E):
            f = E / (A * len(tokens)) * sum(i in experts[b, t] for t in tokens)
            P = sum(scores[b, t, i] / scores[b, t].sum() for t in tokens) / len(tokens)
            rows[b] += f * P
    return rows


def test_balance_loss_equals_a_loop_and_ignores_padding():
    rng = np.random.default_rng(1)
    scores = rng.uniform(0.05, 1.0, (3, 7, 8)).astype(np.float32)
    experts = np.stack([rng.permutation(8)[:3] for _ in range(21)]).reshape(3, 7, 3).astype(np.int32)
    valid = np.ones((3, 7), bool)
    valid[1, 4:] = False
    ours = balance_loss(jnp.asarray(scores), jnp.asarray(experts), jnp.asarray(valid))
    np.testing.assert_allclose(ours, balance_by_a_loop(scores.astype(np.float64), experts, valid), rtol=1e-5)


def test_balance_loss_is_1_for_even_loads_and_more_for_uneven_ones():
    even = jnp.asarray([[[0, 1], [2, 3]]], jnp.int32)
    everywhere = jnp.ones((1, 2), bool)
    np.testing.assert_allclose(balance_loss(jnp.full((1, 2, 4), 0.3), even, everywhere), 1.0, rtol=1e-6)
    scores = jnp.asarray([[[0.9, 0.8, 0.1, 0.2]] * 2])
    assert balance_loss(scores, jnp.zeros((1, 2, 2), jnp.int32).at[..., 1].set(1), everywhere)[0] > 1.5


def test_padding_alone_has_no_balance_loss():
    nothing = balance_loss(jnp.ones((1, 2, 4)), jnp.zeros((1, 2, 2), jnp.int32), jnp.zeros((1, 2), bool))
    np.testing.assert_array_equal(nothing, 0.0)
