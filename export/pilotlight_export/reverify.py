"""``pilotlight verify``: an artifact against its source once more, in a place of its own that is removed afterwards."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pilotlight.artifact import Artifact, open_artifact
from pilotlight.scratch import scratch
from pilotlight_export.errors import TargetError, VerificationError
from pilotlight_export.export import build_exact, find_source
from pilotlight_export.progress import Progress
from pilotlight_export.recipes import EXACT
from pilotlight_export.source import Source
from pilotlight_export.verify.figures import Figures
from pilotlight_export.verify.prompts import Prompts
from pilotlight_export.verify.text import read_text
from pilotlight_export.verify.verification import verify_consistency, verify_exact, verify_fidelity


@dataclass(frozen=True)
class Confirmation:
    """An artifact that passed, and what was measured."""

    artifact: str
    precision: str
    source: str
    revision: str | None
    figures: Figures


def verify_artifact(
    path: Path,
    model: str,
    *,
    revision: str | None = None,
    allow_pickle: bool = False,
    text_path: Path | None = None,
    max_kl: float | None = None,
    progress: Progress | None = None,
) -> Confirmation:
    """Check an artifact's checksums, make the fp32 graph of its source again, and compare both with PyTorch.

    Raises:
        ArtifactError: the artifact is incomplete or was altered.
        SourceError: the source is missing, incomplete or damaged.
        VerificationError: the source is another model, or the artifact does not compute what it computes.
        TextError: the text cannot be read.
        TargetError: the temporary directory's disk is full.
    """
    progress = progress or Progress(sys.stderr)
    text = read_text(text_path) if text_path is not None else None
    artifact = open_artifact(path)
    with progress.stage("Checksums") as stage:
        artifact.verify()
        stage.outcome = f"all {len(artifact.manifest.files)} files"
    pinned = revision or _pinned_revision(artifact, model)
    try:
        with scratch("pilotlight-verify-") as directory:
            source = find_source(model, pinned, directory, allow_pickle, progress)
            _check_same_model(artifact, source)
            prompts = Prompts(source.directory)
            is_exact = artifact.manifest.precision == EXACT.precision
            exact = artifact.path if is_exact else directory / "fp32"
            if not is_exact:
                build_exact(source, directory, exact, progress)
            verified = verify_exact(source, exact, prompts, text, progress)
            figures = dict(verified.figures)
            if is_exact:
                figures |= verify_consistency(source, exact, verified.passages, progress)
            else:
                figures |= verify_fidelity(source, exact, path, verified.passages, max_kl, progress)
    except OSError as error:
        raise TargetError(f"{error.filename or tempfile.gettempdir()}: {error.strerror or error}") from error
    return Confirmation(
        artifact=artifact.digest,
        precision=artifact.manifest.precision,
        source=source.entry.model,
        revision=source.entry.revision,
        figures=figures,
    )


def _pinned_revision(artifact: Artifact, model: str) -> str | None:
    """Return the commit from which the artifact was made, if the source is the same model on the hub."""
    entry = artifact.manifest.source
    return entry.revision if entry.model == model and not Path(model).is_dir() else None


def _check_same_model(artifact: Artifact, source: Source) -> None:
    manifest = artifact.manifest
    for name, expected, found in (
        ("family", manifest.family, source.family.name),
        ("shape", manifest.shapes, source.shapes),
        ("number of parameters", manifest.num_parameters, source.num_parameters),
    ):
        if found != expected:
            raise VerificationError(f"{source.entry.model} is not the artifact's source: its {name} is {found}")
