"""Fixtures of the export's tests: tiny models, their fused graphs, and whole artifacts of one of them."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from pilotlight.artifact import GRAPH, Artifact, open_artifact
from pilotlight_export.export import export_model
from pilotlight_export.fuse import fuse
from pilotlight_export.lower import lower
from pilotlight_export.progress import Progress
from pilotlight_export.recipes import EXACT, PRECISIONS
from pilotlight_export.source import open_source
from pilotlight_export.trace import trace
from pilotlight_export.verify.reference import Reference
from tiny_models import VARIANTS, FusedModel, write_model


@pytest.fixture(scope="session")
def one_torch_thread() -> None:
    """Keep PyTorch to one thread: tiny products gain nothing from more, and a busy machine makes them wait."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", params=list(VARIANTS))
def variant(
    request: pytest.FixtureRequest, one_torch_thread: None, tmp_path_factory: pytest.TempPathFactory
) -> FusedModel:
    """Each kind of Llama in turn."""
    directory = tmp_path_factory.mktemp("variant")
    source = open_source(str(write_model(directory / "model", **VARIANTS[request.param])), None)
    fused = trace(source.directory, directory / "traced")
    fuse(fused, source.shapes)
    lower(fused, EXACT, directory)
    return FusedModel(source, fused, directory / GRAPH, Reference(source.directory))


@pytest.fixture(scope="session")
def tiny_llama(one_torch_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete model directory, not to be changed."""
    return write_model(tmp_path_factory.mktemp("source") / "tiny-llama")


@pytest.fixture(scope="session")
def artifacts(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """The tiny model exported at every precision."""
    directory = tmp_path_factory.mktemp("artifacts")
    for precision in PRECISIONS:
        export_model(str(tiny_llama), directory / precision, precision=precision, progress=Progress(io.StringIO()))
    return {precision: open_artifact(directory / precision) for precision in PRECISIONS}
