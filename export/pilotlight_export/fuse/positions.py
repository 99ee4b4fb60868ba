"""Logits at requested positions only."""

from __future__ import annotations

import onnx_ir as ir

from pilotlight_export.fuse.graph import add_node, is_weight, named


def gather_requested(graph: ir.Graph, last_attention: ir.Node, logits_indices: ir.Value) -> None:
    """Keep only the requested positions of everything that follows the last attention.

    After the last layer's attention no position looks at another, so that layer's feed-forward network, the final norm
    and the head need to run for the requested positions only. Every value that crosses into this part of the graph is
    flattened to [B * T, ...] and gathered to [N, ...].
    """
    tail = _dependents(graph, last_attention.outputs[0])
    gathered: dict[ir.Value, ir.Value] = {}
    for node in tail:
        for index, value in enumerate(node.inputs):
            if value is None or is_weight(value) or value.producer() in tail:
                continue
            if value not in gathered:
                gathered[value] = _gather(graph, value, logits_indices)
            node.replace_input_with(index, gathered[value])


def _dependents(graph: ir.Graph, value: ir.Value) -> dict[ir.Node, None]:
    found: dict[ir.Node, None] = {}
    pending = [value]
    while pending:
        for node in pending.pop().consumers():
            if node not in found:
                found[node] = None
                pending.extend(node.outputs)
    return found


def _gather(graph: ir.Graph, value: ir.Value, indices: ir.Value) -> ir.Value:
    name = f"{named(value)}/requested"
    flat = add_node(graph, "Flatten", [value], name=f"{name}/Flatten", attributes={"axis": 2})
    return add_node(graph, "Gather", [flat.outputs[0], indices], name=name, attributes={"axis": 0}).outputs[0]
