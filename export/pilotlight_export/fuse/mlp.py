"""The gated feed-forward network: one packed projection, one activation node."""

from __future__ import annotations

import onnx_ir as ir

from pilotlight_export.families import Family
from pilotlight_export.fuse.graph import KERNELS, add_node, find_node, operand, scope
from pilotlight_export.fuse.linear import pack_linears


def pack_gate_and_up(graph: ir.Graph, layer: int, family: Family) -> None:
    """Compute a layer's gate and up projections in one product and split its result.

    Raises:
        FusionError: the layer has no such projections.
    """
    module = f"/model/layers.{layer}"
    gate, up = (find_node(graph, f"{module}/{name}") for name in (family.gate, family.up))
    packed = pack_linears(graph, [gate, up], f"{module}/mlp/gate_up_proj")
    split = add_node(
        graph,
        "Split",
        packed.outputs,
        name=f"{module}/mlp/Split",
        outputs=("gate", "up"),
        attributes={"axis": -1, "num_outputs": 2},
    )
    gate.outputs[0].replace_all_uses_with(split.outputs[0])
    up.outputs[0].replace_all_uses_with(split.outputs[1])


def fuse_silu(graph: ir.Graph) -> None:
    """Replace ``x · sigmoid(x)`` by QuickGelu with alpha 1, which is the same function in one node."""
    for node in list(graph):
        if node.op_type == "Sigmoid":
            gate = operand(node, 0)
            products = [user for user in node.outputs[0].consumers() if user.op_type == "Mul" and gate in user.inputs]
            for product in products:
                silu = _quick_gelu(graph, gate, scope(node))
                product.outputs[0].replace_all_uses_with(silu.outputs[0])


def _quick_gelu(graph: ir.Graph, value: ir.Value, module: str) -> ir.Node:
    return add_node(graph, "QuickGelu", [value], name=f"{module}/QuickGelu", domain=KERNELS, attributes={"alpha": 1.0})
