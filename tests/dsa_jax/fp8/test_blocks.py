"""FP8 blocks of stored weights: the block is 128 whatever the shape, and release values survive."""

import ml_dtypes
import numpy as np
import pytest

from dsa_jax.fp8.blocks import dequantize_blocks, quantize_blocks


def random(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_each_row_and_column_uses_the_scale_of_its_128_block() -> None:
    values = random((576, 300)).astype(ml_dtypes.float8_e4m3fn)
    scales = np.abs(random((5, 3), seed=1)) + 0.5
    weights = dequantize_blocks(values, scales)
    for row, column in [(0, 0), (127, 127), (128, 128), (511, 255), (512, 256), (575, 299)]:
        expected = np.float32(values[row, column]) * scales[row // 128, column // 128]
        assert weights[row, column] == expected


def test_rows_divisible_by_the_number_of_scale_rows_are_not_taken_for_smaller_blocks() -> None:
    # 160 rows with 2 scale rows: blocks of 128 and 32 rows, not of 80 and 80.
    weights = dequantize_blocks(np.ones((160, 128), ml_dtypes.float8_e4m3fn), np.float32([[1.0], [2.0]]))
    np.testing.assert_array_equal(weights[:, 0], np.repeat(np.float32([1.0, 2.0]), [128, 32]))


@pytest.mark.parametrize("shape", [(4, 56), (6, 56), (5, 55), (56, 5), (5,)])
def test_scales_of_another_shape_are_refused(shape) -> None:
    with pytest.raises(ValueError, match=r"\(576, 7168\).*\(5, 56\)"):
        dequantize_blocks(np.zeros((576, 7168), ml_dtypes.float8_e4m3fn), np.ones(shape, np.float32))


@pytest.mark.parametrize("scale_fmt", ["ue8m0", None])
@pytest.mark.parametrize("shape", [(128, 128), (160, 256), (5, 300), (1, 1), (576, 130)])
def test_quantisation_is_off_by_at_most_half_a_step(shape, scale_fmt) -> None:
    weights = random(shape)
    values, scales = quantize_blocks(weights, scale_fmt=scale_fmt)
    assert values.dtype == ml_dtypes.float8_e4m3fn and scales.dtype == np.float32
    full = np.repeat(np.repeat(scales, 128, 0), 128, 1)[: shape[0], : shape[1]]
    error = np.abs(dequantize_blocks(values, scales) - weights)
    # Three mantissa bits: half a step is 2^-4 of the value, 2^-10 of the scale among the subnormals.
    assert (error <= np.maximum(np.abs(weights) * 2.0**-4, full * 2.0**-10) * (1 + 1e-6)).all()


def test_ue8m0_scales_are_the_smallest_powers_of_two_that_fit() -> None:
    weights = np.repeat(np.float32([448.0, 448.001, 1.0, 1.75 * 2.0**-20]), 128)[:, None]
    _, scales = quantize_blocks(weights, scale_fmt="ue8m0")
    np.testing.assert_array_equal(scales[:, 0], np.float32([1.0, 2.0, 2.0**-8, 2.0**-22]))


def test_power_of_two_rounding_is_exact_at_every_exponent() -> None:
    for exponent in range(-21, 100):
        power = np.float32(2.0**exponent)
        amax = np.float32([power, np.nextafter(power, np.float32(np.inf))]) * np.float32(448.0)
        _, scales = quantize_blocks(np.repeat(amax, 128)[:, None], scale_fmt="ue8m0")
        assert scales[0, 0] == power and scales[1, 0] == 2 * power


def test_the_padding_of_a_ragged_block_does_not_change_its_scale() -> None:
    weights = random((160, 128))
    weights[128:] *= 1e-3
    _, scales = quantize_blocks(weights, scale_fmt=None)
    assert scales[1, 0] == np.abs(weights[128:]).max() / np.float32(448.0)


def test_a_block_of_zeros_stays_zero() -> None:
    values, scales = quantize_blocks(np.zeros((130, 2), np.float32), scale_fmt="ue8m0")
    assert (scales > 0).all() and not dequantize_blocks(values, scales).any()


def test_quantising_again_changes_no_value() -> None:
    once = dequantize_blocks(*quantize_blocks(random((200, 200)), scale_fmt="ue8m0"))
    again = dequantize_blocks(*quantize_blocks(once, scale_fmt="ue8m0"))
    np.testing.assert_array_equal(once, again)
    np.testing.assert_array_equal(once, once.astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(bad) -> None:
    weights = random((4, 4))
    weights[1, 2] = bad
    with pytest.raises(ValueError, match="finite"):
        quantize_blocks(weights, scale_fmt="ue8m0")
