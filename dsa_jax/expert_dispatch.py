"""Experts on other devices: every token goes to the devices of its experts and comes back as their outputs.

Devices that hold other experts hold other tokens too. They exchange rows with ``all_to_all``, whose buffers have a
fixed size: what does not fit goes in a further round, so that no token is dropped however unevenly the experts are
chosen. One round is enough while no device gets more than SPARE times its share from another.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsa_jax.sharding import AXES, EXPERT_AXIS
from pallas_kernels.blocking import block_size, map_query_blocks

SPARE = 1.5  # a buffer's rows over the mean that one device sends another in a round
FEWEST = 8  # rows of a buffer: a few tokens never spread evenly
BLOCK_BYTES = 2**30  # of rows that a device sends at a time

Parameters = Mapping[str, Any]
Experts = Callable[[Float[Array, "R D"], Int[Array, " R"]], Float[Array, "R D"]]


def exchanged(
    x: Float[Array, "B T D"],
    experts: Int[Array, "B T A"],
    weights: Float[Array, "B T A"],
    n_held: int,
    n_devices: int,
    apply: Experts,
) -> Float[Array, "B T D"]:
    """Weighted sum over each token's experts, float32; inside ``shard_map``, with other tokens along EXPERT_AXIS.

    Device d of the ``n_devices`` along that axis holds the experts d n_held .. (d + 1) n_held - 1. ``apply`` gives the
    outputs of its own for rows and their experts, counted from 0; n_held means none, and any output.
    """
    B, T, D = x.shape
    A = experts.shape[-1]
    block = block_size(T, B * A * D * x.dtype.itemsize, BLOCK_BYTES)

    def one_block(x, experts, weights):
        experts = jnp.maximum(experts, 0)  # -1 pads the last block, with rows of 0 and weights of 0
        rows, chosen, shares = (array.reshape(-1, array.shape[-1]) for array in (x, experts, weights))
        return _exchange(rows, chosen, shares, n_held, n_devices, apply).reshape(x.shape)

    return map_query_blocks(one_block, block, x, experts, weights)


def buffer_rows(tokens: int, A: int, n_held: int, n_devices: int) -> tuple[int, int]:
    """(rows of the buffer from one device to another, rounds that suffice whatever the experts are)."""
    most = tokens * min(A, n_held)
    rows = min(max(-int(-SPARE * tokens * A // n_devices), FEWEST), most)
    return rows, -(-most // rows)


def _exchange(x, experts, weights, n_held, n_devices, apply):
    (M, A), size = experts.shape, x.shape[-1]
    rows, most_rounds = buffer_rows(M, A, n_held, n_devices)

    # A queue of (token, expert) pairs for each device.
    chosen = experts.reshape(-1)
    device = chosen // n_held
    by_device = jnp.argsort(chosen, stable=True)
    length = jnp.bincount(device, length=n_devices)
    first = jnp.cumsum(length) - length
    place = jnp.argsort(by_device) - first[device]
    rounds = lax.pmax(-(-length.max() // rows), AXES)  # the same everywhere: all take part in an exchange

    def one_round(i, x, weights):
        nth = i * rows + jnp.arange(rows)
        filled = nth < length[:, None]
        pair = by_device[jnp.minimum(first[:, None] + nth, M * A - 1)]
        sent = jnp.where(filled[..., None], x[pair // A], 0)
        wanted = jnp.where(filled, chosen[pair] % n_held, n_held)
        sent, wanted = (_swap(array) for array in (sent, wanted))
        outputs = _swap(apply(sent.reshape(-1, size), wanted.reshape(-1)).reshape(sent.shape))

        now = (place >= i * rows) & (place < (i + 1) * rows)
        at = jnp.where(now, device * rows + place - i * rows, 0)
        found = outputs.reshape(-1, size)[at].reshape(M, A, size)
        return (found.astype(jnp.float32) * jnp.where(now.reshape(M, A), weights, 0.0)[..., None]).sum(axis=1)

    # Around the condition: inside, it would hand every round's copy of the experts to the backward pass.
    @jax.checkpoint
    def round_if_needed(i, x, weights):
        skip = lambda i, x, weights: jnp.zeros(x.shape, jnp.float32)  # noqa: E731
        return lax.cond(i < rounds, one_round, skip, i, x, weights)

    total = jax.checkpoint(one_round)(0, x, weights)
    if most_rounds == 1:
        return total
    add = lambda total, i: (total + round_if_needed(i, x, weights), None)  # noqa: E731
    return lax.scan(add, total, jnp.arange(1, most_rounds))[0]


def _swap(array: Array) -> Array:
    """Row d goes to device d; what comes back in row d is from device d."""
    return lax.all_to_all(array, EXPERT_AXIS, split_axis=0, concat_axis=0)
