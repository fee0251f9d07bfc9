"""Digests of leaves: equal for equal bits however the array is spread, different for every other array."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dsa_jax.checkpoint.leaf_digest import PartialDigest, _sums_on, leaf_digests

DTYPES = ("float32", "bfloat16", "float8_e4m3fn", "int32", "uint8")


def random(shape, dtype="float32", seed=0):
    bits = np.random.default_rng(seed).integers(0, 256, (*shape, jnp.dtype(dtype).itemsize), np.uint8)
    return bits.view(jnp.dtype(dtype))[..., 0]


def of(array):
    whole = PartialDigest(array.shape, array.dtype)
    whole.add(array, (0,) * array.ndim)
    return whole.text()


def plain(array):
    """The formula in Python's integers, element by element."""

    def mix(x):
        x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
        x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
        return x ^ x >> 16

    words = np.ascontiguousarray(array).reshape(-1).view(f"u{array.dtype.itemsize}").tolist()
    mixed = [mix(word ^ mix((i + 0x9E3779B9) % 2**32)) for i, word in enumerate(words)]
    sums = sum(mixed) % 2**32, sum(mix((x + 0x9E3779B9) % 2**32) for x in mixed) % 2**32
    return f"{array.dtype}[{','.join(map(str, array.shape))}] {sums[0]:08x}{sums[1]:08x}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (7,), (3, 1, 5)])
def test_the_device_and_numpy_compute_the_formula(shape, dtype):
    array = random(shape, dtype)
    on_device = np.asarray(_sums_on(None)(jnp.asarray(array)))
    assert of(array) == plain(array) == leaf_digests({"x": jnp.asarray(array)})["x"]
    assert plain(array).endswith(f"{on_device[0]:08x}{on_device[1]:08x}")


@pytest.mark.devices(8)
@pytest.mark.parametrize("spec", [P(), P("a"), P(None, "b"), P("b", "a"), P(("a", "b"))])
def test_every_sharding_gives_the_digest_of_the_whole(spec):
    """Both ways: summed up on the host, and by the devices themselves."""
    array = random((8, 16))
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharded = jax.device_put(array, NamedSharding(mesh, spec))
    on_device = np.asarray(_sums_on(mesh)(sharded))
    assert leaf_digests({"x": sharded})["x"] == of(array)
    assert of(array).endswith(f"{on_device[0]:08x}{on_device[1]:08x}")


@settings(max_examples=200, deadline=None)
@given(bit=st.integers(0, 12 * 10 * 32 - 1))
def test_every_flipped_bit_changes_the_digest(bit):
    array = random((12, 10))
    changed = array.copy()
    changed.reshape(-1).view(np.uint8)[bit // 8] ^= 1 << bit % 8
    assert of(changed) != of(array)


def test_moved_elements_and_other_shapes_and_dtypes_change_the_digest():
    array = random((6, 4))
    others = [array.reshape(4, 6), array[::-1], np.roll(array, 1), array.view(np.int32), -array]
    assert len({of(other) for other in [array, *others]}) == 6
    assert of(np.zeros(3, np.float32)) != of(-np.zeros(3, np.float32))  # equal numbers, other bits


def test_large_regions_are_cut_and_regions_may_come_in_any_order(monkeypatch):
    array = random((9, 11, 5))
    monkeypatch.setattr("dsa_jax.checkpoint.leaf_digest._BLOCK", 7)
    parts = PartialDigest(array.shape, array.dtype)
    parts.add(array[4:, 3:], (4, 3, 0))
    parts.add(array[:4], (0, 0, 0))
    parts.add(array[4:, :3], (4, 0, 0))
    assert parts.text() == plain(array)
