"""From a model to an artifact: source → optimum → fuse → verify → quantize → verify → pack."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import onnx_ir as ir

from pilotlight.artifact import GRAPH, WEIGHTS, Manifest
from pilotlight_export.config import check_block_size
from pilotlight_export.fuse import fuse
from pilotlight_export.lower import lower
from pilotlight_export.pack import check_target, copy_texts, move_into_place, seal, workplace
from pilotlight_export.progress import Progress
from pilotlight_export.recipes import EXACT, Recipe, choose_recipe
from pilotlight_export.source import Source, open_source
from pilotlight_export.trace import trace
from pilotlight_export.verify.fidelity import measure_fidelity
from pilotlight_export.verify.parity import check_parity, measure_parity
from pilotlight_export.verify.passages import Passage, sample_passages
from pilotlight_export.verify.prompts import Prompts
from pilotlight_export.verify.reference import Reference

ARTIFACT = "artifact"
Figures = dict[str, str | int | float | bool]


def export_model(
    model: str,
    target: Path,
    *,
    precision: str = "int4",
    recipe_name: str | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Export a model into an artifact at ``target``, which appears complete and verified or not at all.

    Raises:
        SourceError: the model is missing, incomplete or damaged.
        UnsupportedModel: the model cannot be exported.
        FusionError: the exported graph is not shaped as its family says.
        VerificationError: the artifact does not compute what the model computes.
        TargetError: the target is something else already, cannot be written, or its disk is full.
    """
    progress = progress or Progress(sys.stderr)
    recipe = choose_recipe(precision, recipe_name)
    check_target(target)
    with progress.stage("Source") as stage:
        source = open_source(model, revision)
        for block_size in recipe.block_sizes:
            check_block_size(source.config, block_size)
        stage.outcome = f"{source.family.name}, {source.num_parameters / 1e6:,.1f} million parameters"
    with workplace(target) as directory:
        manifest = _build(source, recipe, directory, progress)
        move_into_place(directory / ARTIFACT, target, directory / "replaced")
    return manifest


def _build(source: Source, recipe: Recipe, directory: Path, progress: Progress) -> Manifest:
    """Make the whole artifact in ``directory / ARTIFACT``."""
    prompts = Prompts(source.directory)
    fused = _fuse(source, directory, progress)
    artifact = _make(directory / ARTIFACT)
    exact = _make(directory / "fp32") if recipe != EXACT else artifact
    with progress.stage("Write fp32") as stage:
        lower(fused, EXACT, exact, stage.show_count)
    passages, verification = _verify_parity(source, exact / GRAPH, prompts, progress)
    if recipe != EXACT:
        _quantize(fused, recipe, artifact, progress)
        verification |= _verify_fidelity(source, exact / GRAPH, artifact / GRAPH, passages, progress)
    with progress.stage("Pack"):
        copy_texts(source, artifact)
        return seal(source, recipe, verification, artifact)


def _fuse(source: Source, directory: Path, progress: Progress) -> ir.Model:
    with progress.stage("Export with Optimum") as stage:
        model = trace(source.directory, _make(directory / "traced"))
        num_traced = model.graph.num_nodes()
        stage.outcome = f"{num_traced:,} nodes"
    with progress.stage("Fuse") as stage:
        fuse(model, source.shapes)
        stage.outcome = f"{model.graph.num_nodes():,} nodes"
    return model


def _verify_parity(source: Source, exact: Path, prompts: Prompts, progress: Progress) -> tuple[list[Passage], Figures]:
    with progress.stage("Verify fp32 against PyTorch") as stage:
        passages = sample_passages(exact, source.shapes, prompts, source.special_tokens.eos_ids)
        parity = measure_parity(exact, Reference(source.directory), source.shapes, passages, prompts)
        check_parity(parity)
        stage.outcome = f"logits within {parity.largest_difference:.2g}"
    return passages, asdict(parity)


def _quantize(fused: ir.Model, recipe: Recipe, artifact: Path, progress: Progress) -> None:
    with progress.stage(f"Quantize to {recipe.precision}") as stage:
        lower(fused, recipe, artifact, stage.show_count)
        stage.outcome = f"{(artifact / WEIGHTS).stat().st_size / 1e6:,.1f} MB"


def _verify_fidelity(
    source: Source, exact: Path, quantized: Path, passages: list[Passage], progress: Progress
) -> Figures:
    with progress.stage("Verify against fp32") as stage:
        fidelity = measure_fidelity(exact, quantized, source.shapes, passages)
        stage.outcome = f"top-1 agreement {fidelity.top1_agreement:.3f}, mean KL {fidelity.mean_kl:.4f}"
    return asdict(fidelity)


def _make(directory: Path) -> Path:
    directory.mkdir()
    return directory
