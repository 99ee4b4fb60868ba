"""Every family computes what transformers computes, however its graph is run, far beyond its sliding windows."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from pilotlight.artifact import GRAPH, open_artifact
from pilotlight_export.config import check_config
from pilotlight_export.errors import UnsupportedModel
from pilotlight_export.export import export_model
from pilotlight_export.families import FAMILIES
from pilotlight_export.fuse import fuse
from pilotlight_export.lower import lower
from pilotlight_export.progress import Progress
from pilotlight_export.recipes import EXACT, choose_recipe
from pilotlight_export.source import open_source
from pilotlight_export.trace import trace
from pilotlight_export.verify.graph_runner import GraphRunner, Graphs, Logits
from pilotlight_export.verify.reference import Reference
from tiny_models import FusedModel, write_model

pytestmark = pytest.mark.model
TOLERANCE = 1e-4
WIDE_HEADS = {"head_dim": 32}
UNTIED = {"tie_word_embeddings": False}
LONG_ROPE = {
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0 + 0.1 * pair for pair in range(8)],
        "long_factor": [2.0 + pair for pair in range(8)],
    },
    "original_max_position_embeddings": 96,
    "pad_token_id": 2,
    "auto_map": {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
        "AutoTokenizer": "someone/tokenizer",
    },
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
GEMMA = {"query_pre_attn_scalar": 24, "pad_token_id": 2, **WIDE_HEADS}
GRANITE = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.7,
    "logits_scaling": 2.0,
    "attention_multiplier": 0.2,
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("MistralForCausalLM", {"sliding_window": 16, **WIDE_HEADS}),
    "mistral without a window": ("MistralForCausalLM", {"sliding_window": None, **UNTIED}),
    "qwen2": ("Qwen2ForCausalLM", {"rope_theta": 1e6, "use_sliding_window": False, "sliding_window": 16, **UNTIED}),
    "qwen2 with windows above": (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    "qwen2 with yarn": ("Qwen2ForCausalLM", {"rope_scaling": YARN}),
    "qwen3": ("Qwen3ForCausalLM", WIDE_HEADS),
    "qwen3 untied": ("Qwen3ForCausalLM", {"attention_bias": True, **UNTIED, **WIDE_HEADS}),
    "phi3 with longrope": ("Phi3ForCausalLM", LONG_ROPE),
    "phi3 with a window": ("Phi3ForCausalLM", {"sliding_window": 24, "pad_token_id": 2, **UNTIED, **WIDE_HEADS}),
    "phi3 turned in part": ("Phi3ForCausalLM", {"partial_rotary_factor": 0.5, "pad_token_id": 2, **WIDE_HEADS}),
    "gemma": ("GemmaForCausalLM", WIDE_HEADS),
    "gemma2": (
        "Gemma2ForCausalLM",
        {"sliding_window": 16, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0, **GEMMA},
    ),
    "gemma2 untied": ("Gemma2ForCausalLM", {"sliding_window": 3, "num_hidden_layers": 3, **GEMMA, **UNTIED}),
    "gemma3": (
        "Gemma3ForCausalLM",
        {"sliding_window": 16, "sliding_window_pattern": 3, "num_hidden_layers": 4, "rope_theta": 1e6, **GEMMA},
    ),
    "gemma3 with a stretched rope": (
        "Gemma3ForCausalLM",
        {
            "sliding_window": 7,
            "sliding_window_pattern": 2,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            **GEMMA,
            **UNTIED,
        },
    ),
    "smollm3": (
        "SmolLM3ForCausalLM",
        {
            "no_rope_layer_interval": 2,
            "use_sliding_window": True,
            "sliding_window": 16,
            "pad_token_id": 2,
            **WIDE_HEADS,
        },
    ),
    "granite": ("GraniteForCausalLM", {**GRANITE, **WIDE_HEADS}),
    "olmo2": ("Olmo2ForCausalLM", {"pad_token_id": 2, **WIDE_HEADS}),
    "olmo2 untied": ("Olmo2ForCausalLM", {"num_key_value_heads": 4, "pad_token_id": 2, **UNTIED}),
}


def random_tokens(num_tokens: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(5).integers(3, 320, num_tokens)]


def difference(expected: Logits, found: Logits) -> float:
    assert expected.shape == found.shape
    return float(np.abs(expected - found).max())


Models = Callable[[str], FusedModel]


@pytest.fixture(scope="module")
def models(one_torch_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Make each model once; its fused graph is not to be changed."""

    @cache
    def make(name: str) -> FusedModel:
        directory = tmp_path_factory.mktemp("family")
        architecture, settings = MODELS[name]
        source = open_source(str(write_model(directory / "model", architecture, **settings)), None)
        fused = trace(source.directory, directory / "traced")
        fuse(fused, source.shapes)
        lower(fused, EXACT, directory)
        return FusedModel(source, fused, directory / GRAPH, Reference(source.directory))

    return make


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest, models: Models) -> FusedModel:
    """A model of each family in turn."""
    return models(request.param)


