"""From a fused graph to files: every ``Linear`` and ``Embedding`` becomes the kernel of its precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from pilotlight.artifact import GRAPH
from pilotlight_export.fuse.graph import ABSTRACT, KERNELS, Array, array_of, named, operand
from pilotlight_export.quantize import ACCURACY_LEVEL, Quantized, Recipe, Scheme, quantize
from pilotlight_export.weights import WeightFile

IR_VERSION = 10
OnWeight = Callable[[int, int], None]


def lower(fused: ir.Model, recipe: Recipe, directory: Path, on_weight: OnWeight | None = None) -> None:
    """Write ``model.onnx`` and ``model.onnx.data`` at the recipe's precision; the fused graph stays as it is.

    Weights are read, quantized and written one by one, so that memory holds no more than one of them. ``on_weight`` is
    told after each how many of how many are done.

    Raises:
        OSError: the directory cannot be written or its disk is full.
    """
    model = fused.clone()
    nodes = [node for node in model.graph if node.domain == ABSTRACT]
    with WeightFile(directory) as weights:
        lowering = _Lowering(model.graph, recipe, weights)
        for num_done, node in enumerate(nodes, start=1):
            lowering.replace(node)
            if on_weight is not None:
                on_weight(num_done, len(nodes))
        lowering.store_rest()
    model.ir_version = IR_VERSION
    model.graph.opset_imports[KERNELS] = 1
    ir.save(model, directory / GRAPH)


class _Lowering:
    def __init__(self, graph: ir.Graph, recipe: Recipe, weights: WeightFile) -> None:
        self._graph = graph
        self._recipe = recipe
        self._weights = weights
        self._stored: set[str] = set()
        self._shared: dict[str, Quantized] = {}

    def replace(self, node: ir.Node) -> None:
        nodes = self._embedding(node) if node.op_type == "Embedding" else self._linear(node)
        self._graph.insert_before(node, nodes)
        old, new = node.outputs[0], nodes[-1].outputs[0]
        new.name, new.type, new.shape = old.name, old.type, old.shape
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        self._graph.remove(node, safe=True)

    def store_rest(self) -> None:
        """Store what no lowering has stored (norms, biases, rotary caches) and drop weights that are no longer used."""
        for name, value in list(self._graph.initializers.items()):
            if not value.uses():
                del self._graph.initializers[name]
            elif name not in self._stored:
                value.const_value = self._weights.add(name, array_of(value))

    def _embedding(self, node: ir.Node) -> list[ir.Node]:
        weight, token_ids = operand(node, 0), operand(node, 1)
        scheme = self._recipe.scheme_for(named(weight))
        if scheme is None:
            return [ir.node("Gather", [weight, token_ids], {"axis": 0}, name=node.name)]
        quantized = self._quantized(weight, scheme)
        rows = self._store(f"{named(weight)}.rows", quantized.packed.reshape(len(quantized.packed), -1))
        scales = self._store(f"{named(weight)}.row_scales", quantized.scales)
        attributes = {"bits": scheme.bits, "block_size": scheme.block_size, "gather_axis": 0, "quantize_axis": 1}
        return [ir.node("GatherBlockQuantized", [rows, token_ids, scales], attributes, domain=KERNELS, name=node.name)]

    def _linear(self, node: ir.Node) -> list[ir.Node]:
        weight = operand(node, 1)
        scheme = self._recipe.scheme_for(named(weight))
        if scheme is not None:
            return [self._quantized_product(node, weight, scheme)]
        if len(weight.uses()) > 1:  # a tied head reads the embedding as it lies, so that the bytes are stored once
            return [ir.node("Gemm", node.inputs, {"transB": 1}, name=node.name)]
        return self._float_product(node, weight)

    def _quantized_product(self, node: ir.Node, weight: ir.Value, scheme: Scheme) -> ir.Node:
        quantized = self._quantized(weight, scheme)
        packed = self._store(f"{named(weight)}.packed", quantized.packed)
        scales = self._store(f"{named(weight)}.scales", quantized.scales)
        bias = [None, None, node.inputs[2]] if len(node.inputs) > 2 else []
        attributes = {
            "N": len(quantized.packed),
            "K": quantized.packed.shape[1] * scheme.block_size,
            "bits": scheme.bits,
            "block_size": scheme.block_size,
            "accuracy_level": ACCURACY_LEVEL,
        }
        inputs = [operand(node, 0), packed, scales, *bias]
        return ir.node("MatMulNBits", inputs, attributes, domain=KERNELS, name=node.name)

    def _float_product(self, node: ir.Node, weight: ir.Value) -> list[ir.Node]:
        transposed = self._store(f"{named(weight)}.transposed", array_of(weight).T)
        product = ir.node("MatMul", [operand(node, 0), transposed], name=node.name)
        if len(node.inputs) < 3:
            return [product]
        product.outputs[0].name = f"{node.name}/product"
        return [product, ir.node("Add", [product.outputs[0], node.inputs[2]], name=f"{node.name}/bias")]

    def _quantized(self, weight: ir.Value, scheme: Scheme) -> Quantized:
        name = named(weight)
        if name in self._shared:
            return self._shared.pop(name)
        quantized = quantize(array_of(weight), scheme)
        if len(weight.uses()) > 1:
            self._shared[name] = quantized
        return quantized

    def _store(self, name: str, array: Array) -> ir.Value:
        tensor = self._weights.add(name, array)
        value = ir.val(name, dtype=tensor.dtype, shape=ir.Shape(array.shape), const_value=tensor)
        self._graph.register_initializer(value)
        self._stored.add(name)
        return value
