"""Block quantization: what the kernels will compute with, and how far it is from the weight."""

from __future__ import annotations

from dataclasses import astuple, replace

import numpy as np
import pytest

from pilotlight_export.quantize import Floats, dequantize_blocks, dequantize_columns, quantize_blocks, quantize_columns
from pilotlight_export.recipes import Blocks, Columns

INT4 = Blocks(bits=4)
INT4_FITTED = Blocks(bits=4, zero_point="fitted")
INT8 = Blocks(bits=8)
INT8_FITTED = Blocks(bits=8, zero_point="fitted")
SCHEMES = [INT4, INT4_FITTED, INT8, INT8_FITTED]


def random_weight(rows: int = 48, columns: int = 96) -> Floats:
    return np.random.default_rng(11).standard_normal((rows, columns)).astype(np.float32)


def mean_square(difference: Floats) -> float:
    return float((difference * difference).mean())


def error_of(weight: Floats, scheme: Blocks) -> float:
    return mean_square(dequantize_blocks(quantize_blocks(weight, scheme), scheme) - weight)


@pytest.mark.parametrize(("scheme", "blob_bytes"), [(INT4, 16), (INT8, 32)])
def test_shapes_are_those_of_the_kernel(scheme: Blocks, blob_bytes: int) -> None:
    quantized = quantize_blocks(random_weight(), scheme)
    assert quantized.packed.shape == (48, 3, blob_bytes)
    assert quantized.packed.dtype == np.uint8
    assert quantized.scales.shape == (48, 3)
    assert quantized.scales.dtype == np.float16
    assert quantized.zero_points is None


def test_two_zero_points_share_a_byte_and_an_odd_one_has_its_own() -> None:
    assert quantize_blocks(random_weight(), INT4_FITTED).zero_points.shape == (48, 2)  # type: ignore[union-attr]
    assert quantize_blocks(random_weight(), INT8_FITTED).zero_points.shape == (48, 3)  # type: ignore[union-attr]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_searched_scales_beat_rounding_to_nearest(scheme: Blocks) -> None:
    assert error_of(random_weight(), scheme) < error_of(random_weight(), replace(scheme, scales="nearest"))


def test_fitted_zero_points_beat_symmetric_ones() -> None:
    lopsided = random_weight() + np.float32(0.5)
    assert error_of(lopsided, INT4_FITTED) < 0.8 * error_of(lopsided, INT4)
    assert error_of(random_weight(), INT4_FITTED) < error_of(random_weight(), INT4)


def test_important_columns_are_kept_better() -> None:
    weight, importance = random_weight(), np.ones(96, np.float32)
    importance[::8] = 100
    plain, weighted = (
        dequantize_blocks(quantize_blocks(weight, INT4, chosen), INT4) - weight for chosen in (None, importance)
    )
    assert mean_square(weighted[:, ::8]) < 0.7 * mean_square(plain[:, ::8])
    assert mean_square(weighted) > mean_square(plain)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_on_the_grid_survive_exactly(scheme: Blocks) -> None:
    middle = 2 ** (scheme.bits - 1)
    integers = np.linspace(-middle, middle - 1, scheme.block_size).round()
    weight = np.tile(integers, (16, 2)).astype(np.float32) / np.float32(8)
    np.testing.assert_array_equal(dequantize_blocks(quantize_blocks(weight, scheme), scheme), weight)


def test_first_of_two_values_lies_in_the_low_bits() -> None:
    weight = np.zeros((1, 32), np.float32)
    weight[0, :2] = [-8, 3]
    assert quantize_blocks(weight, INT4).packed[0, 0, 0] == (3 + 8) << 4 | (-8 + 8)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zeros_stay_zeros(scheme: Blocks) -> None:
    weight = np.zeros((4, 64), np.float32)
    np.testing.assert_array_equal(dequantize_blocks(quantize_blocks(weight, scheme), scheme), weight)


def test_large_weights_are_quantized_in_groups_of_rows_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quantize_blocks(random_weight(), INT4_FITTED)
    monkeypatch.setattr("pilotlight_export.quantize.ROWS_AT_ONCE", 7)
    grouped = quantize_blocks(random_weight(), INT4_FITTED)
    for part, expected in zip(astuple(grouped), astuple(whole), strict=True):
        np.testing.assert_array_equal(part, expected)


def test_columns_have_one_scale_each_and_stay_within_the_limit() -> None:
    weight = random_weight() * np.geomspace(0.01, 100, 48, dtype=np.float32)[:, None]
    quantized = quantize_columns(weight, Columns())
    assert quantized.integers.shape == (96, 48)
    assert quantized.integers.dtype == np.int8
    assert np.abs(quantized.integers).max(axis=0).tolist() == [63] * 48
    largest = np.abs(weight).max(axis=1, keepdims=True)
    assert np.all(np.abs(dequantize_columns(quantized) - weight) <= largest / 126 * 1.001)
