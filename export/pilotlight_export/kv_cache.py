"""A KV cache in 8 bits: one scale for each channel of a layer's keys and values, from what the model puts there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pilotlight.artifact import KV_SCALES, KV_STEPS
from pilotlight_export.fuse.graph import named, operand
from pilotlight_export.graph_writer import GraphWriter
from pilotlight_export.verify.graph_runner import GraphRunner, Graphs, TokenIds
from pilotlight_export.weights import WeightFile

HEADROOM = 1.1
"""How much larger a value may be than any that was seen, before it is clipped."""
LEAST_SCALE = 1e-8
SCALE_INPUTS = (12, 13)
"""Where GroupQueryAttention takes the scales of keys and values."""

Scales = npt.NDArray[np.float32]


def measure_kv_scales(graphs: Graphs, texts: Sequence[TokenIds]) -> Scales:
    """Read texts with a float graph and return the scale of every channel of its cache.

    Shapes:
        output [layers, 2 (keys, values), kv heads, D]
    """
    largest = np.max([_largest(graphs, text) for text in texts], axis=0)
    scales: Scales = np.maximum(largest * HEADROOM / KV_STEPS, LEAST_SCALE).astype(np.float32)
    return scales


def write_kv_scales(scales: Scales, directory: Path) -> None:
    """Put the scales beside the graphs, for a runtime that quantizes a prompt's cache itself."""
    np.save(directory / KV_SCALES, scales, allow_pickle=False)


def quantize_cache(model: ir.Model, scales: Scales, weights: WeightFile) -> None:
    """Have every attention of a graph keep its keys and values in 8 bits."""
    writer = GraphWriter(model.graph, weights)
    for attention in [node for node in model.graph if node.op_type == "GroupQueryAttention"]:
        layer = int(named(operand(attention, 3)).split(".")[1])  # past_key_values.LAYER.key
        attention.resize_inputs(SCALE_INPUTS[-1] + 1)
        for index, part in enumerate(("k", "v")):
            scale = scales[layer, index][None, :, None, :]
            value = writer.store(f"layers.{layer}.{part}_scale", scale)
            attention.replace_input_with(SCALE_INPUTS[index], value)
            attention.attributes.add(ir.AttrString(f"{part}_quant_type", "PER_CHANNEL"))
        attention.attributes.add(ir.AttrInt64("kv_cache_bit_width", 8))
    for value in (*model.graph.inputs, *model.graph.outputs):
        if named(value).startswith(("past_key_values.", "present.")):
            value.type = ir.TensorType(ir.DataType.INT8)


def _largest(graphs: Graphs, text: TokenIds) -> npt.NDArray[np.float32]:
    runner = GraphRunner(graphs, 1, len(text))
    runner.prefill([text], [[len(text) - 1]])
    largest: npt.NDArray[np.float32] = np.abs(runner.cache).max(axis=(2, 4))
    return largest
