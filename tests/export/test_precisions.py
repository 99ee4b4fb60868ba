"""Every precision as a graph: its interface, its errors on a trained model, what its rows depend on, its size."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from tokenizers import Tokenizer

import corpus
from pilotlight.artifact import (
    BATCH_GRAPH,
    GRAPH,
    KV_STEPS,
    PREFILL_GRAPH,
    PREFILL_WEIGHTS,
    WEIGHTS,
    Artifact,
    Manifest,
)
from pilotlight_export.errors import UnsupportedModel
from pilotlight_export.export import export_model
from pilotlight_export.fuse import fuse
from pilotlight_export.kv_cache import Scales, measure_kv_scales, write_kv_scales
from pilotlight_export.lower import lower
from pilotlight_export.progress import Progress
from pilotlight_export.recipes import EXACT, RECIPES, Blocks, GraphRecipe, Recipe
from pilotlight_export.source import Source, open_source
from pilotlight_export.trace import trace
from pilotlight_export.verify.fidelity import Fidelity, measure_fidelity
from pilotlight_export.verify.graph_runner import GraphRunner, Graphs
from pilotlight_export.verify.passages import Passage, sample_passages
from pilotlight_export.verify.prompts import Prompts
from pilotlight_export.weights import MAX_INLINE_BYTES, PAGE_BYTES
from tiny_models import write_model

DEMO_WIDTH = 192
DEMO_MODEL = Path(__file__).parents[2] / "models" / "demo" / "model"
FITTING = [name for name, recipe in RECIPES.items() if not any(DEMO_WIDTH % size for size in recipe.block_sizes)]
QUANTIZED = [name for name in FITTING if name != "fp32"]


@dataclass(frozen=True)
class Lowered:
    """The trained demo model in every recipe, and the text on which they are compared."""

    source: Source
    directories: dict[str, Path]
    passages: list[Passage]
    kv_scales: Scales

    def graphs(self, recipe: str) -> Graphs:
        return Graphs(self.directories[recipe], self.source.shapes)

    def fidelity(self, recipe: str) -> Fidelity:
        return measure_fidelity(self.graphs("fp32"), self.graphs(recipe), self.passages)


@pytest.fixture(scope="module")
def demo(one_torch_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    directory = tmp_path_factory.mktemp("demo")
    source = open_source(str(DEMO_MODEL), None)
    fused = trace(source.directory, directory / "traced")
    fuse(fused, source.shapes)
    directories = {name: directory / name for name in FITTING}
    make(fused, EXACT, directories["fp32"])
    graphs = Graphs(directories["fp32"], source.shapes)
    answers = sample_passages(graphs, Prompts(source.directory), source.special_tokens.eos_ids)
    kv_scales = measure_kv_scales(graphs, [passage.tokens for passage in answers])
    for name in QUANTIZED:
        make(fused, RECIPES[name], directories[name], kv_scales)
    return Lowered(source, directories, [*answers, *held_out_passages(5)], kv_scales)


def make(fused: ir.Model, recipe: Recipe, directory: Path, kv_scales: Scales | None = None) -> None:
    directory.mkdir()
    if recipe.has_int8_cache and kv_scales is not None:
        lower(fused, recipe, directory, kv_scales)
        write_kv_scales(kv_scales, directory)
    else:
        lower(fused, recipe, directory)


def held_out_passages(num_questions: int) -> Iterator[Passage]:
    tokenizer = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    for task in corpus.TASKS:
        for turn in corpus.held_out_turns(task, num_questions):
            question = f"<|im_start|>user\n{turn.question}<|im_end|>\n<|im_start|>assistant\n"
            yield Passage(tokenizer.encode(question).ids, tokenizer.encode(f"{turn.answer}<|im_end|>").ids)


def places(path: Path) -> dict[str, tuple[str, int | None]]:
    """Return in which file, and where in it, a graph's weights lie."""
    tensors = {name: value.const_value for name, value in ir.load(path).graph.initializers.items()}
    return {name: (str(t.location), t.offset) for name, t in tensors.items() if isinstance(t, ir.ExternalTensor)}


