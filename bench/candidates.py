"""What is compared: every recipe of Pilotlight on the real engine, and Optimum's own dynamic int8 on its own graph."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from pilotlight.artifact import Artifact, Probe, open_artifact
from pilotlight.engine.pace import DEFAULT_MIN_BATCH_ROWS, DecodeGraph
from pilotlight.engine.session import OnnxSession
from pilotlight_export.export import MAX_MEASURED_TOKENS
from pilotlight_export.fuse import fuse
from pilotlight_export.kv_cache import Scales, measure_kv_scales, write_kv_scales
from pilotlight_export.lower import lower
from pilotlight_export.pack import copy_texts, seal
from pilotlight_export.quiet import quiet
from pilotlight_export.recipes import EXACT, Recipe
from pilotlight_export.source import Source
from pilotlight_export.trace import trace
from pilotlight_export.verify.graph_runner import Graphs
from pilotlight_export.verify.passages import sample_passages
from pilotlight_export.verify.prompts import Prompts

TokenIds = Sequence[int]
Logits = NDArray[np.float32]


class Candidate(Protocol):
    """A quantized model that reads texts into rows and extends them."""

    name: str
    num_bytes: int

    def start(self, row: int, tokens: TokenIds) -> Logits:
        """Read a text into a row; rows are started in order. Return the logits [1, V] of its last token."""

    def step(self, tokens: NDArray[np.int64]) -> Logits:
        """Read one token into each started row and return logits [B, V]."""


def build_artifacts(source: Source, recipes: Sequence[Recipe], directory: Path) -> dict[str, Artifact]:
    """Trace a model once and write it in every recipe, unverified."""
    traced = directory / "traced"
    traced.mkdir(parents=True)
    fused = trace(source.directory, traced)
    fuse(fused, source.shapes)
    exact = directory / "exact"
    exact.mkdir()
    lower(fused, EXACT, exact)
    kv_scales = _measure_cache(source, exact) if any(recipe.has_int8_cache for recipe in recipes) else None
    return {recipe.name: _write(source, fused, recipe, kv_scales, directory / recipe.name) for recipe in recipes}


def _measure_cache(source: Source, exact: Path) -> Scales:
    graphs, prompts = Graphs(exact, source.shapes), Prompts(source.directory)
    answers = sample_passages(graphs, prompts, source.special_tokens.eos_ids)
    prose = prompts.prose(min(MAX_MEASURED_TOKENS, source.shapes.max_context_tokens))
    return measure_kv_scales(graphs, [*(answer.tokens for answer in answers), prose])


def _write(source: Source, fused: ir.Model, recipe: Recipe, kv_scales: Scales | None, directory: Path) -> Artifact:
    directory.mkdir()
    lower(fused, recipe, directory, kv_scales if recipe.has_int8_cache else None)
    if recipe.has_int8_cache and kv_scales is not None:
        write_kv_scales(kv_scales, directory)
    copy_texts(source, directory)
    seal(source, recipe, {}, Probe([], []), directory)
    return open_artifact(directory)


class PilotlightCandidate:
    """An artifact on the runtime's session."""

    def __init__(self, artifact: Artifact, num_rows: int, num_threads: int) -> None:
        self.name = artifact.manifest.recipe["name"]
        self.num_bytes = sum(entry.size_bytes for entry in artifact.manifest.files.values())
        context = min(artifact.manifest.shapes.max_context_tokens, 1024)
        self._session = OnnxSession(artifact, num_rows, context, num_threads)
        self._lengths = np.zeros(0, np.int64)

    def start(self, row: int, tokens: TokenIds) -> Logits:
        self._lengths = np.append(self._lengths[:row], len(tokens))
        return self._session.prefill(row, np.array(tokens, np.int64), 0)

    def step(self, tokens: NDArray[np.int64]) -> Logits:
        graph = DecodeGraph.BATCH if len(tokens) >= DEFAULT_MIN_BATCH_ROWS else DecodeGraph.MAIN
        logits = self._session.decode(tokens, self._lengths, graph)
        self._lengths += 1
        return logits


class OptimumCandidate:
    """Optimum's export, quantized by its ``ORTQuantizer`` to dynamic int8, with the cache as its graph hands it on."""

    name = "Optimum dynamic int8"

    def __init__(self, source: Source, directory: Path, num_threads: int) -> None:
        path = directory / "model_quantized.onnx"
        if not path.exists():
            quantize_with_optimum(source.directory, directory)
        self.num_bytes = path.stat().st_size + (source.directory / "tokenizer.json").stat().st_size
        options = ort.SessionOptions()
        options.intra_op_num_threads = num_threads
        self._session: Any = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._shapes = source.shapes
        self._caches: list[list[NDArray[np.float32]]] = []
        self._batch: tuple[list[NDArray[np.float32]], NDArray[np.int64]] | None = None

    def start(self, row: int, tokens: TokenIds) -> Logits:
        shapes = self._shapes
        empty = np.zeros((1, shapes.num_kv_heads, 0, shapes.head_size), np.float32)
        logits, cache = self._run(
            np.array([tokens]), np.ones((1, len(tokens)), np.int64), np.arange(len(tokens))[None], [empty] * self._width
        )
        self._caches, self._batch = [*self._caches[:row], cache], None
        return logits

    def step(self, tokens: NDArray[np.int64]) -> Logits:
        cache, mask = self._batch or self._pad()
        mask = np.concatenate([mask, np.ones((len(mask), 1), np.int64)], axis=1)
        logits, cache = self._run(tokens[:, None], mask, mask.sum(axis=1, keepdims=True) - 1, cache)
        self._batch = cache, mask
        return logits

    @property
    def _width(self) -> int:
        return 2 * self._shapes.num_layers

    def _pad(self) -> tuple[list[NDArray[np.float32]], NDArray[np.int64]]:
        """Join the rows' caches into one, shorter ones padded at the front."""
        lengths = [row[0].shape[2] for row in self._caches]
        longest = max(lengths)
        mask = np.array([[0] * (longest - n) + [1] * n for n in lengths], np.int64)
        axes = [((0, 0), (0, 0), (longest - n, 0), (0, 0)) for n in lengths]
        joined = [
            np.concatenate([np.pad(row[i], axes[index]) for index, row in enumerate(self._caches)])
            for i in range(self._width)
        ]
        return joined, mask

    def _run(
        self,
        tokens: NDArray[np.int64],
        mask: NDArray[np.int64],
        positions: NDArray[np.int64],
        cache: list[NDArray[np.float32]],
    ) -> tuple[Logits, list[NDArray[np.float32]]]:
        names = [f"past_key_values.{i}.{kind}" for i in range(self._shapes.num_layers) for kind in ("key", "value")]
        feeds = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
        logits, *present = self._session.run(None, feeds | dict(zip(names, cache, strict=True)))
        return logits[:, -1], present


def quantize_with_optimum(model_dir: Path, directory: Path) -> None:
    """Export a model with Optimum and quantize it as its documentation does for CPUs with VNNI."""
    with quiet():
        from optimum.exporters.onnx import main_export
        from optimum.onnxruntime import ORTQuantizer
        from optimum.onnxruntime.configuration import AutoQuantizationConfig

        main_export(str(model_dir), directory, task="text-generation-with-past", do_validation=False, device="cpu")
        quantizer = ORTQuantizer.from_pretrained(directory, file_name="model.onnx")
        quantizer.quantize(AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True), directory)
