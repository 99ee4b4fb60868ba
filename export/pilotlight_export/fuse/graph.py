"""Small questions and edits on an ``onnx_ir`` graph that every fusion needs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from pilotlight_export.errors import FusionError

KERNELS = "com.microsoft"
ABSTRACT = "pilotlight"
"""Domain of ``Linear`` and ``Embedding``, which stand for a weight until its precision is chosen."""

Array = np.ndarray[tuple[int, ...], np.dtype[np.generic]]


def scope(node: ir.Node) -> str:
    """Return the path of the module that a node was traced in, for example ``/model/layers.0/mlp/gate_proj``."""
    return (node.name or "").rpartition("/")[0]


def named(value: ir.Value) -> str:
    """Return the name of a value, which every value of an exported graph has."""
    assert value.name is not None
    return value.name


def array_of(weight: ir.Value) -> Any:
    """Return the array of an initializer; its element type is known to the caller only."""
    assert weight.const_value is not None
    return weight.const_value.numpy()


def scalar(value: ir.Value | None) -> float | None:
    """Return a constant of one element as a number, or None for anything else.

    Constants are not folded in an exported graph, so one may still be the square root of another, or a cast of it.
    """
    if value is None:
        return None
    node = value.producer()
    if node is not None and node.op_type in ("Cast", "Unsqueeze", "Sqrt"):
        number = scalar(node.inputs[0])
        return math.sqrt(number) if number is not None and node.op_type == "Sqrt" else number
    if value.const_value is None or value.const_value.size != 1:
        return None
    return float(value.const_value.numpy().item())


def is_weight(value: ir.Value | None) -> bool:
    """Tell whether a value is an initializer, without reading it."""
    return value is not None and value.is_initializer()


def other_input(node: ir.Node, value: ir.Value) -> ir.Value:
    """Return the operand of a binary node that is not ``value``."""
    first, second = node.inputs
    found = second if first is value else first
    assert found is not None
    return found


def operand(node: ir.Node, index: int) -> ir.Value:
    """Return an input that the operator requires."""
    value = node.inputs[index]
    assert value is not None
    return value


def chain(value: ir.Value, *op_types: str) -> list[ir.Node] | None:
    """Follow a value through its only consumers, which must be of these types; None where they are not."""
    nodes: list[ir.Node] = []
    for op_type in op_types:
        consumers = value.consumers()
        if len(consumers) != 1 or consumers[0].op_type != op_type:
            return None
        nodes.append(consumers[0])
        value = consumers[0].outputs[0]
    return nodes


def add_node(
    graph: ir.Graph,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    *,
    name: str,
    domain: str = "",
    outputs: Sequence[str] = ("output",),
    attributes: Mapping[str, int | float] | None = None,
) -> ir.Node:
    """Append a node whose outputs are named after it; an output named "" is not used."""
    values = [ir.val(f"{name}/{output}" if output else "") for output in outputs]
    return ir.node(op_type, inputs, attributes, domain=domain, outputs=values, graph=graph, name=name)


def weight_shape(weight: ir.Value) -> tuple[int, ...]:
    """Return the sizes of an initializer, without reading it."""
    assert weight.const_value is not None
    return tuple(int(size) for size in weight.const_value.shape.numpy())


def add_initializer(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    """Register a small constant that the fusion made itself."""
    value = ir.val(name, const_value=ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value


def add_lazy_initializer(graph: ir.Graph, tensor: ir.LazyTensor) -> ir.Value:
    """Register a weight that is computed from others each time it is read, so that it never stays in memory."""
    assert tensor.name is not None
    value = ir.val(tensor.name, dtype=tensor.dtype, shape=tensor.shape, const_value=tensor)
    graph.register_initializer(value)
    return value


def find_node(graph: ir.Graph, name: str) -> ir.Node:
    """Return the node of that name.

    Raises:
        FusionError: there is none.
    """
    for node in graph:
        if node.name == name:
            return node
    raise FusionError(f"the exported graph has no {name}; its family's description in families.py does not fit it")
