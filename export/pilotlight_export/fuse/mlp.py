"""The gated feed-forward network: one packed projection, one activation node."""

from __future__ import annotations

import math

import onnx_ir as ir

from pilotlight_export.errors import FusionError
from pilotlight_export.fuse.graph import KERNELS, add_node, chain, operand, other_input, scalar, scope, weight_shape
from pilotlight_export.fuse.linear import pack_linears, split_columns


def pack_gate_and_up(graph: ir.Graph, layer: int) -> None:
    """Compute a layer's gate and up projections in one product and split its result.

    Raises:
        FusionError: the layer has no such projections.
    """
    module = f"/model/layers.{layer}/mlp"
    linears = [node for node in graph if node.op_type == "Linear" and scope(node) == module]
    first = [node for node in linears if operand(node, 0) is operand(linears[0], 0)]
    if len(first) == 2:
        packed = pack_linears(graph, first, f"{module}/gate_up_proj")
        halves = [node.outputs[0] for node in first]
    elif len(first) == 1:
        packed, halves = first[0], _sliced_halves(first[0])
    else:
        raise FusionError(
            f"the exported graph has {len(first)} first projections in {module}, not a gate and a projection"
        )
    width = weight_shape(operand(packed, 1))[0] // 2
    for half, part in zip(halves, split_columns(graph, packed, [width, width], f"{module}/Split"), strict=True):
        half.replace_all_uses_with(part)


def _sliced_halves(packed: ir.Node) -> list[ir.Value]:
    """Return the two slices that a projection which the model itself packs is cut into."""
    slices = [node for node in packed.outputs[0].consumers() if node.op_type == "Slice"]
    slices.sort(key=lambda node: scalar(node.inputs[1]) != 0)
    if len(slices) != 2 or scalar(slices[0].inputs[1]) != 0:
        raise FusionError(f"{packed.name} is neither a gate nor cut into two halves")
    return [node.outputs[0] for node in slices]


def fuse_silu(graph: ir.Graph) -> None:
    """Replace ``x · sigmoid(x)`` by QuickGelu with alpha 1, which is the same function in one node."""
    for node in list(graph):
        if node.op_type == "Sigmoid":
            gate = operand(node, 0)
            products = [user for user in node.outputs[0].consumers() if user.op_type == "Mul" and gate in user.inputs]
            for product in products:
                silu = _quick_gelu(graph, gate, scope(node))
                product.outputs[0].replace_all_uses_with(silu.outputs[0])


def fuse_gelu(graph: ir.Graph) -> None:
    """Replace ``x · (1 + tanh(√(2/π) · (x + 0.044715 · x³))) / 2`` by one FastGelu, the same function."""
    for node in list(graph):
        tail = chain(node.outputs[0], "Add", "Mul", "Mul") if node.op_type == "Tanh" else None
        if tail is None:
            continue
        shift, product, half = tail
        gate = other_input(product, shift.outputs[0])
        if _has_constant(shift, 1.0) and _has_constant(half, 0.5) and _is_tanh_argument(operand(node, 0), gate):
            gelu = add_node(graph, "FastGelu", [gate], name=f"{scope(node)}/FastGelu", domain=KERNELS)
            half.outputs[0].replace_all_uses_with(gelu.outputs[0])


def _is_tanh_argument(value: ir.Value, gate: ir.Value) -> bool:
    scaled = value.producer()
    if scaled is None or scaled.op_type != "Mul" or not _has_constant(scaled, math.sqrt(2 / math.pi)):
        return False
    added = operand(scaled, 1).producer() or operand(scaled, 0).producer()
    if added is None or added.op_type != "Add" or gate not in added.inputs:
        return False
    cubic = other_input(added, gate).producer()
    return cubic is not None and cubic.op_type == "Mul" and _has_constant(cubic, 0.044715)


def _has_constant(node: ir.Node, number: float) -> bool:
    found = [scalar(value) for value in node.inputs]
    return any(value is not None and math.isclose(value, number, rel_tol=1e-6) for value in found)


def _quick_gelu(graph: ir.Graph, value: ir.Value, module: str) -> ir.Node:
    return add_node(graph, "QuickGelu", [value], name=f"{module}/QuickGelu", domain=KERNELS, attributes={"alpha": 1.0})
