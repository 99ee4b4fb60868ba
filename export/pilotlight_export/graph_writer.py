"""A graph whose tensors go into its file of weights as they are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from pilotlight_export.fuse.graph import KERNELS, Array, add_node
from pilotlight_export.weights import WeightFile

Attributes = Mapping[str, int | float]


class GraphWriter:
    """Adds nodes of one output to a graph, and tensors, each once, to its file."""

    def __init__(self, graph: ir.Graph, weights: WeightFile) -> None:
        self._graph = graph
        self._weights = weights
        self._stored: dict[str, ir.Value] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def store(self, name: str, array: Array) -> ir.Value:
        """Register a tensor as an initializer, or return the one of that name."""
        if name not in self._stored:
            tensor = self._weights.add(name, array)
            value = ir.val(name, dtype=tensor.dtype, shape=ir.Shape(array.shape), const_value=tensor)
            self._graph.register_initializer(value)
            self._stored[name] = value
        return self._stored[name]

    def add(
        self, op_type: str, inputs: Sequence[ir.Value | None], name: str, attributes: Attributes | None = None
    ) -> ir.Value:
        return add_node(self._graph, op_type, inputs, name=name, attributes=attributes).outputs[0]

    def add_kernel(
        self, op_type: str, inputs: Sequence[ir.Value | None], name: str, attributes: Attributes | None = None
    ) -> ir.Value:
        """Add an operator of ONNX Runtime's own."""
        return add_node(self._graph, op_type, inputs, name=name, attributes=attributes, domain=KERNELS).outputs[0]
