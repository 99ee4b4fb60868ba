"""A real server with the demo model for each module, and the official client of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from pace import Pace
from pilotlight.artifact import Artifact
from support import ServerProcess, server_process


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server") / "usage.db"


@pytest.fixture(scope="module")
def pace(tmp_path_factory: pytest.TempPathFactory) -> Pace:
    """How fast the server's model runs."""
    return Pace(tmp_path_factory.mktemp("pace"))


@pytest.fixture(scope="module")
def server(demo_int4: Artifact, ledger: Path, pace: Pace) -> Iterator[ServerProcess]:
    with server_process(demo_int4.path, ledger, pace=pace) as server:
        yield server


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client
