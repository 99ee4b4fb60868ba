"""Rotary position embedding: the angles of every position, computed once instead of in each run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pilotlight_export.errors import FusionError
from pilotlight_export.fuse.graph import add_initializer, array_of, is_weight, operand, scalar, scope


@dataclass(frozen=True)
class Rotation:
    """How a model turns queries and keys: radians per position for each pair of channels, and a scale on top."""

    frequencies: npt.NDArray[np.float32]
    scale: float


@dataclass(frozen=True)
class RotaryCaches:
    """Cosines and sines for every position that fits the context.

    Shapes:
        both [max_context_tokens, D / 2]
    """

    cos: ir.Value
    sin: ir.Value


def rotary_modules(graph: ir.Graph) -> list[str]:
    """List the modules that compute rotary angles."""
    return list(dict.fromkeys(scope(node) for node in graph if node.op_type == "Cos"))


def read_rotation(graph: ir.Graph, module: str) -> Rotation:
    """Read the rotary frequencies, with whatever scaling the model has, out of the exported graph.

    Raises:
        FusionError: the module does not compute ``cos(frequencies · position) · scale``.
    """
    cosine = next((node for node in graph if node.op_type == "Cos" and scope(node) == module), None)
    product = _producer_of(cosine, "MatMul")
    frequencies = _constant_source(product)
    if cosine is None or frequencies is None:
        raise FusionError(f"the exported graph has no rotary frequencies in {module}")
    return Rotation(frequencies.astype(np.float32).reshape(-1), _scale_after(cosine))


def add_caches(graph: ir.Graph, name: str, rotation: Rotation, max_context_tokens: int) -> RotaryCaches:
    """Register the cosine and sine caches under a name.

    The angle is a float32 product, as in the model, so that late positions turn by exactly the same amount.
    """
    positions = np.arange(max_context_tokens, dtype=np.float32)
    angles = (positions[:, None] * rotation.frequencies[None, :]).astype(np.float64)
    cos = (np.cos(angles) * rotation.scale).astype(np.float32)
    sin = (np.sin(angles) * rotation.scale).astype(np.float32)
    return RotaryCaches(add_initializer(graph, f"{name}.cos", cos), add_initializer(graph, f"{name}.sin", sin))


def _producer_of(node: ir.Node | None, op_type: str) -> ir.Node | None:
    while node is not None and node.op_type != op_type:
        node = operand(node, 0).producer()
    return node


def _constant_source(product: ir.Node | None) -> Any:
    value = operand(product, 0) if product is not None else None
    while value is not None and not is_weight(value):
        producer = value.producer()
        value = operand(producer, 0) if producer is not None else None
    return array_of(value) if value is not None else None


def _scale_after(cosine: ir.Node) -> float:
    for node in cosine.outputs[0].consumers():
        if node.op_type == "Mul":
            scale = next((scalar(value) for value in node.inputs if scalar(value) is not None), None)
            if scale is not None:
                return scale
    return 1.0
