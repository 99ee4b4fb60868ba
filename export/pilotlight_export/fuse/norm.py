"""Root-mean-square norms, and the residual additions before them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pilotlight_export.fuse.graph import (
    KERNELS,
    add_initializer,
    add_node,
    array_of,
    chain,
    is_weight,
    named,
    operand,
    other_input,
    scalar,
    scope,
)

_TAIL = ("ReduceMean", "Add", "Sqrt", "Div", "Mul", "Mul")


def drop_float_casts(graph: ir.Graph) -> None:
    """Remove the casts to float32 that a norm makes around itself: the exported graph is float32 everywhere."""
    norms = {scope(node) for node in graph if node.op_type == "ReduceMean"}
    for node in list(graph):
        if node.op_type == "Cast" and scope(node) in norms and node.attributes["to"].as_int() == ir.DataType.FLOAT:
            node.outputs[0].replace_all_uses_with(operand(node, 0))
            graph.remove(node, safe=True)


def fuse_norms(graph: ir.Graph) -> None:
    """Replace ``x / sqrt(mean(x²) + epsilon) · weight`` by one SimplifiedLayerNormalization."""
    for node in list(graph):
        if node.op_type == "Pow" and scalar(node.inputs[1]) == 2:
            _fuse_norm(graph, node)


def fuse_residuals(graph: ir.Graph) -> None:
    """Fold the addition before a norm into the norm, which then gives both the sum and the normed sum."""
    for norm in list(graph):
        if norm.op_type == "SimplifiedLayerNormalization":
            addition = operand(norm, 0).producer()
            if addition is not None and addition.op_type == "Add" and not any(map(is_weight, addition.inputs)):
                _fold_addition(graph, addition, norm)


def _fuse_norm(graph: ir.Graph, square: ir.Node) -> None:
    tail = chain(square.outputs[0], *_TAIL)
    if tail is None:
        return
    mean, add_epsilon, _, _, normalize, multiply = tail
    epsilon = scalar(other_input(add_epsilon, mean.outputs[0]))
    weight = _shifted_weight(graph, other_input(multiply, normalize.outputs[0]))
    if epsilon is None or weight is None:
        return
    norm = add_node(
        graph,
        "SimplifiedLayerNormalization",
        [operand(square, 0), weight],
        name=f"{scope(square)}/SimplifiedLayerNormalization",
        attributes={"axis": -1, "epsilon": epsilon, "stash_type": 1},
    )
    multiply.outputs[0].replace_all_uses_with(norm.outputs[0])


def _shifted_weight(graph: ir.Graph, weight: ir.Value) -> ir.Value | None:
    """Return a norm's weight; one that the model stores less a constant, as Gemma does less one, is added up."""
    if is_weight(weight):
        return weight
    addition = weight.producer()
    shift = scalar(addition.inputs[1]) if addition is not None and addition.op_type == "Add" else None
    if addition is None or shift is None or not is_weight(addition.inputs[0]):
        return None
    stored = operand(addition, 0)
    return add_initializer(graph, f"{named(stored)}.shifted", array_of(stored) + np.float32(shift))


def _fold_addition(graph: ir.Graph, addition: ir.Node, norm: ir.Node) -> None:
    first, second = addition.inputs
    fused = add_node(
        graph,
        "SkipSimplifiedLayerNormalization",
        [first, second, norm.inputs[1]],
        name=f"{scope(norm)}/SkipSimplifiedLayerNormalization",
        domain=KERNELS,
        outputs=("output", "", "", "sum"),
        attributes={"epsilon": norm.attributes["epsilon"].as_float()},
    )
    norm.outputs[0].replace_all_uses_with(fused.outputs[0])
    addition.outputs[0].replace_all_uses_with(fused.outputs[3])
