"""The Lambda function over the toy function with the fake session, behind a fake Runtime API."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from moto.server import ThreadedMotoServer

from event import Reading
from fake_runtime_api import FakeRuntimeApi, fake_runtime_api
from handler import Handler, poll_all
from pilotlight.artifact import Artifact
from pilotlight.engine.fake import FakeSession
from runtime_client import RuntimeClient
from support import VOCAB_SIZE, Serving, serving

MANY_RUNS = 10_000
RESUME_SECRET = "a secret of all sandboxes"


@contextmanager
def moto_server() -> Iterator[str]:
    """Run AWS's stand-in on a port of its own and yield its URL."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


class GatedSession(FakeSession):
    """Runs the model only as often as the gate was opened; each run is one token once the prompt is read."""

    def __init__(self, max_context_tokens: int = 64) -> None:
        self._permits = threading.Semaphore(0)
        super().__init__(VOCAB_SIZE, max_context_tokens=max_context_tokens, before_run=self._permits.acquire)

    def permit(self, num_runs: int) -> None:
        self._permits.release(num_runs)


@dataclass(frozen=True)
class OnLambda:
    """The toy function as Lambda sees it, and Lambda as the toy function sees it."""

    toy: Serving
    platform: FakeRuntimeApi


@asynccontextmanager
async def on_lambda(
    artifact: Artifact,
    directory: Path,
    session: FakeSession | None = None,
    url_reading: Reading = Reading.HTTP_STREAM,
    num_pollers: int = 1,
) -> AsyncIterator[OnLambda]:
    with fake_runtime_api() as platform:
        async with serving(artifact, directory, session, resume_secret=RESUME_SECRET) as toy:
            handler = Handler(RuntimeClient(platform.address), toy.app, toy.function, url_reading)
            pollers = asyncio.create_task(poll_all(handler, num_pollers))
            try:
                yield OnLambda(toy, platform)
            finally:
                if isinstance(session, GatedSession):
                    session.permit(MANY_RUNS)
                pollers.cancel()
                with suppress(asyncio.CancelledError):
                    await pollers
