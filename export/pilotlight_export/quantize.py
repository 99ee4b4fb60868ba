"""From a weight's floats to the integers and scales of its scheme."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pilotlight_export.recipes import Blocks, Columns

ROWS_AT_ONCE = 256
SCALE_FACTORS = tuple(np.linspace(1.05, 0.8, 9, dtype=np.float32))
"""Candidates around the full-range scale; more or wider ones lower the error by less than one part in a thousand."""

Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.float16]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class QuantizedBlocks:
    """A weight [N, K] in blocks: ``scales · (integers - zero_points)``, in the middle where there are no zero points.

    Shapes:
        packed [N, K / block_size, block_size * bits / 8], scales [N, K / block_size],
        zero_points [N, K / block_size * bits / 8], rounded up
    """

    packed: Bytes
    scales: Halves
    zero_points: Bytes | None = None


@dataclass(frozen=True)
class QuantizedColumns:
    """A weight [N, K] with one scale for each of its N outputs, transposed as the kernel wants it.

    Shapes:
        integers [K, N], scales [N]
    """

    integers: npt.NDArray[np.int8]
    scales: Floats


def quantize_blocks(weight: Floats, scheme: Blocks, importance: Floats | None = None) -> QuantizedBlocks:
    """Quantize a weight row by row in blocks; an error in a column counts as much as that column's importance.

    Shapes:
        weight [N, K], K a multiple of the block size; importance [K]
    """
    per_block = None if importance is None else importance.reshape(-1, scheme.block_size)
    return _joined([_quantize_rows(rows, scheme, per_block) for rows in _row_groups(weight)])


def dequantize_blocks(quantized: QuantizedBlocks, scheme: Blocks) -> Floats:
    """Return the weight that the kernels compute with.

    Shapes:
        output [N, K]
    """
    num_rows, num_blocks = quantized.scales.shape
    integers = _unpack(quantized.packed, scheme.bits).astype(np.float32)
    if quantized.zero_points is None:
        centred = integers - _middle(scheme)
    else:
        centred = integers - _unpack(quantized.zero_points, scheme.bits)[:, :num_blocks, None]
    return (centred * quantized.scales[..., None].astype(np.float32)).reshape(num_rows, -1)


def quantize_columns(weight: Floats, scheme: Columns) -> QuantizedColumns:
    """Quantize a weight with one scale for each row, which is one output of the product.

    Shapes:
        weight [N, K]
    """
    scales = np.abs(weight).max(axis=1) / np.float32(scheme.limit)
    integers = np.rint(_ratio(weight, np.broadcast_to(scales[:, None], weight.shape)))
    return QuantizedColumns(np.ascontiguousarray(integers.astype(np.int8).T), scales)


def dequantize_columns(quantized: QuantizedColumns) -> Floats:
    """Return the weight that the kernel computes with.

    Shapes:
        output [N, K]
    """
    return quantized.integers.T.astype(np.float32) * quantized.scales[:, None]


def _row_groups(weight: Floats) -> Iterator[Floats]:
    for start in range(0, len(weight), ROWS_AT_ONCE):
        yield weight[start : start + ROWS_AT_ONCE]


def _joined(parts: Sequence[QuantizedBlocks]) -> QuantizedBlocks:
    zero_points = [part.zero_points for part in parts if part.zero_points is not None]
    return QuantizedBlocks(
        np.concatenate([part.packed for part in parts]),
        np.concatenate([part.scales for part in parts]),
        np.concatenate(zero_points) if zero_points else None,
    )


def _quantize_rows(rows: Floats, scheme: Blocks, importance: Floats | None) -> QuantizedBlocks:
    blocks = rows.reshape(len(rows), -1, scheme.block_size)
    grid = _best_grid(blocks, scheme, np.ones(1, np.float32) if importance is None else importance)
    halves = grid.scales.astype(np.float16)
    grid = _Grid(halves.astype(np.float32), grid.zero_points)
    packed = _pack(_round(blocks, grid, scheme).astype(np.uint8), scheme.bits)
    if scheme.zero_point == "middle":
        return QuantizedBlocks(packed, halves[..., 0])
    return QuantizedBlocks(packed, halves[..., 0], _pack(grid.zero_points[..., 0].astype(np.uint8), scheme.bits))


@dataclass(frozen=True)
class _Grid:
    """Where a block's integers lie on the line.

    Shapes:
        both [N, K / block_size, 1]
    """

    scales: Floats
    zero_points: Floats


def _best_grid(blocks: Floats, scheme: Blocks, importance: Floats) -> _Grid:
    """Try scales around each full range, refit them by least squares, and keep the grid with the least error."""
    grids = list(_full_range_grids(blocks, scheme))
    best = grids[0]
    if scheme.scales == "nearest":
        return best
    best_error = _error(blocks, best, scheme, importance)
    for full in grids:
        for factor in SCALE_FACTORS:
            grid = _refit(blocks, _Grid(full.scales * factor, full.zero_points), scheme, importance)
            error = _error(blocks, grid, scheme, importance)
            better = error < best_error
            best_error = np.where(better, error, best_error)
            best = _Grid(
                np.where(better, grid.scales, best.scales), np.where(better, grid.zero_points, best.zero_points)
            )
    return best


def _full_range_grids(blocks: Floats, scheme: Blocks) -> Iterator[_Grid]:
    """Yield grids that cover a block's whole range; the first is that of rounding to nearest.

    A symmetric grid has its extreme at the lowest integer, which lies one further from zero than the highest.
    """
    if scheme.zero_point == "fitted":
        lowest = np.minimum(blocks.min(axis=-1, keepdims=True), 0)
        highest = np.maximum(blocks.max(axis=-1, keepdims=True), 0)
        scales = (highest - lowest) / np.float32(_highest(scheme))
        yield _Grid(scales, np.clip(np.rint(_ratio(-lowest, scales)), 0, _highest(scheme)))
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=-1, keepdims=True), axis=-1)
    scales = extreme / np.float32(-_middle(scheme))
    yield _Grid(scales, np.full_like(scales, _middle(scheme)))


def _round(blocks: Floats, grid: _Grid, scheme: Blocks) -> Floats:
    inverse = _ratio(np.ones_like(grid.scales), grid.scales)
    integers: Floats = np.clip(np.rint(blocks * inverse) + grid.zero_points, 0, _highest(scheme))
    return integers


def _refit(blocks: Floats, grid: _Grid, scheme: Blocks, importance: Floats) -> _Grid:
    centred = _round(blocks, grid, scheme) - grid.zero_points
    weighted = centred * importance
    power = (weighted * centred).sum(axis=-1, keepdims=True)
    fit = (weighted * blocks).sum(axis=-1, keepdims=True)
    return _Grid(_ratio(fit, power), grid.zero_points)


def _error(blocks: Floats, grid: _Grid, scheme: Blocks, importance: Floats) -> Floats:
    difference = blocks - (_round(blocks, grid, scheme) - grid.zero_points) * grid.scales
    squares: Floats = (difference * difference * importance).sum(axis=-1, keepdims=True)
    return squares


def _ratio(dividend: Floats, divisor: Floats) -> Floats:
    """Divide, and give zero for blocks that are all zero."""
    ratio: Floats = np.divide(dividend, divisor, out=np.zeros_like(dividend), where=divisor != 0)
    return ratio


def _middle(scheme: Blocks) -> int:
    return 1 << (scheme.bits - 1)


def _highest(scheme: Blocks) -> int:
    return (1 << scheme.bits) - 1


def _pack(integers: Bytes, bits: int) -> Bytes:
    """Put two integers of four bits into each byte, the first one into the low bits; an odd one out gets a zero."""
    if bits == 8:
        return integers
    if integers.shape[-1] % 2:
        integers = np.concatenate([integers, np.zeros_like(integers[..., :1])], axis=-1)
    return np.bitwise_or(integers[..., 0::2], np.left_shift(integers[..., 1::2], 4), dtype=np.uint8)


def _unpack(packed: Bytes, bits: int) -> Bytes:
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
