"""Projections and the embedding, freed from the layout that the exporter gave them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from pilotlight_export.fuse.graph import (
    ABSTRACT,
    add_initializer,
    add_lazy_initializer,
    add_node,
    array_of,
    chain,
    is_weight,
    operand,
    scope,
    weight_shape,
)


def fuse_linears(graph: ir.Graph) -> None:
    """Replace every product with a transposed weight by ``Linear(x, weight, bias)``, named after its module.

    Shapes:
        weight [N, K], bias [N], x [..., K], output [..., N]
    """
    for node in list(graph):
        weight = _transposed_weight(node)
        if weight is not None:
            _replace_product(graph, node, weight)


def fuse_embeddings(graph: ir.Graph, token_ids: ir.Value) -> None:
    """Replace the look-up of the token ids by ``Embedding(weight, ids)``.

    Shapes:
        weight [V, hidden], ids [B, T], output [B, T, hidden]
    """
    for node in list(graph):
        if node.op_type == "Gather" and operand(node, 1) is token_ids and is_weight(node.inputs[0]):
            embedding = add_node(graph, "Embedding", node.inputs, name=scope(node), domain=ABSTRACT)
            node.outputs[0].replace_all_uses_with(embedding.outputs[0])


def pack_linears(graph: ir.Graph, linears: Sequence[ir.Node], name: str) -> ir.Node:
    """Return one ``Linear`` at the module path ``name`` whose outputs are those of several, side by side.

    One wide product reads its input once and is faster in decode; its columns are computed exactly as before.
    """
    parameter = name.lstrip("/").replace("/", ".")
    weight = _concatenated(graph, [operand(linear, 1) for linear in linears], f"{parameter}.weight")
    biases = [linear.inputs[2] for linear in linears if len(linear.inputs) > 2]
    inputs = [operand(linears[0], 0), weight]
    if biases:
        inputs.append(_concatenated(graph, [_bias_or_zeros(graph, linear) for linear in linears], f"{parameter}.bias"))
    return add_node(graph, "Linear", inputs, name=name, domain=ABSTRACT)


def split_columns(graph: ir.Graph, linear: ir.Node, widths: Sequence[int], name: str) -> Sequence[ir.Value]:
    """Cut the output of a packed ``Linear`` into parts of these widths."""
    sizes = add_initializer(graph, f"{name}/widths", np.array(widths, np.int64))
    parts = [f"part{index}" for index in range(len(widths))]
    inputs = [linear.outputs[0], sizes]
    return add_node(graph, "Split", inputs, name=name, outputs=parts, attributes={"axis": -1}).outputs


def unpack_linear(graph: ir.Graph, packed: ir.Node) -> list[ir.Node]:
    """Undo ``split_columns`` of ``pack_linears``: return a ``Linear`` for each part, or the one that is not split."""
    found = chain(packed.outputs[0], "Split")
    if found is None:
        return [packed]
    (split,) = found
    ends = np.cumsum(array_of(operand(split, 1))).tolist()
    linears = []
    for part, start, end in zip(split.outputs, [0, *ends], ends, strict=False):
        sliced = [_sliced(graph, operand(packed, index), start, end) for index in range(1, len(packed.inputs))]
        inputs = [operand(packed, 0), *sliced]
        linears.append(add_node(graph, "Linear", inputs, name=f"{packed.name}/{start}", domain=ABSTRACT))
        linears[-1].outputs[0].type, linears[-1].outputs[0].shape = part.type, part.shape
        part.replace_all_uses_with(linears[-1].outputs[0])
    graph.remove([split, packed], safe=True)
    return linears


def _transposed_weight(node: ir.Node) -> ir.Value | None:
    if node.op_type != "MatMul":
        return None
    transpose = operand(node, 1).producer()
    if transpose is None or transpose.op_type != "Transpose" or not is_weight(transpose.inputs[0]):
        return None
    return transpose.inputs[0]


def _replace_product(graph: ir.Graph, product: ir.Node, weight: ir.Value) -> None:
    bias_add = _bias_add(product)
    inputs = [operand(product, 0), weight]
    replaced = product
    if bias_add is not None:
        inputs.append(next(value for value in bias_add.inputs if value is not None and is_weight(value)))
        replaced = bias_add
    linear = add_node(graph, "Linear", inputs, name=scope(product), domain=ABSTRACT)
    replaced.outputs[0].replace_all_uses_with(linear.outputs[0], replace_graph_outputs=True)


def _bias_add(product: ir.Node) -> ir.Node | None:
    for node in product.outputs[0].consumers():
        if node.op_type == "Add" and scope(node) == scope(product) and any(is_weight(value) for value in node.inputs):
            return node
    return None


def _bias_or_zeros(graph: ir.Graph, linear: ir.Node) -> ir.Value:
    if len(linear.inputs) > 2:
        return operand(linear, 2)
    return add_initializer(graph, f"{linear.name}/zeros", np.zeros(weight_shape(operand(linear, 1))[0], np.float32))


def _concatenated(graph: ir.Graph, weights: Sequence[ir.Value], name: str) -> ir.Value:
    shapes = [weight_shape(weight) for weight in weights]
    shape = ir.Shape([sum(sizes[0] for sizes in shapes), *shapes[0][1:]])

    def concatenate() -> ir.TensorProtocol:
        return ir.tensor(np.concatenate([array_of(weight) for weight in weights]), name=name)

    return add_lazy_initializer(graph, ir.LazyTensor(concatenate, ir.DataType.FLOAT, shape, name=name))


def _sliced(graph: ir.Graph, weight: ir.Value, start: int, end: int) -> ir.Value:
    shape, name = ir.Shape([end - start, *weight_shape(weight)[1:]]), f"{weight.name}.{start}"

    def cut() -> ir.TensorProtocol:
        return ir.tensor(array_of(weight)[start:end], name=name)

    return add_lazy_initializer(graph, ir.LazyTensor(cut, ir.DataType.FLOAT, shape, name=name))
