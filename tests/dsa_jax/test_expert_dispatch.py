"""Dispatch and combine: the same sums and gradients as on one device, whichever experts the tokens choose."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax import expert_dispatch
from dsa_jax.config import tiny
from dsa_jax.expert_dispatch import MIN_CAPACITY, capacity_and_rounds
from dsa_jax.moe import Moe, moe
from dsa_jax.sharding import expert_devices, make_mesh

CONFIG = tiny(d_model=32, d_expert=16, dtype="float32")  # 8 experts in 4 groups, 3 per token
BIAS = {
    "as they come": np.zeros(8),
    "all on the first device": np.r_[[9, 9, 9, 9], [0] * 4],
    "all on the last device, from two groups": np.r_[[0] * 4, [9, 9, 9, 9]],
    "one expert in every choice": np.r_[[0] * 5, 9, [0] * 2],
}


@functools.cache
def inputs(T):
    parameters = Moe(CONFIG).init(jax.random.key(0))["params"]
    return parameters, jax.random.normal(jax.random.key(1), (4, T, CONFIG.d_model))


def run(T, bias, mesh=None):
    parameters, x = inputs(T)
    parameters = parameters | {"gate_bias": jnp.asarray(bias, jnp.float32)}

    @jax.jit
    def loss_and_gradients(parameters, x):
        def loss(parameters, x):
            y, aux = moe(x, jnp.ones(x.shape[:2], bool), parameters, CONFIG)
            return jnp.sin(y).sum(), (y, aux["experts"], aux["expert_load"])

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(parameters, x)

    if mesh is None:
        return jax.device_get(loss_and_gradients(parameters, x))
    with jax.set_mesh(mesh):
        assert expert_devices(x.shape[0]) == mesh.shape["expert"]
        return jax.device_get(loss_and_gradients(parameters, x))


@pytest.mark.devices(4, 8)
def test_broken_tokens_leave_the_other_tokens_as_they_were():
    """Not even through the places of other rounds, which are read with a weight of 0. One is first in its queue."""
    parameters, x = inputs(24)
    parameters = parameters | {"gate_bias": jnp.asarray(BIAS["all on the first device"], jnp.float32)}
    broken = np.array([True, False, True, False])  # rows: one on each device

    @jax.jit
    def run(x):
        y, pull = jax.vjp(lambda x: moe(x, jnp.ones(x.shape[:2], bool), parameters, CONFIG)[0], x)
        return y, pull(jnp.where(broken[:, None, None], 0.0, jnp.ones_like(y)))[0]

    with jax.set_mesh(make_mesh(expert=2, tensor=2, devices=jax.devices()[:4])):
        expected = jax.device_get(run(x))
        found = jax.device_get(run(jnp.where(broken[:, None, None], 1e30, x)))  # their experts overflow
    assert not np.isfinite(found[0][broken]).any()
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours[~broken], theirs[~broken], rtol=1e-5, atol=1e-5)


@pytest.mark.devices(4, 8)
@pytest.mark.parametrize("bias", BIAS)
def test_sums_and_gradients_are_those_of_one_device(bias):
    T = 24
    dispatched = run(T, BIAS[bias], make_mesh(expert=2, tensor=2, devices=jax.devices()[:4]))
    alone = run(T, BIAS[bias])
    if "all" in bias:  # the case needs more than one round, as intended
        load = alone[0][1][2]
        assert sorted(load)[:4] == [0] * 4 and load.sum() > capacity_and_rounds(2 * T, 3, 4, 2)[0]
    for ours, expected in zip(jax.tree.leaves(dispatched), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * max(np.abs(expected).max(), 1e-3))


@pytest.mark.devices(2, 4, 8)
def test_tokens_in_blocks_the_last_one_padded(monkeypatch):
    eight_of_twenty = 2 * 8 * 3 * CONFIG.d_model * 4  # bytes of 8 tokens of each of 2 rows
    monkeypatch.setattr(expert_dispatch, "BLOCK_BYTES", eight_of_twenty)
    dispatched = run(20, BIAS["as they come"], make_mesh(expert=2, devices=jax.devices()[:2]))
    for ours, expected in zip(*(jax.tree.leaves(x) for x in (dispatched, run(20, np.zeros(8)))), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * max(np.abs(expected).max(), 1e-3))


@pytest.mark.devices(4, 8)
def test_one_token_per_device():
    dispatched = run(1, BIAS["as they come"], make_mesh(expert=4, devices=jax.devices()[:4]))
    for ours, expected in zip(*(jax.tree.leaves(x) for x in (dispatched, run(1, np.zeros(8)))), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * max(np.abs(expected).max(), 1e-3))


@pytest.mark.devices(8)
def test_tokens_that_all_devices_have_are_not_dispatched():
    with jax.set_mesh(make_mesh(expert=8)):
        assert expert_devices(8) == 8 and expert_devices(4) == 1
    assert expert_devices(8) == 1


@pytest.mark.parametrize("tokens", [1, 7, 64, 4096])
@pytest.mark.parametrize(("A", "n_held", "n_devices"), [(8, 4, 64), (8, 128, 2), (3, 1, 8), (1, 1, 2)])
def test_enough_rounds_even_if_all_tokens_go_to_one_device(tokens, A, n_held, n_devices):
    capacity, rounds = capacity_and_rounds(tokens, A, n_held, n_devices)
    longest = tokens * min(A, n_held)
    assert capacity * rounds >= longest > capacity * (rounds - 1)
    assert capacity <= max(MIN_CAPACITY, 2 * tokens * A // n_devices)