def external_files(path: Path) -> set[str]:
    return {file for file, _ in places(path).values()}


@pytest.mark.model
@pytest.mark.parametrize("name", QUANTIZED)
def test_the_interface_is_that_of_fp32(demo: Lowered, name: str) -> None:
    exact = ir.load(demo.directories["fp32"] / GRAPH).graph
    for path in demo.directories[name].glob("*.onnx"):
        graph = ir.load(path).graph
        for values, expected in ((graph.inputs, exact.inputs), (graph.outputs, exact.outputs)):
            assert [(value.name, value.shape) for value in values] == [(e.name, e.shape) for e in expected]
        assert graph.outputs[0].dtype == ir.DataType.FLOAT
        caches = {value.dtype for value in (*graph.inputs[4:], *graph.outputs[1:])}
        if RECIPES[name].has_int8_cache and path.name != PREFILL_GRAPH:
            assert caches == {ir.DataType.INT8}
        else:
            assert caches == {ir.DataType.FLOAT16 if RECIPES[name].kv_dtype == "float16" else ir.DataType.FLOAT}


@pytest.mark.model
@pytest.mark.parametrize(
    ("name", "least_top1", "largest_kl"),
    [
        ("fp16", 0.99, 1e-4),
        ("int8", 0.97, 1e-3),
        ("w8a8", 0.97, 5e-3),
        ("int4", 0.95, 0.02),
        ("int4-cache8", 0.95, 0.02),
        ("hybrid", 0.95, 0.02),
        ("hybrid-cache32", 0.95, 0.02),
    ],
)
def test_a_trained_model_says_nearly_the_same(demo: Lowered, name: str, least_top1: float, largest_kl: float) -> None:
    fidelity = demo.fidelity(name)
    assert fidelity.top1_agreement >= least_top1
    assert 0 < fidelity.mean_kl <= largest_kl
    assert fidelity.decode_mean_kl <= 2 * largest_kl


@pytest.mark.model
def test_better_int4_recipes_diverge_less(demo: Lowered) -> None:
    heads8, default, nearest = (demo.fidelity(name).mean_kl for name in ("int4-heads8", "int4", "int4-nearest"))
    assert heads8 < default < 0.6 * nearest


@pytest.mark.model
@pytest.mark.parametrize("name", ["w8a8", "int4", "hybrid"])
def test_neighbours_do_not_change_a_row(demo: Lowered, name: str) -> None:
    graphs = demo.graphs(name)
    row = demo.passages[0].question

    def logits_beside(neighbours: list[list[int]]) -> npt.NDArray[np.float32]:
        runner = GraphRunner(graphs, 4, 64)
        rows = [row, *neighbours]
        first = runner.prefill(rows, [[len(tokens) - 1] for tokens in rows])
        return np.stack([first[0], runner.decode(first.argmax(axis=-1))[0]])

    quiet = logits_beside([[5] * len(row)] * 3)
    loud = logits_beside([[token] * len(row) for token in (9, 77, 301)])
    np.testing.assert_array_equal(quiet, loud)


@pytest.mark.model
def test_a_sequence_may_change_graphs_at_any_step(demo: Lowered) -> None:
    hybrid, exact = demo.graphs("hybrid"), demo.graphs("fp32")
    tokens = demo.passages[-1].tokens
    runner, expected = GraphRunner(hybrid, 1, len(tokens)), GraphRunner(exact, 1, len(tokens))
    runner.prefill([tokens[:8]], [[7]])
    expected.prefill([tokens[:8]], [[7]])
    agreement = []
    for step, token in enumerate(tokens[8:]):
        if step % 5 == 4:
            hybrid.decode, hybrid.batch = hybrid.batch, hybrid.decode
        found, wanted = (each.decode(np.array([token])) for each in (runner, expected))
        agreement.append(found.argmax() == wanted.argmax())
    assert np.mean(agreement) >= 0.95


