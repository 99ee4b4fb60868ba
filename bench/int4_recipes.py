"""Which four-bit recipe follows a trained model best? Weights only: activations stay float32.

    nice python bench/int4_recipes.py --model DIR

A half-trained model (``models/demo/train.py --steps 300 --out DIR``) tells recipes apart better than a finished one,
which is sure of nearly every token. Calibrated recipes see answers of the model to built-in questions, and are
measured on answers with other seeds and on the demo's held-out questions.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu
from tokenizers import Tokenizer

from pilotlight.artifact import GRAPH, Shapes
from pilotlight_export.fuse import fuse
from pilotlight_export.fuse.graph import ABSTRACT, array_of, named, operand
from pilotlight_export.lower import lower
from pilotlight_export.quantize import Floats, dequantize_blocks, quantize_blocks
from pilotlight_export.recipes import EXACT, FIRST_LAYER, INT4, INT8, Blocks
from pilotlight_export.source import Source, open_source
from pilotlight_export.trace import trace
from pilotlight_export.verify import passages as sampling
from pilotlight_export.verify.fidelity import measure_fidelity
from pilotlight_export.verify.graph_runner import Graphs
from pilotlight_export.verify.passages import Passage, sample_passages
from pilotlight_export.verify.prompts import Prompts

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "models" / "demo"
RESULTS = Path(__file__).parent / "results"
sys.path.insert(0, str(DEMO))
import corpus  # noqa: E402

SYMMETRIC = Blocks(bits=4)
DAMPING = 0.01
OTHER_SEEDS = range(1, 7)
Moments = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Weight:
    """A weight and the second moments [K, K] of what it multiplies; an embedding has none, a tied head's it has."""

    name: str
    floats: Floats
    moments: NDArray[np.float64]

    @property
    def importance(self) -> Floats:
        return np.diag(self.moments).astype(np.float32) + np.float32(1e-8)


Quantizer = Callable[[Weight], Floats]


def blocks(scheme: Blocks) -> Quantizer:
    return lambda weight: dequantize_blocks(quantize_blocks(weight.floats, scheme), scheme)


def weighted_blocks(scheme: Blocks) -> Quantizer:
    return lambda weight: dequantize_blocks(quantize_blocks(weight.floats, scheme, weight.importance), scheme)


def k_quant(weight: Weight) -> Floats:
    integers, scales, zero_points = quant_tensor_k_quant_cpu(weight.floats.reshape(-1, 32), 4, 32)
    centred = integers.reshape(-1, 32) - zero_points.reshape(-1, 1).astype(np.float32)
    floats: Floats = (centred * scales.reshape(-1, 1)).reshape(weight.floats.shape).astype(np.float32)
    return floats


def half_quadratic(weight: Weight) -> Floats:
    """Fit zero points, which stay floats, so that few weights carry most of the error (HQQ)."""
    rows = weight.floats.reshape(-1, 32)
    lowest, highest = rows.min(axis=1, keepdims=True), rows.max(axis=1, keepdims=True)
    steps = 15 / np.maximum(highest - lowest, 1e-8)
    zero_points, strength = -lowest * steps, 10.0
    for _ in range(20):
        integers = np.clip(np.rint(rows * steps + zero_points), 0, 15)
        error = rows - (integers - zero_points) / steps
        shrunk = np.sign(error) * np.maximum(np.abs(error) - (np.abs(error) + 1e-12) ** -0.3 / strength, 0)
        zero_points = (integers - (rows - shrunk) * steps).mean(axis=1, keepdims=True)
        strength *= 1.01
    integers = np.clip(np.rint(rows * steps + zero_points), 0, 15)
    floats: Floats = ((integers - zero_points) / steps).reshape(weight.floats.shape).astype(np.float32)
    return floats


