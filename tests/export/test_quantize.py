"""Block quantization: what the kernels will compute with, and how far it is from the weight."""

from __future__ import annotations

import numpy as np
import pytest

from pilotlight_export.quantize import RECIPES, Floats, Recipe, Scheme, dequantize, quantize

INT4 = Scheme(bits=4, block_size=32)
INT8 = Scheme(bits=8, block_size=32)


def random_weight(rows: int = 48, columns: int = 96) -> Floats:
    return np.random.default_rng(11).standard_normal((rows, columns)).astype(np.float32)


def round_to_nearest(weight: Floats, scheme: Scheme) -> Floats:
    blocks = weight.reshape(len(weight), -1, scheme.block_size)
    scales = np.abs(blocks).max(axis=-1, keepdims=True) / (scheme.zero_point - 1)
    rounded: Floats = (np.rint(blocks / scales) * scales).reshape(weight.shape).astype(np.float32)
    return rounded


def mean_square(difference: Floats) -> float:
    return float((difference * difference).mean())


@pytest.mark.parametrize(("scheme", "blob_bytes"), [(INT4, 16), (INT8, 32)])
def test_shapes_are_those_of_the_kernel(scheme: Scheme, blob_bytes: int) -> None:
    quantized = quantize(random_weight(), scheme)
    assert quantized.packed.shape == (48, 3, blob_bytes)
    assert quantized.packed.dtype == np.uint8
    assert quantized.scales.shape == (48, 3)


@pytest.mark.parametrize("scheme", [INT4, INT8])
def test_searched_scales_beat_rounding_to_the_full_range(scheme: Scheme) -> None:
    weight = random_weight()
    error = mean_square(dequantize(quantize(weight, scheme), scheme) - weight)
    assert error < mean_square(round_to_nearest(weight, scheme) - weight)


@pytest.mark.parametrize("scheme", [INT4, INT8])
def test_weights_on_the_grid_survive_exactly(scheme: Scheme) -> None:
    integers = np.linspace(-scheme.zero_point, scheme.zero_point - 1, scheme.block_size).round()
    weight = np.tile(integers, (16, 2)).astype(np.float32) / np.float32(8)
    np.testing.assert_array_equal(dequantize(quantize(weight, scheme), scheme), weight)


def test_first_of_two_values_lies_in_the_low_bits() -> None:
    weight = np.zeros((1, 32), np.float32)
    weight[0, :2] = [-8, 3]
    assert quantize(weight, INT4).packed[0, 0, 0] == (3 + 8) << 4 | (-8 + 8)


@pytest.mark.parametrize("scheme", [INT4, INT8])
def test_zeros_stay_zeros(scheme: Scheme) -> None:
    weight = np.zeros((4, 64), np.float32)
    np.testing.assert_array_equal(dequantize(quantize(weight, scheme), scheme), weight)


def test_large_weights_are_quantized_in_groups_of_rows_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quantize(random_weight(), INT4)
    monkeypatch.setattr("pilotlight_export.quantize.ROWS_AT_ONCE", 7)
    grouped = quantize(random_weight(), INT4)
    np.testing.assert_array_equal(grouped.packed, whole.packed)
    np.testing.assert_array_equal(grouped.scales, whole.scales)


def test_the_first_rule_that_fits_decides() -> None:
    recipe = Recipe("mixed", (("*.down_proj.weight", INT8), ("model.layers.*", INT4)))
    assert recipe.scheme_for("model.layers.0.mlp.down_proj.weight") is INT8
    assert recipe.scheme_for("model.layers.0.self_attn.o_proj.weight") is INT4
    assert recipe.scheme_for("lm_head.weight") is None


def test_fp32_quantizes_nothing() -> None:
    assert RECIPES["fp32"].scheme_for("lm_head.weight") is None
    assert RECIPES["fp32"].summary() == {}
