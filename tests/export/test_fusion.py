"""The fused graph computes what transformers computes, however it is run, and nothing unfused is left in it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from pilotlight_export.errors import FusionError
from pilotlight_export.fuse import check_fused, fuse
from pilotlight_export.trace import trace
from pilotlight_export.verify.graph_runner import GraphRunner, Graphs, Logits
from tiny_models import FusedModel

pytestmark = pytest.mark.model
TOLERANCE = 1e-4
RANDOM = np.random.default_rng(3)
TEXTS = [RANDOM.integers(0, 320, length).tolist() for length in (40, 17, 29)]


def difference(expected: Logits, found: Logits) -> float:
    assert expected.shape == found.shape
    return float(np.abs(expected - found).max())


def runner_of(variant: FusedModel, num_rows: int, cache_tokens: int) -> GraphRunner:
    return GraphRunner(Graphs(variant.graph_path.parent, variant.source.shapes), num_rows, cache_tokens)


def test_whole_context_in_one_pass(variant: FusedModel) -> None:
    tokens = np.random.default_rng(5).integers(0, 320, variant.source.shapes.max_context_tokens).tolist()
    runner = runner_of(variant, 1, len(tokens))
    positions = range(len(tokens))
    found = runner.prefill([tokens], [positions])
    assert difference(variant.reference.logits(tokens, positions), found) <= TOLERANCE


def test_chunk_by_chunk(variant: FusedModel) -> None:
    tokens = TEXTS[0]
    runner = runner_of(variant, 1, 64)
    found = [runner.prefill([tokens[:7]], [range(7)]), runner.extend(tokens[7:8]), runner.extend(tokens[8:])]
    expected = variant.reference.logits(tokens, range(len(tokens)))
    assert difference(expected, np.concatenate(found)) <= TOLERANCE


def test_step_by_step_in_a_ragged_batch(variant: FusedModel) -> None:
    num_steps = 12
    prompts = [text[:-num_steps] for text in TEXTS]
    runner = runner_of(variant, len(TEXTS), 64)
    found = [runner.prefill(prompts, [[len(prompt) - 1] for prompt in prompts])]
    for step in range(num_steps):
        found.append(runner.decode(np.array([text[len(text) - num_steps + step] for text in TEXTS])))
    for row, text in enumerate(TEXTS):
        expected = variant.reference.logits(text, range(len(text) - num_steps - 1, len(text)))
        assert difference(expected, np.stack([logits[row] for logits in found])) <= TOLERANCE


def test_a_prefill_may_ask_for_no_logits(variant: FusedModel) -> None:
    runner = runner_of(variant, 1, 64)
    assert runner.prefill([TEXTS[0]], [[]]).shape == (0, 320)


def test_one_attention_node_a_layer_and_no_arithmetic_on_shapes(variant: FusedModel) -> None:
    counts = Counter(node.op_type for node in variant.fused.graph)
    num_layers = variant.source.shapes.num_layers
    assert counts["GroupQueryAttention"] == num_layers
    assert counts["SkipSimplifiedLayerNormalization"] == 2 * num_layers
    assert counts["SimplifiedLayerNormalization"] == 1
    assert counts["Linear"] == 4 * num_layers + 1
    assert set(counts) <= {
        "GroupQueryAttention",
        "SkipSimplifiedLayerNormalization",
        "SimplifiedLayerNormalization",
        "Linear",
        "Embedding",
        "Split",
        "QuickGelu",
        "Mul",
        "Flatten",
        "Gather",
    }


def test_interface_is_the_one_that_artifacts_promise(variant: FusedModel) -> None:
    shapes = variant.source.shapes
    graph = variant.fused.graph
    pasts = [f"past_key_values.{layer}.{part}" for layer in range(shapes.num_layers) for part in ("key", "value")]
    presents = [f"present.{layer}.{part}" for layer in range(shapes.num_layers) for part in ("key", "value")]
    heads = ["input_ids", "seqlens_k", "total_sequence_length", "logits_indices"]
    assert [value.name for value in graph.inputs] == [*heads, *pasts]
    assert [value.name for value in graph.outputs] == ["logits", *presents]
    assert str(graph.inputs[4].shape) == f"[batch,{shapes.num_kv_heads},cache_tokens,{shapes.head_size}]"
    assert str(graph.outputs[0].shape) == "[positions,320]"


def test_last_feed_forward_network_sees_requested_positions_only(variant: FusedModel) -> None:
    last = variant.source.shapes.num_layers - 1
    projection = next(node for node in variant.fused.graph if node.name == f"/model/layers.{last}/self_attn/o_proj")
    gathered = projection.inputs[0]
    assert gathered is not None
    producer = gathered.producer()
    assert producer is not None
    assert producer.op_type == "Gather"


def test_leftover_attention_is_refused(variant: FusedModel) -> None:
    graph = variant.fused.clone().graph
    graph.append(ir.node("Softmax", [graph.inputs[4]], name="/model/layers.0/self_attn/Softmax"))
    with pytest.raises(FusionError, match=r"Softmax /model/layers\.0/self_attn/Softmax was not fused"):
        check_fused(graph, variant.source.shapes)


def test_a_missing_attention_is_refused(variant: FusedModel) -> None:
    graph = variant.fused.clone().graph
    graph.remove(next(node for node in graph if node.op_type == "GroupQueryAttention"))
    with pytest.raises(FusionError, match="attention nodes in a model of"):
        check_fused(graph, variant.source.shapes)


def test_an_attention_of_another_shape_is_refused(variant: FusedModel, tmp_path: Path) -> None:
    traced = trace(variant.source.directory, tmp_path)
    product = next(node for node in traced.graph if node.name == "/model/layers.0/self_attn/MatMul")
    clipped = ir.node("Clip", [product.inputs[0]], name="/model/layers.0/self_attn/Clip")
    traced.graph.insert_before(product, clipped)
    product.replace_input_with(0, clipped.outputs[0])
    with pytest.raises(FusionError, match=r"Clip /model/layers\.0/self_attn/Clip has no place in an attention"):
        fuse(traced, variant.source.shapes)
