"""Dispatch and combine: tokens go to the devices that hold their experts, and the experts' outputs come back.

Along the mesh axis "expert" the devices hold different experts and different tokens. Each device keeps one queue per
device, with the (token, expert) pairs to be sent there. ``all_to_all`` needs buffers of a fixed size, so every device
sends at most ``capacity`` pairs of each queue at a time: it dispatches them, the receivers apply their experts, and
the outputs return. That is one round. Rounds are repeated until the longest queue is empty, so no token is dropped,
however unevenly the experts are chosen. One round is enough while no queue is longer than CAPACITY_FACTOR times the
mean.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsa_jax.sharding import AXES, EXPERT_AXIS
from pallas_kernels.blocking import block_size, map_query_blocks

CAPACITY_FACTOR = 1.5  # capacity over the mean length of a queue
MIN_CAPACITY = 8  # pairs; with few tokens the queues are never even
BLOCK_BYTES = 2**30  # of the pairs' hidden states that a device dispatches at a time

Experts = Callable[[Float[Array, "R D"], Int[Array, " R"]], Float[Array, "R D"]]


def dispatch_and_combine(
    x: Float[Array, "B T D"],
    experts: Int[Array, "B T A"],
    weights: Float[Array, "B T A"],
    n_held: int,
    n_devices: int,
    apply: Experts,
) -> Float[Array, "B T D"]:
    """Weighted sum of the outputs of each token's experts, float32.

    Runs inside ``shard_map``, where the ``n_devices`` devices along EXPERT_AXIS have different tokens. Device d holds
    the experts d n_held .. (d + 1) n_held - 1.

    Args:
      experts: -1 is no expert of a padded token, whose weight is 0.
      apply: the outputs of this device's experts, from hidden states and the number of the expert of each, counted
        from 0. The number n_held marks an empty place of a buffer, whose output is not read.
    """
    B, T, D = x.shape
    A = experts.shape[-1]
    block = block_size(T, B * A * D * x.dtype.itemsize, BLOCK_BYTES)

    def one_block(x: jax.Array, experts: jax.Array, weights: jax.Array) -> jax.Array:
        experts = jnp.maximum(
            experts, 0
        )  # -1 pads the last block of tokens, with hidden states and weights of 0
        tokens, chosen, shares = (array.reshape(-1, array.shape[-1]) for array in (x, experts, weights))
        return _all_rounds(tokens, chosen, shares, n_held, n_devices, apply).reshape(x.shape)

    return map_query_blocks(one_block, block, x, experts, weights)


def capacity_and_rounds(n_tokens: int, A: int, n_held: int, n_devices: int) -> tuple[int, int]:
    """(capacity in pairs, the number of rounds that empties the longest possible queue)."""
    longest = n_tokens * min(A, n_held)
    capacity = min(max(-int(-CAPACITY_FACTOR * n_tokens * A // n_devices), MIN_CAPACITY), longest)
    return capacity, -(-longest // capacity)


def _all_rounds(
    x: Float[Array, "M D"],
    experts: Int[Array, "M A"],
    weights: Float[Array, "M A"],
    n_held: int,
    n_devices: int,
    apply: Experts,
) -> Float[Array, "M D"]:
    (M, A), D = experts.shape, x.shape[-1]
    capacity, max_rounds = capacity_and_rounds(M, A, n_held, n_devices)

    # Pairs are numbered token * A + choice. Sorted by expert, they are also sorted by device: queue after queue.
    chosen = experts.reshape(-1)
    device = chosen // n_held
    queues = jnp.argsort(chosen, stable=True)
    length = jnp.bincount(device, length=n_devices)
    first = jnp.cumsum(length) - length
    place = jnp.argsort(queues) - first[device]  # of each pair in its queue
    n_rounds = lax.pmax(
        -(-length.max() // capacity), AXES
    )  # the same on all devices: all_to_all needs all of them

    def one_round(i: jax.Array | int, x: jax.Array, weights: jax.Array) -> jax.Array:
        nth = i * capacity + jnp.arange(capacity)
        filled = nth < length[:, None]
        pair = queues[jnp.minimum(first[:, None] + nth, M * A - 1)]
        sent = jnp.where(filled[..., None], x[pair // A], 0)
        wanted = jnp.where(filled, chosen[pair] % n_held, n_held)
        sent, wanted = (_swap(array) for array in (sent, wanted))
        outputs = _swap(apply(sent.reshape(-1, D), wanted.reshape(-1)).reshape(sent.shape))

        now = (place >= i * capacity) & (place < (i + 1) * capacity)
        at = jnp.where(now, device * capacity + place - i * capacity, 0)
        found = jnp.where(now[:, None], outputs.reshape(-1, D)[at], 0).reshape(M, A, D)
        return (found.astype(jnp.float32) * jnp.where(now.reshape(M, A), weights, 0.0)[..., None]).sum(axis=1)

    # The checkpoint is around the condition: inside it, every round would save a copy of the experts' weights.
    @jax.checkpoint
    def round_if_needed(i: jax.Array, x: jax.Array, weights: jax.Array) -> jax.Array:
        skip = lambda i, x, weights: jnp.zeros(x.shape, jnp.float32)  # noqa: E731
        return lax.cond(i < n_rounds, one_round, skip, i, x, weights)

    if max_rounds == 1:
        return jax.checkpoint(one_round)(0, x, weights)
    # The first round is always needed, and yet in the loop. Outside of it, nothing would order its all_to_all before
    # those of the next round, and XLA on CPU mixes up collectives of one kind that run at the same time
    # (docs/scaling.md, "Simulated devices").
    add = lambda total, i: (total + round_if_needed(i, x, weights), None)  # noqa: E731
    return lax.scan(add, jnp.zeros((M, D), jnp.float32), jnp.arange(max_rounds))[0]


def _swap(array: Array) -> Array:
    """Part d of axis 0 goes to device d, and part d of the result comes from device d."""
    return lax.all_to_all(array, EXPERT_AXIS, split_axis=0, concat_axis=0)
