"""One definition of the FP8 format: NumPy (stored weights) and JAX (activations) make the same scales."""

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import dsa_jax
from dsa_jax.fp8.e4m3 import BLOCK, E4M3_MAX, SMALLEST_AMAX, power_of_two_at_least, scale_of
from dsa_jax.fp8.quantize import quantize


def every_exponent() -> np.ndarray:
    """Each normal float32 power of two below 2^127, the numbers next to it, and one in between."""
    powers = np.exp2(np.arange(-125, 127, dtype=np.float64)).astype(np.float32)
    neighbours = [np.nextafter(powers, np.float32(side)) for side in (0.0, np.inf)]
    return np.concatenate([powers, *neighbours, 1.5 * powers])


def test_the_largest_value_is_that_of_the_dtype() -> None:
    assert float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max) == E4M3_MAX


def test_rounding_up_to_a_power_of_two_is_exact_in_numpy_and_jax() -> None:
    x = every_exponent()
    mantissa, exponent = np.frexp(x)
    expected = np.ldexp(np.float32(1.0), exponent - (mantissa == 0.5))
    np.testing.assert_array_equal(power_of_two_at_least(x), expected)
    np.testing.assert_array_equal(jax.jit(power_of_two_at_least)(jnp.asarray(x)), expected)


@pytest.mark.parametrize("ue8m0", [True, False])
def test_numpy_and_jax_make_the_same_scales(ue8m0) -> None:
    powers = every_exponent()
    amax = np.concatenate(
        [np.float32([0.0, SMALLEST_AMAX / 2, SMALLEST_AMAX]), powers, powers[:200] * E4M3_MAX]
    )
    scales = scale_of(amax, ue8m0=ue8m0)
    assert scales.dtype == np.float32 and (scales[:3] == scales[0]).all() and scales[0] > 0
    # XLA multiplies by 1 / 448, which may differ from a division in the last bit; rounded up, nothing is left of it.
    limit = 0 if ue8m0 else 1
    np.testing.assert_array_max_ulp(np.asarray(scale_of(jnp.asarray(amax), ue8m0=ue8m0)), scales, limit)


def test_the_scale_of_an_activation_is_that_of_its_largest_magnitude() -> None:
    x = np.random.default_rng(0).standard_normal((3, 2 * BLOCK)).astype(np.float32)
    _, scales = quantize(jnp.asarray(x))
    np.testing.assert_array_equal(scales, scale_of(np.abs(x).reshape(3, 2, BLOCK).max(-1), ue8m0=True))


def test_the_constants_are_defined_once() -> None:
    package = Path(dsa_jax.__file__).parent
    constants = {E4M3_MAX, SMALLEST_AMAX}
    found = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and isinstance(node.value, ast.Constant)
        and node.value.value in constants
    }
    assert found == {"fp8/e4m3.py"}
