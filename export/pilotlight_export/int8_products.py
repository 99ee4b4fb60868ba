"""Products in int8: each token is scaled to its own maximum, and its results are scaled back.

No token sees another one's maximum, so a row's result does not depend on the rows beside it. Of a token that is all
zeros, the ratios are no numbers; whatever integers they become are scaled back by zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from pilotlight_export.fuse.graph import array_of, chain, named, operand, weight_shape
from pilotlight_export.graph_writer import GraphWriter
from pilotlight_export.quantize import quantize_columns
from pilotlight_export.recipes import Columns

STEP = np.float32(1 / 127)
MIDDLE = np.uint8(128)
"""The integer of zero: the kernels multiply bytes without a sign with weights that have one."""
HUGE = np.float32(3e38)
"""What is divided by so much is zero, which makes ``MIDDLE`` of every token's step: one for each, as blocks need it."""


@dataclass(frozen=True)
class _Tokens:
    """Tokens in int8, and what the results of each have to be multiplied with, [..., 1]."""

    integers: ir.Value
    scales: ir.Value


class Int8Products:
    """Makes the products of a graph's int8 ``Linear`` nodes, in their order; ``is_int8`` tells which those are.

    What is only multiplied with another value and then goes into the next of these products, as an MLP's ``up`` does,
    is not scaled back: the next one divides by the token's maximum anyway, and scales its own results back by both.
    """

    def __init__(self, writer: GraphWriter, is_int8: Callable[[ir.Node], bool]) -> None:
        self._writer = writer
        self._is_int8 = is_int8
        self._tokens: dict[ir.Value, _Tokens] = {}
        self._unscaled: dict[ir.Value, ir.Value] = {}
        """By value, the scales that it lacks."""

    def product(self, linear: ir.Node, scheme: Columns) -> ir.Value:
        """Return what takes the place of a ``Linear``'s product, before its bias."""
        name, weight = linear.name or "", operand(linear, 1)
        tokens = self._tokens_of(linear)
        quantized = quantize_columns(array_of(weight), scheme)
        inputs = [
            tokens.integers,
            self._writer.store(f"{named(weight)}.integers", quantized.integers),
            self._constant("one", np.float32(1)),
            self._writer.store(f"{named(weight)}.column_scales", quantized.scales),
            self._constant("int8_middle", MIDDLE),
        ]
        product = self._writer.add_kernel("MatMulIntegerToFloat", inputs, f"{name}/MatMulIntegerToFloat")
        next_tokens = self._next_tokens(linear)
        if next_tokens is not None:
            self._unscaled[next_tokens] = tokens.scales
            return product
        return self._writer.add("Mul", [product, tokens.scales], name)

    def _tokens_of(self, linear: ir.Node) -> _Tokens:
        x = operand(linear, 0)
        if x not in self._tokens:
            self._tokens[x] = self._quantized(x, weight_shape(operand(linear, 1))[1], linear.name or "")
        return self._tokens[x]

    def _quantized(self, x: ir.Value, width: int, name: str) -> _Tokens:
        """Quantize tokens [..., K], each of which is one block for QuantizeLinear."""
        steps = self._writer.add("Mul", [self._maximum(x, name), self._constant("int8_step", STEP)], f"{name}/steps")
        middle = self._constant("int8_middle", MIDDLE)
        middles = self._writer.add("QuantizeLinear", [steps, self._constant("huge", HUGE), middle], f"{name}/middles")
        blocks = {"axis": -1, "block_size": width}
        integers = self._writer.add("QuantizeLinear", [x, steps, middles], f"{name}/QuantizeLinear", blocks)
        lacking = self._unscaled.get(x)
        return _Tokens(
            integers, steps if lacking is None else self._writer.add("Mul", [steps, lacking], f"{name}/scales")
        )

    def _maximum(self, x: ir.Value, name: str) -> ir.Value:
        """Return each token's largest absolute value, [..., 1], without writing all of them down."""
        axes = self._writer.store("last_axis", np.array([-1]))
        highest = self._writer.add("ReduceMax", [x, axes], f"{name}/ReduceMax")
        lowest = self._writer.add("ReduceMin", [x, axes], f"{name}/ReduceMin")
        return self._writer.add("Max", [highest, self._writer.add("Neg", [lowest], f"{name}/Neg")], f"{name}/Max")

    def _next_tokens(self, linear: ir.Node) -> ir.Value | None:
        """Return this result times another value, if that is all that is made of it and goes into an int8 product."""
        found = chain(linear.outputs[0], "Mul", "Linear") if len(linear.inputs) < 3 else None
        if found is None or not self._is_int8(found[1]):
            return None
        product = found[0].outputs[0]
        return None if product in self._unscaled else product

    def _constant(self, name: str, number: np.generic) -> ir.Value:
        return self._writer.store(name, np.asarray(number))
