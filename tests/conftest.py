"""Fixtures shared by all tests: a tiny artifact without a model, and functions on the deterministic fake session."""

from __future__ import annotations

import pytest

from pilotlight.artifact import Artifact, open_artifact
from support import write_artifact


@pytest.fixture(scope="session")
def toy_artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """An artifact with a byte tokenizer, a chat template and no usable graph."""
    return open_artifact(write_artifact(tmp_path_factory.mktemp("toy") / "toy"))