def error_passing(weight: Weight) -> Floats:
    """Quantize column by column and make up for each one's error in the columns to come (GPTQ)."""
    num_columns = weight.floats.shape[1]
    damping = DAMPING * np.trace(weight.moments) / num_columns
    passed_on = np.linalg.cholesky(np.linalg.inv(weight.moments + damping * np.eye(num_columns))).T
    left, result = weight.floats.astype(np.float64), np.empty_like(weight.floats)
    for first in range(0, num_columns, INT4.block_size):
        block = slice(first, first + INT4.block_size)
        grid = quantize_blocks(left[:, block].astype(np.float32), INT4, weight.importance[block])
        assert grid.zero_points is not None
        scales, zero_points = grid.scales[:, 0].astype(np.float32), (grid.zero_points[:, 0] & 15).astype(np.float32)
        steps = np.where(scales == 0, 1, scales)
        for column in range(first, first + INT4.block_size):
            integers = np.clip(np.rint(left[:, column] / steps) + zero_points, 0, 15)
            result[:, column] = (integers - zero_points) * scales
            error = (left[:, column] - result[:, column]) / passed_on[column, column]
            left[:, column + 1 :] -= np.outer(error, passed_on[column, column + 1 :])
    return result


def keeping(patterns: Sequence[str], rest: Quantizer | None = None) -> Quantizer:
    """Keep the weights whose names fit a pattern at 8 bits."""
    kept, others = blocks(INT8), rest or blocks(INT4)
    return lambda weight: (kept if any(fnmatchcase(weight.name, p) for p in patterns) else others)(weight)


