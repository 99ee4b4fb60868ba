"""What a layer's attention computes, read out of the exported graph around its Softmax.

Upstream of the Softmax lie, in this order, the mask, a soft cap, the scale and the product of queries and keys; each of
those goes back through the rotary embedding and perhaps a norm to its projection. Downstream lie the product with the
values and the output projection. Families differ in what of this they have, not in where it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from pilotlight_export.errors import FusionError
from pilotlight_export.fuse.graph import operand, other_input, scalar, scope

NORM = "SimplifiedLayerNormalization"
_STEPS = frozenset({"Reshape", "Transpose", "Unsqueeze", "Slice", "Expand", "Cast", "Neg", NORM})
_JOINTS = frozenset({"Mul", "Add", "Concat"})
_ENDS = frozenset({"Linear", "Cos", "Sin"})


@dataclass(frozen=True)
class Projected:
    """A query, key or value: its projection, the norm after that, and the module whose rotary angles turn it.

    ``offset`` is its first channel in a projection that the model itself packs.
    """

    linear: ir.Node
    offset: int
    norm: ir.Node | None
    rotary_module: str | None


@dataclass(frozen=True)
class ExportedAttention:
    """One layer's attention.

    Units:
        ``window_tokens`` counts the positions that a query sees, its own included; None where it sees all before it.
    """

    query: Projected
    key: Projected
    value: Projected
    output: ir.Node
    scale: float
    softcap: float | None
    window_tokens: int | None

    @property
    def parts(self) -> tuple[Projected, Projected, Projected]:
        return self.query, self.key, self.value


@dataclass(frozen=True)
class _Scores:
    query: ir.Value
    key: ir.Value
    scale: float
    softcap: float | None


def read_attention(graph: ir.Graph, module: str) -> ExportedAttention:
    """Read the attention of the layer whose attention module has this path.

    Raises:
        FusionError: the module does not compute an attention of the known shape.
    """
    softmax = next((node for node in graph if node.op_type == "Softmax" and scope(node) == module), None)
    masked = operand(softmax, 0).producer() if softmax is not None else None
    if softmax is None or masked is None or masked.op_type != "Add":
        raise FusionError(f"the exported graph has no masked attention in {module}")
    scores = _read_scores(operand(masked, 0))
    context = _product_of(softmax)
    return ExportedAttention(
        query=_read_projected(scores.query),
        key=_read_projected(scores.key),
        value=_read_projected(operand(context, 1)),
        output=_following_linear(context),
        scale=scores.scale,
        softcap=scores.softcap,
        window_tokens=_read_window(operand(masked, 1)),
    )


def _read_scores(scores: ir.Value) -> _Scores:
    capped, softcap = _without_softcap(scores)
    product, scale = _without_factor(capped)
    node = product.producer()
    if node is None or node.op_type != "MatMul":
        raise FusionError(f"{scores.name} is not a scaled product of queries and keys")
    query, query_scale = _without_factor(operand(node, 0))
    key, key_scale = _without_factor(operand(node, 1))
    return _Scores(query, key, scale * query_scale * key_scale, softcap)


def _without_softcap(value: ir.Value) -> tuple[ir.Value, float | None]:
    """Undo ``cap · tanh(x / cap)``."""
    product = value.producer()
    tanh = operand(product, 0).producer() if product is not None else None
    if product is None or tanh is None or (product.op_type, tanh.op_type) != ("Mul", "Tanh"):
        return value, None
    quotient = operand(tanh, 0).producer()
    if quotient is None or quotient.op_type != "Div" or scalar(quotient.inputs[1]) != scalar(product.inputs[1]):
        raise FusionError(f"{tanh.name} is not a soft cap")
    return operand(quotient, 0), scalar(product.inputs[1])


def _without_factor(value: ir.Value) -> tuple[ir.Value, float]:
    """Undo a multiplication by a constant."""
    node = value.producer()
    if node is not None and node.op_type == "Mul":
        for factor in node.inputs:
            number = scalar(factor)
            if factor is not None and number is not None:
                return other_input(node, factor), number
    return value, 1.0


def _read_projected(value: ir.Value) -> Projected:
    nodes = _path(value)
    linears = [node for node in nodes if node.op_type == "Linear"]
    norms = [node for node in nodes if node.op_type == NORM]
    rotary_modules = {scope(node) for node in nodes if node.op_type == "Cos"}
    if len(linears) != 1 or len(norms) > 1 or len(rotary_modules) > 1:
        raise FusionError(f"{value.name} does not come from one projection, at most one norm and one rotary embedding")
    return Projected(
        linear=linears[0],
        offset=_offset(linears[0], nodes),
        norm=norms[0] if norms else None,
        rotary_module=rotary_modules.pop() if rotary_modules else None,
    )


def _path(value: ir.Value) -> dict[ir.Node, None]:
    """Collect the nodes between a value and its projection, without the arithmetic on shapes beside them."""
    found: dict[ir.Node, None] = {}
    pending = [value]
    while pending:
        node = pending.pop().producer()
        if node is not None and node not in found:
            found[node] = None
            pending.extend(_carried(node))
    return found


def _carried(node: ir.Node) -> Iterable[ir.Value]:
    if node.op_type in _STEPS:
        return [operand(node, 0)]
    if node.op_type in _JOINTS:
        return [value for value in node.inputs if value is not None]
    if node.op_type in _ENDS:
        return []
    raise FusionError(f"{node.op_type} {node.name} has no place in an attention that can be fused")


def _offset(linear: ir.Node, nodes: Iterable[ir.Node]) -> int:
    """Return the first channel that is cut out of a projection of queries, keys and values side by side."""
    slices = [node for node in nodes if node.op_type == "Slice" and operand(node, 0) is linear.outputs[0]]
    starts = {scalar(operand(node, 1)) for node in slices} or {0.0}
    start = starts.pop()
    if starts or start is None:
        raise FusionError(f"{linear.name} is not cut at constant places")
    return int(start)


def _product_of(softmax: ir.Node) -> ir.Node:
    """Return the product of the probabilities and the values; what lies between guards against empty rows."""
    node: ir.Node | None = softmax
    while node is not None and node.op_type != "MatMul":
        node = _user(node, "MatMul") or _user(node, "Where") or _user(node, "Cast")
    if node is None:
        raise FusionError(f"{softmax.name} is not followed by a product with the values")
    return node


def _following_linear(context: ir.Node) -> ir.Node:
    node: ir.Node | None = context
    for op_type in ("Transpose", "Reshape", "Linear"):
        node = _user(node, op_type) if node is not None else None
    if node is None:
        raise FusionError(f"{context.name} is not followed by an output projection")
    return node


def _user(node: ir.Node, op_type: str) -> ir.Node | None:
    return next((user for user in node.outputs[0].consumers() if user.op_type == op_type), None)


def _read_window(mask: ir.Value) -> int | None:
    """Find ``key position > query position − window`` among what the mask is made of, other tensors' sizes left out."""
    seen: set[ir.Value] = set()
    pending = [mask]
    while pending:
        value = pending.pop()
        node = value.producer()
        if value in seen or node is None or node.op_type == "Shape":
            continue
        seen.add(value)
        if node.op_type == "Greater":
            return _window_of(node)
        pending.extend(found for found in node.inputs if found is not None)
    return None


def _window_of(comparison: ir.Node) -> int:
    bound = operand(comparison, 1).producer()
    window_tokens = scalar(bound.inputs[1]) if bound is not None and bound.op_type == "Sub" else None
    if window_tokens is None:
        raise FusionError(f"{comparison.name} is not the edge of a sliding window")
    return int(window_tokens)