@pytest.mark.model
def test_an_int8_cache_costs_little_beside_int4_weights(demo: Lowered) -> None:
    """Read as one prompt, each token attends to keys and values that went through eight bits."""
    cache8, cache32 = demo.fidelity("int4-cache8"), demo.fidelity("int4")
    assert cache8.mean_kl != cache32.mean_kl
    assert cache8.mean_kl <= 1.3 * cache32.mean_kl


@pytest.mark.model
def test_no_channel_of_the_cache_is_clipped_or_wasted(demo: Lowered) -> None:
    tokens = demo.passages[0].tokens
    runner = GraphRunner(demo.graphs("fp32"), 1, len(tokens))
    runner.prefill([tokens], [[len(tokens) - 1]])
    steps = np.abs(runner.cache / demo.kv_scales[:, :, None, :, None]).max(axis=(2, 4))
    assert steps.max() <= KV_STEPS
    assert np.median(steps) > KV_STEPS / 4


@pytest.mark.model
def test_the_graphs_of_a_hybrid_share_what_is_equal(demo: Lowered) -> None:
    hybrid = demo.directories["hybrid"]
    assert external_files(hybrid / GRAPH) == {WEIGHTS}
    assert external_files(hybrid / PREFILL_GRAPH) == {WEIGHTS, PREFILL_WEIGHTS}
    assert external_files(hybrid / BATCH_GRAPH) == {WEIGHTS, PREFILL_WEIGHTS}
    main, prefill, batch = (places(hybrid / name) for name in (GRAPH, PREFILL_GRAPH, BATCH_GRAPH))
    embedding = "model.embed_tokens.weight.rows"
    assert main[embedding] == prefill[embedding] == batch[embedding]
    integers = {name for name in prefill if name.endswith(".integers")}
    assert len(integers) == 5 * demo.source.shapes.num_layers + 1
    assert all(prefill[name] == batch[name] for name in integers)


@pytest.mark.model
@pytest.mark.parametrize("name", ["int4", "hybrid", "fp16"])
def test_lowering_again_gives_the_same_bytes(demo: Lowered, tmp_path: Path, name: str) -> None:
    fused = trace(demo.source.directory, tmp_path / "traced")
    fuse(fused, demo.source.shapes)
    make(fused, RECIPES[name], tmp_path / "again", demo.kv_scales)
    for path in demo.directories[name].iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.model
def test_a_graph_can_be_halved_and_then_not(demo: Lowered, artifacts: dict[str, Artifact]) -> None:
    """Lowering to float16 first must leave the fused graph as it was: types are shared between clones."""
    assert artifacts["fp16"].manifest.kv.dtype == "float16"
    assert artifacts["int8"].manifest.kv.dtype == "float32"
    assert {artifacts[name].manifest.precision for name in artifacts} == set(artifacts)


@dataclass(frozen=True)
class Dimensions:
    """A published model, as far as its size goes; ``tokenizer_bytes`` is its tokenizer.json."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    context: int
    tokenizer_bytes: int
    has_qkv_bias: bool = False

    def weights(self) -> Iterator[tuple[str, int, int]]:
        """Yield each weight's name as the fused graph has it, and its rows and columns."""
        queries, keys = self.heads * 64, self.kv_heads * 64
        yield "model.embed_tokens.weight", self.vocab, self.hidden
        for layer in range(self.layers):
            yield f"model.layers.{layer}.self_attn.qkv_proj.weight", queries + 2 * keys, self.hidden
            yield f"model.layers.{layer}.self_attn.o_proj.weight", self.hidden, queries
            yield f"model.layers.{layer}.mlp.gate_up_proj.weight", 2 * self.inner, self.hidden
            yield f"model.layers.{layer}.mlp.down_proj.weight", self.hidden, self.inner

    @property
    def num_small_parameters(self) -> int:
        biases = self.layers * (self.heads + 2 * self.kv_heads) * 64 if self.has_qkv_bias else 0
        return (2 * self.layers + 1) * self.hidden + biases


