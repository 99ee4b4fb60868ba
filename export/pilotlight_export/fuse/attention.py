"""Attention: one GroupQueryAttention per layer, with the rotary embedding and the KV cache inside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from pilotlight.artifact import Shapes
from pilotlight_export.errors import FusionError
from pilotlight_export.fuse.exported_attention import ExportedAttention, read_attention
from pilotlight_export.fuse.graph import KERNELS, add_initializer, add_node, operand, scope, weight_shape
from pilotlight_export.fuse.linear import pack_linears, split_columns
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
    graph: ir.Graph, layer: int, shapes: Shapes, cache: Cache, caches: Mapping[str, RotaryCaches]
) -> Present:
    """Put one GroupQueryAttention between a layer's projections; what it replaces is left unused.

    Shapes:
        its input is the packed projection [B, T, (heads + 2 · kv heads) · D], its output [B, T, heads · D]

    Raises:
        FusionError: the layer's attention is not one that the kernel computes.
    """
    module = f"/model/layers.{layer}/self_attn"
    exported = read_attention(graph, module)
    _check_widths(exported, shapes)
    rotary = _rotary_of(exported, caches)
    queries_keys_values = _project(graph, module, exported, shapes)
    state = [cache.keys[layer], cache.values[layer], cache.seqlens_k, cache.total_sequence_length]
    attention = add_node(
        graph,
        "GroupQueryAttention",
        [*queries_keys_values, *state, *rotary],
        name=f"{module}/GroupQueryAttention",
        domain=KERNELS,
        outputs=("output", "present_key", "present_value"),
        attributes=_attributes(exported, shapes),
    )
    exported.output.replace_input_with(0, attention.outputs[0])
    return Present(attention.outputs[1], attention.outputs[2])


def _attributes(exported: ExportedAttention, shapes: Shapes) -> dict[str, int | float]:
    attributes: dict[str, int | float] = {
        "num_heads": shapes.num_heads,
        "kv_num_heads": shapes.num_kv_heads,
        "do_rotary": int(exported.query.rotary_module is not None),
        "scale": exported.scale,
    }
    if exported.softcap is not None:
        attributes["softcap"] = exported.softcap
    if exported.window_tokens is not None:
        attributes["local_window_size"] = exported.window_tokens
    return attributes


def _rotary_of(exported: ExportedAttention, caches: Mapping[str, RotaryCaches]) -> list[ir.Value]:
    """Return the caches of the layer's rotary embedding; a layer may have none and know order by its mask alone."""
    module = exported.query.rotary_module
    if module != exported.key.rotary_module or exported.value.rotary_module is not None:
        raise FusionError(f"{exported.query.linear.name} and its key are not turned by the same rotary embedding")
    return [caches[module].cos, caches[module].sin] if module is not None else []


def _check_widths(exported: ExportedAttention, shapes: Shapes) -> None:
    query_width, kv_width = shapes.num_heads * shapes.head_size, shapes.num_kv_heads * shapes.head_size
    if exported.query.linear is exported.value.linear:
        expected, found = [0, query_width, query_width + kv_width], [part.offset for part in exported.parts]
    else:
        expected, found = [query_width, kv_width, kv_width], [_width(part.linear) for part in exported.parts]
    if expected != found:
        raise FusionError(f"{exported.query.linear.name} and its like do not fit the head sizes in config.json")


def _project(graph: ir.Graph, module: str, exported: ExportedAttention, shapes: Shapes) -> list[ir.Value | None]:
    """Return the packed projection, or queries, keys and values one by one where norms lie behind it."""
    linears = list(dict.fromkeys(part.linear for part in exported.parts))
    packed = linears[0] if len(linears) == 1 else pack_linears(graph, linears, f"{module}/qkv_proj")
    query_norm, key_norm = _norms(exported)
    if query_norm is None or key_norm is None:
        return [packed.outputs[0], None, None]
    query, key, value = split_columns(graph, packed, [_width(linear) for linear in linears], f"{module}/Split")
    return [_normed(graph, query, query_norm, shapes), _normed(graph, key, key_norm, shapes), value]


def _normed(graph: ir.Graph, value: ir.Value, norm: ir.Node, shapes: Shapes) -> ir.Value:
    """Apply a norm to a projection: to each head by itself where its weight is one head wide, else to the whole.

    The kernel can norm heads itself, but not on CPUs: its ``q_norm_weight`` and ``k_norm_weight`` are for GPUs only.
    """
    is_per_head = weight_shape(operand(norm, 1)) == (shapes.head_size,)
    heads = _reshaped(graph, value, [0, 0, -1, shapes.head_size], f"{scope(norm)}/heads") if is_per_head else value
    norm.replace_input_with(0, heads)
    return _reshaped(graph, norm.outputs[0], [0, 0, -1], f"{scope(norm)}/merged") if is_per_head else norm.outputs[0]


def _reshaped(graph: ir.Graph, value: ir.Value, sizes: list[int], name: str) -> ir.Value:
    shape = add_initializer(graph, f"{name}/shape", np.array(sizes, np.int64))
    return add_node(graph, "Reshape", [value, shape], name=name).outputs[0]


def _norms(exported: ExportedAttention) -> tuple[ir.Node | None, ir.Node | None]:
    query_norm, key_norm = exported.query.norm, exported.key.norm
    if (query_norm is None) != (key_norm is None) or exported.value.norm is not None:
        raise FusionError(f"{exported.query.linear.name}: either queries and keys are normed, or nothing is")
    return query_norm, key_norm


def _width(linear: ir.Node) -> int:
    return weight_shape(operand(linear, 1))[0]
