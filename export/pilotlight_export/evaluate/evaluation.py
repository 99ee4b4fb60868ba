"""``pilotlight evaluate``: several artifacts, one text, one table."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path

from pilotlight.artifact import Artifact, open_artifact
from pilotlight_export.errors import EvaluationError, TargetError
from pilotlight_export.evaluate.figures import Quality, Row, Speed
from pilotlight_export.evaluate.plot import plot
from pilotlight_export.evaluate.quality import measure_qualities
from pilotlight_export.evaluate.speed import measure_speeds
from pilotlight_export.progress import Progress
from pilotlight_export.verify.figures import rounded
from pilotlight_export.verify.text import read_text


def evaluate_artifacts(
    paths: Sequence[Path], text_path: Path | None = None, progress: Progress | None = None
) -> list[Row]:
    """Measure artifacts side by side, on the built-in text unless there is another one.

    Raises:
        ArtifactError: an artifact is incomplete or was altered.
        EvaluationError: an artifact is named twice, or cannot be run.
        TextError: the text cannot be read.
    """
    progress = progress or Progress(sys.stderr)
    text = read_text(text_path).content if text_path is not None else built_in_text()
    with progress.stage("Checksums") as stage:
        artifacts = [open_artifact(path) for path in paths]
        for artifact in artifacts:
            artifact.verify()
        stage.outcome = f"{len(artifacts)} artifacts"
    names = _short_names(paths)
    with progress.stage("Measure quality") as stage:
        qualities = measure_qualities(artifacts, text, stage.show_count)
    with progress.stage("Measure speed and memory") as stage:
        speeds = measure_speeds(paths, stage.show_count)
    return [_row(*each) for each in zip(names, artifacts, speeds, qualities, strict=True)]


def built_in_text() -> str:
    """Return the text on which artifacts are compared when the user chose none."""
    return (files("pilotlight_export.evaluate") / "sample.txt").read_text(encoding="utf-8")


def write_plot(rows: Sequence[Row], path: Path) -> None:
    """Draw an evaluation into an SVG file.

    Raises:
        TargetError: the file cannot be written.
    """
    try:
        path.write_text(plot(rows), encoding="utf-8")
    except OSError as error:
        raise TargetError(f"{path}: cannot be written ({error.strerror})") from error


def _short_names(paths: Sequence[Path]) -> list[str]:
    """Call artifacts by their directories' names, or by their paths where two have the same name."""
    resolved = [path.resolve() for path in paths]
    for path in resolved:
        if resolved.count(path) > 1:
            raise EvaluationError(f"{path}: is named twice")
    names = [path.name for path in resolved]
    return [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]


def _row(name: str, artifact: Artifact, speed: Speed, quality: Quality) -> Row:
    manifest = artifact.manifest
    return Row(
        name=name,
        model=manifest.source.model,
        precision=manifest.precision,
        size_mb=rounded(sum(entry.size_bytes for entry in manifest.files.values()) / 1e6),
        memory_mb=speed.memory_mb,
        prefill_tps=speed.prefill_tps,
        decode_tps=speed.decode_tps,
        **asdict(quality),
    )
