"""Small ONNX graphs for what a device does beside the model: allocate, copy, pick from logits.

They are encoded here because the runtime has no ONNX package, and a device no other way to be asked than through ONNX
Runtime. Source: onnx.proto of ONNX 1.23 for the field numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

IR_VERSION = 10
OPSET = 21
ELEMENT_TYPES = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "float16": 10}

_INT, _TENSOR = 2, 4
"""AttributeProto's types."""

VARINT, BYTES = 0, 2


@dataclass(frozen=True, slots=True)
class Node:
    """One operator; attributes are integers, or scalars with a type, which become tensors of one element."""

    op_type: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    attributes: tuple[tuple[str, int | np.generic], ...] = ()


@dataclass(frozen=True, slots=True)
class Value:
    """An input or output: its element type and its number of axes, whose sizes are open."""

    name: str
    dtype: str
    rank: int


def zeros(values: Sequence[Value]) -> bytes:
    """Return a graph that makes tensors of zeros, each of the sizes that its input ``NAME.axes`` gives."""
    nodes = [
        Node("ConstantOfShape", [f"{value.name}.axes"], [value.name], (("value", np.dtype(value.dtype).type(0)),))
        for value in values
    ]
    return encode(nodes, [Value(f"{value.name}.axes", "int64", 1) for value in values], values)


def copies(names: Sequence[str], dtype: str) -> bytes:
    """Return a graph that copies each ``source.NAME`` to ``target.NAME``, four axes each."""
    nodes = [Node("Identity", [f"source.{name}"], [f"target.{name}"]) for name in names]
    sources, targets = ([Value(f"{end}.{name}", dtype, 4) for name in names] for end in ("source", "target"))
    return encode(nodes, sources, targets)


def likeliest() -> bytes:
    """Return a graph that picks the ``count`` [1] largest of each row of ``logits`` [N, V]: ``values``, ``ids``.

    Of equals the one with the smaller id comes first.
    """
    node = Node("TopK", ["logits", "count"], ["values", "ids"], (("axis", -1), ("largest", 1), ("sorted", 1)))
    inputs = [Value("logits", "float32", 2), Value("count", "int64", 1)]
    return encode([node], inputs, [Value("values", "float32", 2), Value("ids", "int64", 2)])


def rows() -> bytes:
    """Return a graph that picks the rows ``indices`` [M] of ``logits`` [N, V] as ``picked`` [M, V]."""
    node = Node("Gather", ["logits", "indices"], ["picked"], (("axis", 0),))
    return encode(
        [node], [Value("logits", "float32", 2), Value("indices", "int64", 1)], [Value("picked", "float32", 2)]
    )


def encode(nodes: Iterable[Node], inputs: Iterable[Value], outputs: Iterable[Value]) -> bytes:
    """Return a model as ONNX Runtime reads it."""
    graph = b"".join(
        [
            *(_field(1, _node(node)) for node in nodes),
            _field(2, b"small"),
            *(_field(11, _value(value)) for value in inputs),
            *(_field(12, _value(value)) for value in outputs),
        ]
    )
    return _number(1, IR_VERSION) + _field(7, graph) + _field(8, _number(2, OPSET))


def _node(node: Node) -> bytes:
    return b"".join(
        [
            *(_field(1, name.encode()) for name in node.inputs),
            *(_field(2, name.encode()) for name in node.outputs),
            _field(4, node.op_type.encode()),
            *(_field(5, _attribute(name, value)) for name, value in node.attributes),
        ]
    )


def _attribute(name: str, value: int | np.generic) -> bytes:
    if isinstance(value, int):
        return _field(1, name.encode()) + _number(3, value) + _number(20, _INT)
    return _field(1, name.encode()) + _field(5, _scalar(value)) + _number(20, _TENSOR)


def _scalar(value: np.generic) -> bytes:
    return _number(1, 1) + _number(2, element_type(value.dtype)) + _field(9, value.tobytes())


def _value(value: Value) -> bytes:
    axes = b"".join(_field(1, _field(2, f"{value.name}.{axis}".encode())) for axis in range(value.rank))
    tensor = _number(1, ELEMENT_TYPES[value.dtype]) + _field(2, axes)
    return _field(1, value.name.encode()) + _field(2, _field(1, tensor))


def element_type(dtype: DTypeLike | Any) -> int:
    """Return ONNX's number of a type."""
    return ELEMENT_TYPES[np.dtype(dtype).name]


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | BYTES) + _varint(len(content)) + content


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3 | VARINT) + _varint(value & 0xFFFFFFFFFFFFFFFF)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
