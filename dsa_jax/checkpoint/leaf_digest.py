"""A digest of an array that does not depend on how the array is spread over devices, hosts or files.

Each element is one 32-bit word (narrower ones are widened, bit by bit). A word and its position in the whole array are
mixed by a bijection, and the results are added modulo 2^32. Sums of integers have no order, so each device adds up what
it holds, without moving an array, and another mesh gives the same digest. One changed word always changes the first
sum. Several changed words escape both sums with a probability of about 2^-64.

The same formula runs under `jax.jit` where the arrays are, and in NumPy on what is in the host's memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32}
_OFFSET = np.uint32(0x9E3779B9)
_BLOCK = 2**19  # elements that NumPy works on at a time: its intermediate results then stay in the cache


def leaf_digests(arrays: Mapping[str, jax.Array | np.ndarray]) -> dict[str, str]:
    """Name -> digest of each array, computed where it is. With several processes all must call it together."""
    # One after the other: of programs that run at the same time, two processes may begin different ones first, and each
    # then waits for the other's part of the sum.
    return {name: _text(array, np.asarray(_sums_where_it_is(array))) for name, array in arrays.items()}


class PartialDigest:
    """The digest of an array of which one region after another is added; every element exactly once."""

    def __init__(self, shape: Sequence[int], dtype: np.dtype) -> None:
        self.shape, self.dtype = tuple(shape), dtype
        self.sums = np.zeros(2, np.uint32)

    def add(self, values: np.ndarray, start: Sequence[int]) -> None:
        """values: the region whose first element is at the position ``start`` of the whole array."""
        if values.size > _BLOCK:
            axis = int(np.argmax(values.shape))
            middle = values.shape[axis] // 2
            first, second = np.split(values, [middle], axis)
            self.add(first, start)
            self.add(second, (*start[:axis], start[axis] + middle, *start[axis + 1 :]))
            return
        words = np.ascontiguousarray(values).view(_word_type(values.dtype)).reshape(values.shape)
        with np.errstate(over="ignore"):  # of scalars; arrays wrap around without a word
            self.sums = self.sums + _sums(words, start, self.shape, np)

    def text(self) -> str:
        return _text(self, self.sums)


def _sums(words: Any, start: Sequence[int], shape: Sequence[int], xp: Any) -> Any:
    """Both sums, uint32 [2], of the words at start ... start + words.shape of an array of this shape.

    xp: numpy or jax.numpy. The mixing is the finaliser of MurmurHash3 (A. Appleby, in the public domain).
    """
    position = xp.zeros((), np.uint32)
    for axis, size in enumerate(words.shape):
        stride = math.prod(shape[axis + 1 :])
        along = xp.arange(size, dtype=np.uint32) * np.uint32(stride % 2**32)
        along = along + np.uint32(start[axis] * stride % 2**32)
        position = position + along.reshape((size,) + (1,) * (len(words.shape) - axis - 1))
    mixed = _mix(words.astype(np.uint32) ^ _mix(position + _OFFSET))
    return xp.stack([mixed.sum(dtype=np.uint32), _mix(mixed + _OFFSET).sum(dtype=np.uint32)])


def _mix(x: Any) -> Any:
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def _sums_where_it_is(array: jax.Array | np.ndarray) -> Any:
    if isinstance(array, np.ndarray):
        whole = PartialDigest(array.shape, array.dtype)
        whole.add(array, (0,) * array.ndim)
        return whole.sums
    on_cpu = all(device.platform == "cpu" for device in array.devices())
    if not (on_cpu and array.is_fully_addressable):
        return _sums_on(array.sharding.mesh if isinstance(array.sharding, NamedSharding) else None)(array)
    partial = PartialDigest(array.shape, array.dtype)  # in the host's memory already: nothing to compile
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            partial.add(np.asarray(shard.data), [axis.start or 0 for axis in shard.index])
    return partial.sums


@functools.cache
def _sums_on(mesh: Mesh | None) -> Any:
    """The sums of a whole array; on a mesh each device has them."""

    def of_array(array: jax.Array) -> jax.Array:
        words = jax.lax.bitcast_convert_type(array, _word_type(array.dtype))
        return _sums(words, (0,) * array.ndim, array.shape, jnp)

    return jax.jit(of_array, out_shardings=NamedSharding(mesh, PartitionSpec()) if mesh else None)


def _word_type(dtype: Any) -> Any:
    if dtype.itemsize not in _WORDS:
        raise NotImplementedError(f"a digest takes elements of 1, 2 or 4 bytes, got {dtype}")
    return _WORDS[dtype.itemsize]


def _text(array: Any, sums: np.ndarray) -> str:
    """As in "float32[40,32] 0123456789abcdef"."""
    return f"{array.dtype}[{','.join(map(str, array.shape))}] {int(sums[0]):08x}{int(sums[1]):08x}"