SMOLLM2_135M = Dimensions(576, 1536, 30, 9, 3, 49152, 8192, 2_104_556)
QWEN2_5_500M = Dimensions(896, 4864, 24, 14, 2, 151936, 32768, 7_031_645, has_qkv_bias=True)
GRAPH_BYTES = 400_000


def pages(num_bytes: float) -> int:
    """Return what a tensor takes in the file, where small ones are not."""
    if num_bytes < MAX_INLINE_BYTES:
        return 0
    return -(-int(num_bytes) // PAGE_BYTES) * PAGE_BYTES


def stored_bytes(scheme: Blocks, rows: int, columns: int) -> int:
    num_blocks = columns // scheme.block_size
    parts = [rows * columns * scheme.bits / 8, rows * num_blocks * 2]
    if scheme.zero_point == "fitted":
        parts.append(rows * -(-num_blocks * scheme.bits // 8))
    return sum(map(pages, parts))


def weight_bytes(recipe: GraphRecipe, weights: Iterator[tuple[str, int, int]]) -> int:
    total = 0
    for name, rows, columns in weights:
        scheme = recipe.scheme_for(name)
        assert isinstance(scheme, Blocks)
        total += stored_bytes(scheme, rows, columns)
    return total


@pytest.mark.parametrize("dimensions", [SMOLLM2_135M, QWEN2_5_500M], ids=["SmolLM2-135M", "Qwen2.5-0.5B"])
def test_int4_takes_at_most_65_hundredths_of_a_byte_for_each_parameter(dimensions: Dimensions) -> None:
    num_parameters = sum(n * k for _, n, k in dimensions.weights()) + dimensions.num_small_parameters
    rotary = 2 * dimensions.context * 32 * np.dtype(np.float16).itemsize
    rest = rotary + 4 * dimensions.num_small_parameters + PAGE_BYTES * 5 * dimensions.layers
    total = weight_bytes(RECIPES["int4"].graph, dimensions.weights()) + rest + dimensions.tokenizer_bytes + GRAPH_BYTES
    assert total <= 0.65 * num_parameters


@pytest.mark.model
def test_weights_take_the_space_that_is_reckoned(demo: Lowered) -> None:
    recipe: Recipe = RECIPES["int4"]
    expected = 0
    for value in ir.load(demo.directories["fp32"] / GRAPH).graph.initializers.values():
        tensor = value.const_value
        name = (value.name or "").removesuffix(".transposed")
        scheme = recipe.graph.scheme_for(name)
        if tensor is not None and len(tensor.shape) == 2 and isinstance(scheme, Blocks):
            sizes = [int(size) for size in tensor.shape.numpy()]
            rows, columns = sizes if name == value.name else reversed(sizes)
            expected += stored_bytes(scheme, rows, columns)
    shapes = demo.source.shapes
    rotary = 2 * pages(shapes.max_context_tokens * shapes.head_size)
    assert pages((demo.directories["int4"] / WEIGHTS).stat().st_size) == expected + rotary


@pytest.mark.model
def test_a_recipe_whose_blocks_need_wide_rows(one_torch_thread: None, tiny_llama: Path, tmp_path: Path) -> None:
    def export(model: Path, recipe: str) -> Manifest:
        quiet = Progress(io.StringIO())
        return export_model(str(model), tmp_path / recipe, precision="hybrid", recipe_name=recipe, progress=quiet)

    with pytest.raises(
        UnsupportedModel, match="hidden_size 64 is not a multiple of the quantization block of 128; a r"
    ):
        export(tiny_llama, "hybrid-blocks128")
    wide = write_model(tmp_path / "wide", hidden_size=128, intermediate_size=256)
    of_128, of_32 = export(wide, "hybrid-blocks128"), export(wide, "hybrid")
    assert "block 128" in str(of_128.recipe["*"])
    divergences = [float(found.verification["mean_kl"]) for found in (of_32, of_128)]
    assert divergences[0] < divergences[1] < 4 * divergences[0]
