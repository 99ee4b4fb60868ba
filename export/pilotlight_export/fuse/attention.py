"""Attention: one GroupQueryAttention per layer, with the rotary embedding and the KV cache inside."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from pilotlight.artifact import Shapes
from pilotlight_export.families import Family
from pilotlight_export.fuse.graph import KERNELS, add_node, find_node
from pilotlight_export.fuse.linear import pack_linears
from pilotlight_export.fuse.rotary import RotaryCaches


@dataclass(frozen=True)
class Cache:
    """The graph inputs that say what is in the KV cache, and the cache itself, layer by layer."""

    seqlens_k: ir.Value
    total_sequence_length: ir.Value
    keys: list[ir.Value]
    values: list[ir.Value]


@dataclass(frozen=True)
class Present:
    """One layer's cache after the run."""

    key: ir.Value
    value: ir.Value


def fuse_attention(
    graph: ir.Graph, layer: int, family: Family, shapes: Shapes, cache: Cache, rotary: RotaryCaches
) -> Present:
    """Put one GroupQueryAttention between a layer's projections; what it replaces is left unused.

    Shapes:
        its input is the packed projection [B, T, (heads + 2 · kv heads) · D], its output [B, T, heads · D]

    Raises:
        FusionError: the layer has no such projections.
    """
    module = f"/model/layers.{layer}"
    projections = [find_node(graph, f"{module}/{name}") for name in (family.query, family.key, family.value)]
    packed = pack_linears(graph, projections, f"{module}/self_attn/qkv_proj")
    attention = add_node(
        graph,
        "GroupQueryAttention",
        [
            packed.outputs[0],
            None,
            None,
            cache.keys[layer],
            cache.values[layer],
            cache.seqlens_k,
            cache.total_sequence_length,
            rotary.cos,
            rotary.sin,
        ],
        name=f"{module}/self_attn/GroupQueryAttention",
        domain=KERNELS,
        outputs=("output", "present_key", "present_value"),
        attributes={"num_heads": shapes.num_heads, "kv_num_heads": shapes.num_kv_heads, "do_rotary": 1},
    )
    find_node(graph, f"{module}/{family.attention_out}").replace_input_with(0, attention.outputs[0])
    return Present(attention.outputs[1], attention.outputs[2])