QUANTIZERS: dict[str, Quantizer] = {
    "nearest, symmetric": blocks(replace(SYMMETRIC, scales="nearest")),
    "nearest, zero points": blocks(replace(INT4, scales="nearest")),
    "k-quant": k_quant,
    "HQQ": half_quadratic,
    "least squares, symmetric": blocks(SYMMETRIC),
    "least squares, zero points": blocks(INT4),
    "… weighted by activations": weighted_blocks(INT4),
    "… GPTQ": error_passing,
    "… embedding and head at 8 bits": keeping(["*embed_tokens*", "*lm_head*"]),
    "… q, k, v at 8 bits": keeping(["*qkv_proj*"]),
    "… o at 8 bits": keeping(["*o_proj*"]),
    "… gate and up at 8 bits": keeping(["*gate_up_proj*"]),
    "… down at 8 bits": keeping(["*down_proj*"]),
    "… first layer at 8 bits (int4)": keeping([FIRST_LAYER]),
    "… second layer at 8 bits": keeping(["*.layers.1.*"]),
    "… first layer at 8 bits, HQQ": keeping([FIRST_LAYER], half_quadratic),
    "… first layer at 8 bits, weighted": keeping([FIRST_LAYER], weighted_blocks(INT4)),
    "… first layer at 8 bits, GPTQ": keeping([FIRST_LAYER], error_passing),
    "… first layer, embedding and head at 8 bits (int4-heads8)": keeping([FIRST_LAYER, "*embed_tokens*", "*lm_head*"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO / "model", help="a model trained on the demo's corpus")
    parser.add_argument("--name", default="int4-recipes", help="of the file in bench/results")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        rows = measure(open_source(str(args.model), None), Path(name))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{args.name}.json").write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
    columns = list(next(iter(rows.values())))
    print(f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for row, figures in rows.items():
        print(f"| {row} | {' | '.join(f'{figures[column]:.4g}' for column in columns)} |")


def measure(source: Source, directory: Path) -> dict[str, dict[str, float]]:
    """Return the fidelity of every recipe."""
    fused = trace(source.directory, _make(directory / "traced"))
    fuse(fused, source.shapes)
    lower(fused, EXACT, _make(directory / "exact"))
    exact = Graphs(directory / "exact", source.shapes)
    seen, free = _answers(source, exact, [sampling.SEED]), _answers(source, exact, OTHER_SEEDS)
    texts = {"held-out": _held_out(source), "free": free}
    moments = second_moments(directory / "exact" / GRAPH, source.shapes, seen)
    rows = {}
    for name, quantizer in QUANTIZERS.items():
        lower(_quantized(fused, quantizer, moments), EXACT, _make(directory / name.replace(" ", "-")))
        graphs = Graphs(directory / name.replace(" ", "-"), source.shapes)
        found = {text: measure_fidelity(exact, graphs, passages) for text, passages in texts.items()}
        rows[name] = {f"{t} {f}": getattr(found[t], f) for t in texts for f in ("mean_kl", "p99_kl", "top1_agreement")}
        print(name, file=sys.stderr)
    return rows


def second_moments(graph_path: Path, shapes: Shapes, passages: Sequence[Passage]) -> Moments:
    """Run the fp32 graph with the inputs of all products as outputs and sum up x · xᵀ over all tokens."""
    model = onnx.load(graph_path)
    inputs = {n.input[1].removesuffix(".transposed"): n.input[0] for n in model.graph.node if n.op_type in _PRODUCTS}
    for value in dict.fromkeys(inputs.values()):
        model.graph.output.append(onnx.helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, None))
    onnx.save(model, graph_path.with_name("inputs.onnx"))
    session: Any = ort.InferenceSession(str(graph_path.with_name("inputs.onnx")))
    wanted = list(dict.fromkeys(inputs.values()))
    sums = dict.fromkeys(inputs, np.zeros(()))
    for passage in passages:
        found = dict(zip(wanted, session.run(wanted, _whole_text(passage.tokens, shapes)), strict=True))
        for name, value in inputs.items():
            rows = found[value].reshape(-1, found[value].shape[-1]).astype(np.float64)
            sums[name] = sums[name] + rows.T @ rows
    return sums


_PRODUCTS = ("MatMul", "Gemm")


def _whole_text(tokens: list[int], shapes: Shapes) -> dict[str, NDArray[Any]]:
    cache = np.zeros((1, shapes.num_kv_heads, len(tokens), shapes.head_size), np.float32)
    names = [f"past_key_values.{layer}.{kind}" for layer in range(shapes.num_layers) for kind in ("key", "value")]
    return {
        "input_ids": np.array([tokens]),
        "seqlens_k": np.array([len(tokens) - 1], np.int32),
        "total_sequence_length": np.array(len(tokens), np.int32),
        "logits_indices": np.arange(len(tokens)),
        **dict.fromkeys(names, cache),
    }


def _quantized(fused: ir.Model, quantizer: Quantizer, moments: Moments) -> ir.Model:
    """Return a copy whose weights are what the quantizer makes of them."""
    model = fused.clone()
    for node in [node for node in model.graph if node.domain == ABSTRACT]:
        value = operand(node, 0 if node.op_type == "Embedding" else 1)
        weight = Weight(named(value), array_of(value), moments[named(value)])
        if not isinstance(value.const_value, ir.Tensor):  # a tied weight comes up twice
            value.const_value = ir.tensor(quantizer(weight), name=weight.name)
    return model


def _answers(source: Source, exact: Graphs, seeds: Sequence[int]) -> list[Passage]:
    prompts, found = Prompts(source.directory), []
    for seed in seeds:
        sampling.SEED = seed
        found += sample_passages(exact, prompts, source.special_tokens.eos_ids)
    return found


def _held_out(source: Source) -> list[Passage]:
    tokenizer = Tokenizer.from_file(str(source.directory / "tokenizer.json"))
    turns = [turn for task in corpus.TASKS for turn in corpus.held_out_turns(task, 40)]
    asked = [f"<|im_start|>user\n{turn.question}<|im_end|>\n<|im_start|>assistant\n" for turn in turns]
    answered = [f"{turn.answer}<|im_end|>" for turn in turns]
    return [Passage(tokenizer.encode(q).ids, tokenizer.encode(a).ids) for q, a in zip(asked, answered, strict=True)]


def _make(directory: Path) -> Path:
    directory.mkdir()
    return directory


if __name__ == "__main__":
    main()