def runner_of(model: FusedModel, graph_dir: Path, num_rows: int = 1) -> GraphRunner:
    shapes = model.source.shapes
    return GraphRunner(Graphs(graph_dir, shapes), num_rows, shapes.max_context_tokens)


def logits_of_whole_context(model: FusedModel) -> tuple[list[int], Logits]:
    tokens = random_tokens(model.source.shapes.max_context_tokens)
    return tokens, model.reference.logits(tokens, range(len(tokens)))


def test_whole_context_in_one_pass(model: FusedModel) -> None:
    tokens, expected = logits_of_whole_context(model)
    found = runner_of(model, model.graph_path.parent).prefill([tokens], [range(len(tokens))])
    assert difference(expected, found) <= TOLERANCE


def test_whole_context_step_by_step(model: FusedModel) -> None:
    tokens, expected = logits_of_whole_context(model)
    runner = runner_of(model, model.graph_path.parent)
    found = [runner.prefill([tokens[:1]], [[0]])] + [runner.decode(np.array([token])) for token in tokens[1:]]
    assert difference(expected, np.concatenate(found)) <= TOLERANCE


@pytest.mark.parametrize("chunk_tokens", [2, 13, 40])
def test_whole_context_in_chunks(model: FusedModel, chunk_tokens: int) -> None:
    tokens, expected = logits_of_whole_context(model)
    runner = runner_of(model, model.graph_path.parent)
    found = [runner.prefill([tokens[:chunk_tokens]], [range(chunk_tokens)])]
    for start in range(chunk_tokens, len(tokens), chunk_tokens):
        found.append(runner.extend(tokens[start : start + chunk_tokens]))
    assert difference(expected, np.concatenate(found)) <= TOLERANCE


def test_ragged_batch(model: FusedModel) -> None:
    tokens, expected = logits_of_whole_context(model)
    lengths, num_steps = (1, 14, 50), 30
    runner = runner_of(model, model.graph_path.parent, len(lengths))
    found = [runner.prefill([tokens[:length] for length in lengths], [[length - 1] for length in lengths])]
    for step in range(num_steps):
        found.append(runner.decode(np.array([tokens[length + step] for length in lengths])))
    for row, length in enumerate(lengths):
        assert difference(expected[length - 1 : length + num_steps], np.stack(found)[:, row]) <= TOLERANCE


def test_one_attention_node_a_layer_and_nothing_unfused(model: FusedModel) -> None:
    counts = Counter(node.op_type for node in model.fused.graph)
    num_layers = model.source.shapes.num_layers
    assert counts["GroupQueryAttention"] == num_layers
    assert counts["Linear"] == 4 * num_layers + 1
    assert counts["QuickGelu"] + counts["FastGelu"] == num_layers
    assert not set(counts) & {"Softmax", "Cos", "Sigmoid", "Slice", "Concat", "Transpose", "Shape", "Pow", "Cast"}
    assert len(model.fused.graph) <= 20 * num_layers + 15


def test_int4_keeps_the_shape_of_the_answer(model: FusedModel, tmp_path: Path) -> None:
    lower(model.fused, choose_recipe("int4", None), tmp_path)
    tokens, expected = logits_of_whole_context(model)
    found = runner_of(model, tmp_path).prefill([tokens], [range(len(tokens))])
    assert np.corrcoef(expected.ravel(), found.ravel())[0, 1] > 0.8


@pytest.mark.parametrize("window_tokens", [15, 17])
def test_a_window_of_one_token_more_or_less_would_show(models: Models, tmp_path: Path, window_tokens: int) -> None:
    model = models("mistral")
    wrong = model.fused.clone()
    for node in wrong.graph:
        if node.op_type == "GroupQueryAttention":
            node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", window_tokens)
    lower(wrong, EXACT, tmp_path)
    tokens, expected = logits_of_whole_context(model)
    found = runner_of(model, tmp_path).prefill([tokens], [range(len(tokens))])
    assert difference(expected[:15], found[:15]) <= TOLERANCE
    assert difference(expected, found) > 100 * TOLERANCE


def attention_attributes(model: FusedModel, name: str) -> list[float | None]:
    nodes = [node for node in model.fused.graph if node.op_type == "GroupQueryAttention"]
    found = [node.attributes.get(name) for node in nodes]
    return [attribute.value if attribute is not None else None for attribute in found]


def test_soft_caps_windows_and_the_scale_of_gemma2_are_the_kernels(models: Models) -> None:
    model = models("gemma2")
    assert attention_attributes(model, "softcap") == [5.0, 5.0]
    assert attention_attributes(model, "local_window_size") == [16, None]
    assert attention_attributes(model, "scale") == pytest.approx([24**-0.5] * 2)
    tokens, expected = logits_of_whole_context(model)
    uncapped = Reference(model.graph_path.parent / "model")  # as transformers runs it unless told otherwise
    assert difference(expected, uncapped.logits(tokens, range(len(tokens)))) > 100 * TOLERANCE


