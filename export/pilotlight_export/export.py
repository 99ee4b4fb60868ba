"""From a model to an artifact: source → optimum → fuse → verify → quantize → verify → pack."""

from __future__ import annotations

import sys
from pathlib import Path

import onnx_ir as ir

from pilotlight.artifact import Manifest
from pilotlight_export.config import check_block_size
from pilotlight_export.fuse import fuse
from pilotlight_export.kv_cache import Scales, measure_kv_scales, write_kv_scales
from pilotlight_export.lower import lower
from pilotlight_export.pack import copy_texts, seal
from pilotlight_export.probe import NUM_PROMPT_TOKENS, record_probe
from pilotlight_export.progress import Progress
from pilotlight_export.recipes import EXACT, Recipe, choose_recipe
from pilotlight_export.source import Source, open_source
from pilotlight_export.trace import trace
from pilotlight_export.verify.figures import Figures
from pilotlight_export.verify.graph_runner import Graphs
from pilotlight_export.verify.prompts import Prompts
from pilotlight_export.verify.text import Text, read_text
from pilotlight_export.verify.verification import Verified, verify_consistency, verify_exact, verify_fidelity
from pilotlight_export.workplace import ARTIFACT, check_space, check_target, move_into_place, workplace

FLOAT32_BYTES = 4
MAX_MEASURED_TOKENS = 1024
"""So much running text, beside the model's answers, says how large the values in a KV cache get."""


def export_model(
    model: str,
    target: Path,
    *,
    precision: str = "int4",
    recipe_name: str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    text_path: Path | None = None,
    max_kl: float | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Export a model into an artifact at ``target``, which appears complete and verified or not at all.

    Fidelity is measured on the text of ``text_path``, or on answers that the model gives to built-in questions. A mean
    divergence above ``max_kl`` nats fails the export.

    Raises:
        SourceError: the model is missing, incomplete or damaged.
        UnsupportedModel: the model cannot be exported.
        UnknownRecipe: the precision has no such recipe.
        FusionError: the exported graph is not shaped as its family says.
        VerificationError: the artifact does not compute what the model computes.
        TextError: the text cannot be read.
        TargetError: the target is something else already, cannot be written, or its disk is full.
    """
    progress = progress or Progress(sys.stderr)
    recipe = choose_recipe(precision, recipe_name)
    text = read_text(text_path) if text_path is not None else None
    check_target(target)
    with workplace(target) as directory:
        source = find_source(model, revision, directory, allow_pickle, progress)
        for block_size in recipe.block_sizes:
            check_block_size(source.config, block_size)
        manifest = _build(source, recipe, text, max_kl, directory, progress)
        move_into_place(directory, target)
    return manifest


def find_source(model: str, revision: str | None, directory: Path, allow_pickle: bool, progress: Progress) -> Source:
    """Open the model and check that there is room in ``directory`` to work on it.

    Raises:
        SourceError: the model is missing, incomplete or damaged.
        UnsupportedModel: the model cannot be exported.
        TargetError: the disk is too full.
    """
    with progress.stage("Source") as stage:
        source = open_source(model, revision, unpickle_into=directory if allow_pickle else None)
        check_space(directory, FLOAT32_BYTES * source.num_parameters)
        stage.outcome = f"{source.family.name}, {source.num_parameters / 1e6:,.1f} million parameters"
    return source


def build_exact(source: Source, directory: Path, exact: Path, progress: Progress) -> ir.Model:
    """Write the fp32 graph into ``exact`` and return the fused graph from which all precisions are made.

    Raises:
        ExportError: Optimum failed, or the exported graph is not shaped as its family says.
    """
    with progress.stage("Export with Optimum") as stage:
        fused = trace(source.directory, _make(directory / "traced"))
        stage.outcome = f"{fused.graph.num_nodes():,} nodes"
    with progress.stage("Fuse") as stage:
        fuse(fused, source.shapes)
        stage.outcome = f"{fused.graph.num_nodes():,} nodes"
    with progress.stage("Write fp32") as stage:
        lower(fused, EXACT, _make(exact), on_weight=stage.show_count)
    return fused


def _build(
    source: Source, recipe: Recipe, text: Text | None, max_kl: float | None, directory: Path, progress: Progress
) -> Manifest:
    """Make the whole artifact in ``directory / ARTIFACT``."""
    prompts = Prompts(source.directory)
    artifact = directory / ARTIFACT
    exact = artifact if recipe == EXACT else directory / "fp32"
    fused = build_exact(source, directory, exact, progress)
    verified = verify_exact(source, exact, prompts, text, progress)
    figures: Figures = dict(verified.figures)
    if recipe == EXACT:
        figures |= verify_consistency(source, artifact, verified.passages, progress)
    else:
        kv_scales = _measure_cache(source, exact, verified, prompts, progress) if recipe.has_int8_cache else None
        _quantize(fused, recipe, kv_scales, _make(artifact), progress)
        figures |= verify_fidelity(source, exact, artifact, verified.passages, max_kl, progress)
    with progress.stage("Pack"):
        copy_texts(source, artifact)
        probe = record_probe(artifact, source.shapes, source.special_tokens, prompts.prose(NUM_PROMPT_TOKENS))
        return seal(source, recipe, figures, probe, artifact)


def _measure_cache(source: Source, exact: Path, verified: Verified, prompts: Prompts, progress: Progress) -> Scales:
    """Return the scales of the KV cache, from the model's own answers and from running text."""
    with progress.stage("Measure the KV cache") as stage:
        texts = [passage.tokens for passage in verified.passages]
        texts.append(prompts.prose(min(MAX_MEASURED_TOKENS, source.shapes.max_context_tokens)))
        stage.outcome = f"{sum(map(len, texts)):,} tokens"
        return measure_kv_scales(Graphs(exact, source.shapes), texts)


def _quantize(fused: ir.Model, recipe: Recipe, kv_scales: Scales | None, artifact: Path, progress: Progress) -> None:
    with progress.stage(f"Quantize to {recipe.precision}") as stage:
        lower(fused, recipe, artifact, kv_scales, stage.show_count)
        if kv_scales is not None:
            write_kv_scales(kv_scales, artifact)
        stage.outcome = f"{sum(path.stat().st_size for path in artifact.iterdir()) / 1e6:,.1f} MB"


def _make(directory: Path) -> Path:
    directory.mkdir()
    return directory
