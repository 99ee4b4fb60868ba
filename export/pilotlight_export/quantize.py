"""Block quantization of weights, and the recipes that say which weight gets which scheme."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import numpy.typing as npt

ROWS_AT_ONCE = 256
SCALE_FACTORS = tuple(np.linspace(1.05, 0.8, 9, dtype=np.float32))
"""Candidates around the full-range scale; more or wider ones lower the error by less than one part in a thousand."""

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Scheme:
    """How a weight is stored: integers of ``bits`` bits with one scale for each block of a row, zero in the middle."""

    bits: int
    block_size: int

    @property
    def zero_point(self) -> int:
        return 1 << (self.bits - 1)

    def __str__(self) -> str:
        return f"{self.bits} bits, block {self.block_size}, symmetric, scales by least squares"


@dataclass(frozen=True)
class Recipe:
    """Which weights are quantized how: the first rule whose pattern fits a name decides; others stay float32."""

    precision: str
    rules: tuple[tuple[str, Scheme], ...] = ()

    def scheme_for(self, weight_name: str) -> Scheme | None:
        return next((scheme for pattern, scheme in self.rules if fnmatchcase(weight_name, pattern)), None)

    def summary(self) -> dict[str, str | int | float | bool]:
        """Return the recipe as it is written into the manifest."""
        return {"accuracy_level": ACCURACY_LEVEL, **{p: str(s) for p, s in self.rules}} if self.rules else {}


ACCURACY_LEVEL = 4
"""MatMulNBits multiplies in int8; the exact level 0 decodes at less than half the speed."""

RECIPES: dict[str, Recipe] = {
    "fp32": Recipe("fp32"),
    "int8": Recipe("int8", (("*", Scheme(bits=8, block_size=32)),)),
    "int4": Recipe("int4", (("*", Scheme(bits=4, block_size=32)),)),
}


@dataclass(frozen=True)
class Quantized:
    """A quantized weight.

    Shapes:
        packed [N, K / block_size, block_size * bits / 8], scales [N, K / block_size]
    """

    packed: Bytes
    scales: Floats


def quantize(weight: Floats, scheme: Scheme) -> Quantized:
    """Quantize a weight row by row in blocks.

    Shapes:
        weight [N, K], K a multiple of the block size
    """
    parts = [_quantize_rows(rows, scheme) for rows in _row_groups(weight)]
    return Quantized(
        np.concatenate([part.packed for part in parts]),
        np.concatenate([part.scales for part in parts]),
    )


def dequantize(quantized: Quantized, scheme: Scheme) -> Floats:
    """Return the weight that the kernels compute with.

    Shapes:
        output [N, K]
    """
    packed = quantized.packed
    if scheme.bits == 4:
        packed = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:2], scheme.block_size)
    centred = packed.astype(np.float32) - scheme.zero_point
    return (centred * quantized.scales[..., None]).reshape(len(packed), -1)


def _row_groups(weight: Floats) -> Iterator[Floats]:
    for start in range(0, len(weight), ROWS_AT_ONCE):
        yield weight[start : start + ROWS_AT_ONCE]


def _quantize_rows(rows: Floats, scheme: Scheme) -> Quantized:
    blocks = rows.reshape(len(rows), -1, scheme.block_size)
    scales = _best_scales(blocks, scheme)
    integers = (_round(blocks, scales, scheme) + scheme.zero_point).astype(np.uint8)
    return Quantized(_pack(integers, scheme), scales[..., 0])


def _best_scales(blocks: Floats, scheme: Scheme) -> Floats:
    """Try scales around the full range, refit each by least squares, and keep the one with the least error."""
    full = best = _full_range_scales(blocks, scheme)
    best_error = _error(blocks, best, scheme)
    for factor in SCALE_FACTORS:
        scales = _refit(blocks, full * factor, scheme)
        error = _error(blocks, scales, scheme)
        better = error < best_error
        best, best_error = np.where(better, scales, best), np.where(better, error, best_error)
    return best


def _full_range_scales(blocks: Floats, scheme: Scheme) -> Floats:
    """Map each block's extreme to the lowest integer, which lies one further from zero than the highest."""
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=-1, keepdims=True), axis=-1)
    return (extreme / np.float32(-scheme.zero_point)).astype(np.float32)


def _round(blocks: Floats, scales: Floats, scheme: Scheme) -> Floats:
    inverse = _ratio(np.ones_like(scales), scales)
    integers: Floats = np.clip(np.rint(blocks * inverse), -scheme.zero_point, scheme.zero_point - 1)
    return integers


def _refit(blocks: Floats, scales: Floats, scheme: Scheme) -> Floats:
    integers = _round(blocks, scales, scheme)
    power = (integers * integers).sum(axis=-1, keepdims=True)
    fit = (integers * blocks).sum(axis=-1, keepdims=True)
    return _ratio(fit, power)


def _ratio(dividend: Floats, divisor: Floats) -> Floats:
    """Divide, and give zero for blocks that are all zero."""
    ratio: Floats = np.divide(dividend, divisor, out=np.zeros_like(dividend), where=divisor != 0)
    return ratio


def _error(blocks: Floats, scales: Floats, scheme: Scheme) -> Floats:
    difference = blocks - _round(blocks, scales, scheme) * scales
    squares: Floats = (difference * difference).sum(axis=-1, keepdims=True)
    return squares


def _pack(integers: Bytes, scheme: Scheme) -> Bytes:
    if scheme.bits == 8:
        return integers
    return np.bitwise_or(integers[..., 0::2], np.left_shift(integers[..., 1::2], 4), dtype=np.uint8)
