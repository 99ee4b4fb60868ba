"""Fixtures shared by all tests: a tiny artifact without a model, and the demo model's artifacts, exported once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
from hypothesis import HealthCheck, settings

from pilotlight.api import sse
from pilotlight.artifact import Artifact, open_artifact
from support import DEMO_MODEL, export_artifact, write_artifact

# An example may take long on a busy machine, and so may making one up. The same examples come each time, so that a red
# run has to do with what was changed; ``make test PYTEST_ARGS=--hypothesis-profile=random`` looks for new ones.
settings.register_profile("random", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("steady", settings.get_profile("random"), derandomize=True)
settings.load_profile("steady")


@pytest.fixture(scope="session")
def toy_artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """An artifact with a byte tokenizer, a chat template and no usable graph."""
    return open_artifact(write_artifact(tmp_path_factory.mktemp("toy") / "toy"))


@pytest.fixture(scope="session")
def demo_fp32(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The demo model as ``pilotlight export --precision fp32`` makes it."""
    return export_artifact(DEMO_MODEL, tmp_path_factory.mktemp("demo") / "demo-fp32", "fp32")


@pytest.fixture(scope="session")
def demo_int4(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The demo model as ``pilotlight export`` makes it by default."""
    return export_artifact(DEMO_MODEL, tmp_path_factory.mktemp("demo") / "demo-int4", "int4")


@pytest.fixture(scope="session")
def demo_hybrid(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The demo model with three graphs and an int8 cache."""
    return export_artifact(DEMO_MODEL, tmp_path_factory.mktemp("demo") / "demo-hybrid", "hybrid")


@pytest.fixture(scope="session")
def demo_artifact(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Callable[[str], Artifact]:
    """Returns the demo model in a precision, exported when it is first asked for."""

    @cache
    def artifact(precision: str) -> Artifact:
        if precision in ("fp32", "int4", "hybrid"):
            made: Artifact = request.getfixturevalue(f"demo_{precision}")
            return made
        return export_artifact(DEMO_MODEL, tmp_path_factory.mktemp("demo") / f"demo-{precision}", precision)

    return artifact


@pytest.fixture(scope="session", autouse=True)
def _graph_cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Servers started by tests keep their graphs here and not in the user's home."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PILOTLIGHT_CACHE_DIR", str(tmp_path_factory.mktemp("graphs")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _nobody_pings() -> Iterator[None]:
    """Streams in this process consist of what is generated, however long that takes; tests of pings have their own."""
    with pytest.MonkeyPatch.context() as patched:
        for name in ("PING_AFTER_S", "PING_BEFORE_FIRST_TOKEN_S"):
            patched.setattr(sse, name, 3600.0)
        yield