def test_local_and_global_layers_of_gemma3_have_their_own_angles(models: Models) -> None:
    model = models("gemma3")
    nodes = [node for node in model.fused.graph if node.op_type == "GroupQueryAttention"]
    cosines = [value.name for node in nodes if (value := node.inputs[7]) is not None]
    assert cosines == ["rotary_emb_local.cos", "rotary_emb_local.cos", "rotary_emb.cos", "rotary_emb_local.cos"]
    assert attention_attributes(model, "local_window_size") == [16, 16, None, 16]


def test_layers_of_smollm3_without_a_rotary_embedding_are_not_turned(models: Models) -> None:
    assert attention_attributes(models("smollm3"), "do_rotary") == [1, 0]


def test_longrope_ends_where_its_other_factors_would_begin(models: Models) -> None:
    model = models("phi3 with longrope")
    assert model.source.shapes.max_context_tokens == 96
    tokens = random_tokens(97)
    one_more = model.reference.logits(tokens, range(96))
    assert difference(model.reference.logits(tokens[:96], range(96)), one_more) > 100 * TOLERANCE


@pytest.mark.parametrize(("name", "verified_tokens"), [("mistral", 80), ("phi3 with longrope", 64), ("gemma2", 80)])
def test_a_whole_export_is_verified_beyond_its_windows(
    one_torch_thread: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, verified_tokens: int
) -> None:
    monkeypatch.setattr("pilotlight_export.verify.parity.MAX_CONTEXT_TOKENS", 16)
    architecture, settings = MODELS[name]
    directory = write_model(tmp_path / "model", architecture, **settings)
    export_model(str(directory), tmp_path / "out", precision="fp32", progress=Progress(io.StringIO()))
    manifest = open_artifact(tmp_path / "out").manifest
    assert manifest.family == FAMILIES[architecture].name
    assert manifest.verification["full_context_tokens"] == verified_tokens
    assert manifest.shapes.head_size == json.loads((directory / "config.json").read_text()).get("head_dim", 16)


def dimensions(architecture: str, **settings: Any) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_size": 64,
        "vocab_size": 320,
        "max_position_embeddings": 8192,
        **settings,
    }


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (dimensions("Qwen3MoeForCausalLM"), "Qwen3MoeForCausalLM is not supported; supported: Gemma2ForCausalLM, "),
        (dimensions("Phi3ForCausalLM", auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"}), "brings its own code"),
        (dimensions("Gemma3ForConditionalGeneration"), "Gemma3ForConditionalGeneration is not supported"),
        (
            dimensions("Qwen2ForCausalLM", layer_types=["full_attention", "linear_attention"]),
            "layers of type 'linear_attention' are not supported; supported: full_attention, sliding_attention",
        ),
        (
            dimensions("Gemma3ForCausalLM", use_bidirectional_attention=True),
            "attention to later tokens .* is not supported",
        ),
        (
            dimensions("Phi3ForCausalLM", rope_scaling={"type": "linear", "factor": 2.0}),
            "'linear' is not supported in phi3; supported: default, longrope, su",
        ),
        (dimensions("Qwen2ForCausalLM", rope_scaling={"rope_type": "dynamic"}), "'dynamic' is not supported in qwen2"),
        (
            dimensions("Qwen2ForCausalLM", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e6}),
            "'dynamic' is not supported in qwen2",
        ),
        (
            dimensions("Gemma3ForCausalLM", rope_parameters={"other_attention": {"rope_theta": 1e6}}),
            "rope_parameters for other_attention cannot be written as rope_scaling",
        ),
    ],
)
def test_what_is_refused(config: dict[str, Any], line: str) -> None:
    with pytest.raises(UnsupportedModel, match=line):
        check_config(config)


def written_by_transformers_5(config: dict[str, Any]) -> dict[str, Any]:
    """Rewrite a config of transformers 4 as transformers 5 saves it."""
    rest = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling")}
    parameters = {"rope_type": "default", **(config.get("rope_scaling") or {}), "rope_theta": config["rope_theta"]}
    parameters["rope_type"] = parameters.pop("type", parameters["rope_type"])
    if "rope_local_base_freq" not in rest:
        return {**rest, "rope_parameters": parameters}
    local = {"rope_type": "default", "rope_theta": rest.pop("rope_local_base_freq")}
    return {**rest, "rope_parameters": {"full_attention": parameters, "sliding_attention": local}}


@pytest.mark.parametrize("name", ["qwen2", "qwen2 with yarn", "phi3 with longrope", "gemma3 with a stretched rope"])
def test_rope_parameters_of_transformers_5_mean_the_same(one_torch_thread: None, tmp_path: Path, name: str) -> None:
    architecture, settings = MODELS[name]
    directory = write_model(tmp_path / "model", architecture, **{"rope_theta": 5e5, **settings})
    tokens = random_tokens(80)
    expected = Reference(directory).logits(tokens, range(80))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(written_by_transformers_5(config)))
    source = open_source(str(directory), None)
    assert source.directory != directory
    assert source.entry.model == "model"
    np.testing.assert_array_equal(Reference(source.directory).logits(tokens, range(80)), expected)
    assert difference(expected, Reference(directory).logits(tokens, range(80))) > 100 * TOLERANCE
