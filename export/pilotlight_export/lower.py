"""From a fused graph to files: every ``Linear`` and ``Embedding`` becomes the kernel of its precision."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from itertools import count
from pathlib import Path

import numpy as np
import onnx_ir as ir

from pilotlight.artifact import BATCH_GRAPH, GRAPH, PREFILL_GRAPH, PREFILL_WEIGHTS, WEIGHTS
from pilotlight_export.fuse.graph import ABSTRACT, KERNELS, Array, add_node, array_of, named, operand
from pilotlight_export.fuse.linear import unpack_linear
from pilotlight_export.graph_writer import GraphWriter
from pilotlight_export.int8_products import Int8Products
from pilotlight_export.kv_cache import Scales, quantize_cache
from pilotlight_export.quantize import QuantizedBlocks, quantize_blocks
from pilotlight_export.recipes import (
    EMBEDDING,
    HEAD,
    TIED_HEAD,
    Blocks,
    Columns,
    GraphRecipe,
    Halves,
    Recipe,
    Scheme,
)
from pilotlight_export.weights import WeightFile

IR_VERSION = 10
OPSET = 21
"""The first in which QuantizeLinear takes blocks. What our graphs have of earlier ones means the same in it."""

OnWeight = Callable[[int, int], None]
QuantizedHeads = dict[tuple[str, Blocks], QuantizedBlocks]


def lower(
    fused: ir.Model,
    recipe: Recipe,
    directory: Path,
    kv_scales: Scales | None = None,
    on_weight: OnWeight | None = None,
) -> None:
    """Write the recipe's graph and its weights, or all graphs of a hybrid; the fused graph stays as it is.

    With ``kv_scales`` the graphs keep their keys and values in 8 bits, all but a hybrid's graph for prompts. Weights
    are read, quantized and written one by one, so that memory holds no more than one of them beside the quantized
    embedding and head. ``on_weight`` is told after each how many of how many are done.

    Raises:
        OSError: the directory cannot be written or its disk is full.
    """
    num_weights = len(_abstract_nodes(fused)) * (1 if recipe.prefill is None else 2)
    done = count(1)
    heads: QuantizedHeads = {}

    def report() -> None:
        if on_weight is not None:
            on_weight(next(done), num_weights)

    with WeightFile(directory / WEIGHTS) as weights:
        model = _lowered(fused, recipe.graph, weights, heads, report)
        if kv_scales is not None:
            quantize_cache(model, kv_scales, weights)
        ir.save(model, directory / GRAPH)
    if recipe.prefill is None:
        return
    with WeightFile(directory / PREFILL_WEIGHTS, earlier=weights) as weights:
        model = _lowered(fused, recipe.prefill, weights, heads, report)
        ir.save(model, directory / PREFILL_GRAPH)
        if kv_scales is not None:
            quantize_cache(model, kv_scales, weights)
            ir.save(model, directory / BATCH_GRAPH)


def _lowered(
    fused: ir.Model, recipe: GraphRecipe, weights: WeightFile, heads: QuantizedHeads, report: Callable[[], None]
) -> ir.Model:
    model = fused.clone()
    lowering = _Lowering(model.graph, recipe, weights, heads)
    for node in _abstract_nodes(model):
        lowering.replace(node)
        report()
    lowering.store_rest()
    if recipe.dtype == "float16":
        _compute_in_halves(model.graph)
    model.graph.sort()
    model.ir_version = IR_VERSION
    model.graph.opset_imports.update({"": OPSET, KERNELS: 1})
    return model


def _abstract_nodes(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.domain == ABSTRACT]


class _Lowering:
    def __init__(self, graph: ir.Graph, recipe: GraphRecipe, weights: WeightFile, heads: QuantizedHeads) -> None:
        self._graph = graph
        self._recipe = recipe
        self._weights = weights
        self._heads = heads
        self._writer = GraphWriter(graph, weights)
        self._int8_products = Int8Products(self._writer, self._is_int8)
        self._embeddings = {named(operand(node, 0)) for node in graph if node.op_type == "Embedding"}
        self._widened: dict[str, ir.Value] = {}

    def replace(self, node: ir.Node) -> None:
        for part in unpack_linear(self._graph, node) if self._is_int8(node) else [node]:
            new = self._embedding(part) if part.op_type == "Embedding" else self._linear(part)
            old = part.outputs[0]
            new.name, new.type, new.shape = old.name, old.type, old.shape
            old.replace_all_uses_with(new, replace_graph_outputs=True)
            self._graph.remove(part, safe=True)

    def store_rest(self) -> None:
        """Store what no lowering has stored (norms, biases, rotary caches) and drop weights that are no longer used."""
        for name, value in list(self._graph.initializers.items()):
            if not value.uses():
                del self._graph.initializers[name]
            elif isinstance(self._recipe.scheme_for(name), Halves):
                widened = self._widen(f"{name}.half", array_of(value).astype(np.float16))
                value.replace_all_uses_with(widened)
                del self._graph.initializers[name]
            elif name not in self._writer:
                value.const_value = self._weights.add(name, self._narrow(array_of(value)))
                value.type = ir.TensorType(value.const_value.dtype)

    def _embedding(self, node: ir.Node) -> ir.Value:
        weight, token_ids = operand(node, 0), operand(node, 1)
        scheme = self._recipe.scheme_for(named(weight))
        if scheme is None:
            return self._writer.add("Gather", [weight, token_ids], _name(node), {"axis": 0})
        assert isinstance(scheme, Blocks), "an embedding is looked up, not multiplied"
        quantized = self._quantized(weight, scheme)
        rows = self._writer.store(f"{named(weight)}.rows", quantized.packed.reshape(len(quantized.packed), -1))
        attributes = {"bits": scheme.bits, "block_size": scheme.block_size, "gather_axis": 0, "quantize_axis": 1}
        inputs = [rows, token_ids, *self._grid(weight, quantized)]
        return self._writer.add_kernel("GatherBlockQuantized", inputs, _name(node), attributes)

    def _linear(self, node: ir.Node) -> ir.Value:
        weight, scheme = operand(node, 1), self._scheme(node)
        if isinstance(scheme, Blocks):
            return self._block_product(node, weight, scheme)
        if isinstance(scheme, Columns):
            return self._biased(node, self._int8_products.product(node, scheme))
        if len(weight.uses()) > 1:  # a tied head reads the embedding as it lies, so that the bytes are stored once
            return self._writer.add("Gemm", node.inputs, _name(node), {"transB": 1})
        transposed = self._writer.store(f"{named(weight)}.transposed", self._narrow(array_of(weight).T))
        return self._biased(node, self._writer.add("MatMul", [operand(node, 0), transposed], _name(node)))

    def _is_int8(self, node: ir.Node) -> bool:
        return node.op_type == "Linear" and isinstance(self._scheme(node), Columns)

    def _scheme(self, linear: ir.Node) -> Scheme | None:
        weight = named(operand(linear, 1))
        return self._recipe.scheme_for(TIED_HEAD if weight in self._embeddings else weight)

    def _block_product(self, node: ir.Node, weight: ir.Value, scheme: Blocks) -> ir.Value:
        quantized = self._quantized(weight, scheme)
        grid = self._grid(weight, quantized)
        inputs: list[ir.Value | None] = [
            operand(node, 0),
            self._writer.store(f"{named(weight)}.packed", quantized.packed),
        ]
        if len(node.inputs) > 2:
            inputs += [grid[0], grid[1] if len(grid) > 1 else None, None, node.inputs[2]]
        else:
            inputs += grid
        attributes = {
            "N": len(quantized.packed),
            "K": quantized.scales.shape[1] * scheme.block_size,
            "bits": scheme.bits,
            "block_size": scheme.block_size,
            "accuracy_level": self._recipe.accuracy_level,
        }
        return self._writer.add_kernel("MatMulNBits", inputs, _name(node), attributes)

    def _biased(self, node: ir.Node, product: ir.Value) -> ir.Value:
        if len(node.inputs) < 3:
            return product
        product.name = f"{_name(node)}/product"
        return self._writer.add("Add", [product, node.inputs[2]], f"{_name(node)}/bias")

    def _grid(self, weight: ir.Value, quantized: QuantizedBlocks) -> list[ir.Value]:
        grid = [self._widen(f"{named(weight)}.scales", quantized.scales)]
        if quantized.zero_points is not None:
            grid.append(self._writer.store(f"{named(weight)}.zero_points", quantized.zero_points))
        return grid

    def _widen(self, name: str, halves: Array) -> ir.Value:
        """Store a tensor as float16 and widen it in the graph; a session does that once, when it loads.

        A graph that computes in float16 takes it as it is.
        """
        if self._recipe.dtype == "float16":
            return self._writer.store(name, halves)
        if name not in self._widened:
            attributes = {"to": ir.DataType.FLOAT.value}
            self._widened[name] = self._writer.add(
                "Cast", [self._writer.store(name, halves)], f"{name}/Cast", attributes
            )
        return self._widened[name]

    def _quantized(self, weight: ir.Value, scheme: Blocks) -> QuantizedBlocks:
        """Quantize a weight; the embedding and the head, which several nodes may need, are kept."""
        key = named(weight), scheme
        if key in self._heads:
            return self._heads[key]
        quantized = quantize_blocks(array_of(weight), scheme)
        if fnmatchcase(named(weight), EMBEDDING) or fnmatchcase(named(weight), HEAD):
            self._heads[key] = quantized
        return quantized

    def _narrow(self, array: Array) -> Array:
        return array.astype(self._recipe.dtype) if array.dtype == np.float32 else array


def _compute_in_halves(graph: ir.Graph) -> None:
    """Declare every float32 value float16, which the weights are already, and widen the logits at the end."""
    logits = graph.outputs[0]
    name = named(logits)
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        if value.dtype == ir.DataType.FLOAT:
            value.type = ir.TensorType(ir.DataType.FLOAT16)  # a clone's values share their types with the original's
    logits.name = f"{name}/half"
    cast = add_node(graph, "Cast", [logits], name=f"{name}/Cast", attributes={"to": ir.DataType.FLOAT.value})
    widened = cast.outputs[0]
    widened.name, widened.type, widened.shape = name, ir.TensorType(ir.DataType.FLOAT), logits.shape
    graph.outputs[0] = widened


def _name(node: ir.Node) -> str:
    assert node.name is not None
    return node.name
