"""Fusion: from Optimum's graph to the few nodes that ONNX Runtime runs fast, as ``pilotlight.artifact`` declares them.

The exported graph is edited, not rebuilt: what no fusion recognises stays as it is, so nothing that a model computes
can be lost unnoticed. Projections are found by the module paths that the exporter leaves in node names, norms and
activations by their shape. The result still has abstract ``Linear`` and ``Embedding`` nodes; ``lower`` gives them their
precision.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from pilotlight.artifact import Shapes
from pilotlight_export.errors import FusionError
from pilotlight_export.fuse.attention import Cache, Present, fuse_attention
from pilotlight_export.fuse.graph import find_node
from pilotlight_export.fuse.linear import fuse_embeddings, fuse_linears
from pilotlight_export.fuse.mlp import fuse_gelu, fuse_silu, pack_gate_and_up
from pilotlight_export.fuse.norm import drop_float_casts, fuse_norms, fuse_residuals
from pilotlight_export.fuse.positions import gather_requested
from pilotlight_export.fuse.rotary import add_caches, read_rotation, rotary_modules

UNFUSED = frozenset(
    {"Softmax", "MatMul", "Concat", "Cos", "Sin", "Pow", "ReduceMean", "Range", "Shape", "Expand", "Where", "Cast"}
)
"""Operators of attention, projections, rotary angles, norms and shape arithmetic: none survives a complete fusion."""


def fuse(model: ir.Model, shapes: Shapes) -> None:
    """Turn Optimum's graph into the artifact's graph, in place.

    Raises:
        FusionError: the graph is not shaped as a decoder's, or something in it was left unfused.
    """
    graph = model.graph
    _lift_constants(model)
    cache = _replace_inputs(graph, shapes)
    drop_float_casts(graph)
    fuse_embeddings(graph, graph.inputs[0])
    fuse_linears(graph)
    fuse_norms(graph)
    fuse_silu(graph)
    fuse_gelu(graph)
    presents = _fuse_layers(graph, shapes, cache)
    fuse_residuals(graph)
    _replace_outputs(graph, shapes, presents)
    _clean(model)
    _gather_requested(graph, shapes)
    _clean(model)
    check_fused(graph, shapes)


def check_fused(graph: ir.Graph, shapes: Shapes) -> None:
    """Check that one attention node per layer, and nothing of the unfused attention, is left.

    Raises:
        FusionError: it is not so.
    """
    num_attentions = sum(node.op_type == "GroupQueryAttention" for node in graph)
    if num_attentions != shapes.num_layers:
        raise FusionError(f"fused {num_attentions} attention nodes in a model of {shapes.num_layers} layers")
    left = next((node for node in graph if node.op_type in UNFUSED), None)
    if left is not None:
        raise FusionError(f"{left.op_type} {left.name} was not fused")


def _lift_constants(model: ir.Model) -> None:
    common.IdentityEliminationPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)


def _replace_inputs(graph: ir.Graph, shapes: Shapes) -> Cache:
    """Declare the artifact's inputs; the exported mask and positions stay as values until nothing uses them."""
    token_ids = _input(graph, "input_ids")
    token_ids.shape = ir.Shape(["batch", "tokens"])
    cache = Cache(
        seqlens_k=ir.val("seqlens_k", ir.DataType.INT32, ["batch"]),
        total_sequence_length=ir.val("total_sequence_length", ir.DataType.INT32, []),
        keys=[_input(graph, f"past_key_values.{layer}.key") for layer in range(shapes.num_layers)],
        values=[_input(graph, f"past_key_values.{layer}.value") for layer in range(shapes.num_layers)],
    )
    for value in (*cache.keys, *cache.values):
        value.shape = _cache_shape(shapes)
    logits_indices = ir.val("logits_indices", ir.DataType.INT64, ["positions"])
    pasts = [value for layer in zip(cache.keys, cache.values, strict=True) for value in layer]
    graph.inputs.clear()
    graph.inputs.extend([token_ids, cache.seqlens_k, cache.total_sequence_length, logits_indices, *pasts])
    return cache


def _input(graph: ir.Graph, name: str) -> ir.Value:
    for value in graph.inputs:
        if value.name == name:
            return value
    raise FusionError(f"the exported graph has no input {name}")


def _fuse_layers(graph: ir.Graph, shapes: Shapes, cache: Cache) -> list[Present]:
    caches = {
        module: add_caches(graph, module.rpartition("/")[2], read_rotation(graph, module), shapes.max_context_tokens)
        for module in rotary_modules(graph)
    }
    presents = []
    for layer in range(shapes.num_layers):
        presents.append(fuse_attention(graph, layer, shapes, cache, caches))
        pack_gate_and_up(graph, layer)
    return presents


def _replace_outputs(graph: ir.Graph, shapes: Shapes, presents: list[Present]) -> None:
    logits = graph.outputs[0]
    outputs = [_declared(logits, "logits", ir.Shape(["positions", shapes.vocab_size]))]
    for layer, present in enumerate(presents):
        outputs.append(_declared(present.key, f"present.{layer}.key", _cache_shape(shapes)))
        outputs.append(_declared(present.value, f"present.{layer}.value", _cache_shape(shapes)))
    graph.outputs.clear()
    graph.outputs.extend(outputs)


def _declared(value: ir.Value, name: str, shape: ir.Shape) -> ir.Value:
    value.name, value.dtype, value.shape = name, ir.DataType.FLOAT, shape
    return value


def _cache_shape(shapes: Shapes) -> ir.Shape:
    return ir.Shape(["batch", shapes.num_kv_heads, "cache_tokens", shapes.head_size])


def _gather_requested(graph: ir.Graph, shapes: Shapes) -> None:
    last = find_node(graph, f"/model/layers.{shapes.num_layers - 1}/self_attn/GroupQueryAttention")
    gather_requested(graph, last, _input(graph, "logits_indices"))


def _clean(model: ir.Model) -> None:
    common.RemoveUnusedNodesPass()(model)
    common.ClearMetadataAndDocStringPass()(model)
    model.graph.sort()
