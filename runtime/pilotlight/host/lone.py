"""One function in this process behind the whole API, on the event loop of a thread of its own.

For platforms that run our code in a container, and call it on a thread of theirs when the container starts and ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import queue
import socket
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from typing import Any

import msgspec
import uvicorn

from pilotlight.api.app import Api
from pilotlight.api.metrics import Metrics
from pilotlight.api.response_store import ResponseStore
from pilotlight.api.resume_token import PARAM
from pilotlight.api.resumption import resume_tokens
from pilotlight.config import HostSettings
from pilotlight.engine.session import Session
from pilotlight.errors import ConfigError, EngineError
from pilotlight.function import Function
from pilotlight.host.departure import MARGIN_S
from pilotlight.host.inprocess import Prepared, start
from pilotlight.host.notice import Kind, Notice, ToldNotices, watch
from pilotlight.host.server import kept_answers_for, signer_of
from pilotlight.host.serving import server_config
from pilotlight.metering.database import located
from pilotlight.metering.keyring import Keyring
from pilotlight.metering.opening import open_ledger
from pilotlight.request import Sequence

WARM_UP = Sequence("warm-up", prompt_ids=(0,), max_new_tokens=2)
CLOSE_TIMEOUT_S = 5
"""How long a connection may take to close after its stream was ended."""

DATA = b"data: "

App = Callable[[Any, Any, Any], Any]


class LoneFunction:
    """A prepared function: started, asked and stopped from any thread."""

    def __init__(self, prepared: Prepared, session: Session, host: HostSettings, *, needs_keys: bool = False) -> None:
        """With ``needs_keys`` it does not start without API keys: nobody else asks who calls."""
        self._prepared = prepared
        self._session = session
        self._host = host
        self._needs_keys = needs_keys
        self._started: Future[None] = Future()
        self._loop = asyncio.new_event_loop()
        self._ending = asyncio.Event()
        self.told = ToldNotices()
        self._thread = threading.Thread(target=self._run, name="pilotlight-function", daemon=True)
        self._app: App
        self.function: Function

    def start(self, listener: socket.socket | None = None, cold_start_ms: float = 0.0) -> None:
        """Open the ledger, start the engine, generate something unmetered, and answer what comes in on ``listener``.

        Raises:
            StartupError: the ledger cannot be opened, or has no keys where some are needed.
        """
        self._listener = listener
        self._cold_start_ms = cold_start_ms
        self._thread.start()
        try:
            self._started.result()
        except BaseException:
            self._thread.join()
            raise

    @property
    def port(self) -> int:
        """Where it listens."""
        assert self._listener is not None
        port: int = self._listener.getsockname()[1]
        return port

    def ask(self, path: str, body: bytes, headers: dict[str, str] | None = None) -> Generator[bytes, None, None]:
        """Yield the body of the answer to a POST as it comes into being.

        Raises:
            EngineError: the application failed.
        """
        pieces: queue.SimpleQueue[bytes | Exception | None] = queue.SimpleQueue()
        answering = asyncio.run_coroutine_threadsafe(self._answer(path, body, headers or {}, pieces), self._loop)
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, Exception):
                    raise EngineError("the application failed") from piece
                yield piece
        finally:
            answering.cancel()

    def ask_to_the_end(
        self, path: str, body: bytes, idempotency_key: str | None = None, headers: dict[str, str] | None = None
    ) -> Iterator[bytes]:
        """Yield the frames of a streamed answer, and where it was cut off, those of its continuation.

        Under the same ``idempotency_key`` another process yields what was generated already, and goes on behind it:
        nothing is generated or billed twice.
        """
        key = idempotency_key
        while True:
            frames = []
            named = {} if key is None else {"idempotency-key": key}
            for piece in self.ask(path, body, {**(headers or {}), **named}):
                frames.append(piece)
                yield piece
            token = resume_token_of(b"".join(frames))
            if token is None or self.function.draining:
                return
            body = msgspec.json.encode({**msgspec.json.decode(body), PARAM: token})
            key = None if key is None else f"{idempotency_key}.{hashlib.sha256(token.encode()).hexdigest()[:16]}"

    def stop(self, drain_timeout_s: float) -> None:
        """Take no more requests, let running ones finish for a while, end the rest with their records, and end."""
        if self._thread.is_alive():
            self.told.tell(drain_timeout_s + MARGIN_S)
            self._thread.join()

    def _noticed(self, notice: Notice) -> None:
        """This container goes. Its platform has others, and sends nothing more here."""
        if notice.kind is Kind.INTERRUPTION:
            self._leaving = asyncio.create_task(self._leave(notice.seconds_left - MARGIN_S), name="leave")

    async def _leave(self, drain_timeout_s: float) -> None:
        await self.function.drain(max(0.0, drain_timeout_s))
        self._ending.set()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            try:
                runner.run(self._serve())
            except Exception as error:
                if self._started.done():
                    raise
                self._started.set_exception(error)

    async def _serve(self) -> None:
        async with self._open() as app:
            self._app = app
            watching = asyncio.create_task(watch([self.told], self._noticed), name="notices")
            self._started.set_result(None)
            try:
                await self._answer_until_the_end(app)
            finally:
                watching.cancel()

    async def _answer_until_the_end(self, app: App) -> None:
        if self._listener is None:
            await self._ending.wait()
            return
        server = _Server(app)
        serving = asyncio.create_task(server.serve([self._listener]))
        await self._ending.wait()
        server.should_exit = True
        await serving

    @contextlib.asynccontextmanager
    async def _open(self) -> AsyncIterator[App]:
        with ExitStack() as opened:
            ledger_at = located(self._host.ledger)
            ledger = opened.enter_context(open_ledger(ledger_at, signer_of(self._host), self._host.cache_dir))
            keyring = opened.enter_context(Keyring(ledger_at))
            if self._needs_keys and not keyring.usable:
                raise ConfigError("there are no API keys, and nobody else asks who calls: pilotlight keys create")
            responses = opened.enter_context(ResponseStore.open(self._host))
            metrics = Metrics()
            self.function = start(self._prepared, self._session, self._host, ledger, metrics)
            kept_answers = kept_answers_for(self._host, ledger)
            try:
                async for _ in self.function.backend.submit(WARM_UP):
                    pass
                self.function.started(self._cold_start_ms)
                await ledger.register_prices(self.function.prices.tables)
                functions = {self.function.name: self.function}
                metrics.watch(functions)
                self._watch_gpu(metrics)
                yield Api(
                    functions,
                    ledger,
                    metrics,
                    self._host.max_body_bytes,
                    responses,
                    keyring,
                    kept_answers,
                    resume_tokens=resume_tokens(self._host),
                ).app()
            finally:
                await self.function.close()
                await kept_answers.close()

    def _watch_gpu(self, metrics: Metrics) -> None:
        if self._prepared.settings.provider == "cuda":
            from pilotlight.host.gpu import watch

            watch(metrics, self.function, self._session)

    async def _answer(
        self, path: str, body: bytes, headers: dict[str, str], pieces: queue.SimpleQueue[bytes | Exception | None]
    ) -> None:
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await asyncio.Event().wait()
            raise AssertionError("nobody sets it")

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.body" and message.get("body"):
                pieces.put(message["body"])

        try:
            await self._app(_scope(path, headers), receive, send)
            pieces.put(None)
        except Exception as error:  # noqa: BLE001 - whoever asked has to learn of it
            pieces.put(error)


def resume_token_of(stream: bytes) -> str | None:
    """Return the token with which a streamed answer can be continued, if it was cut off."""
    for line in reversed(stream.split(b"\n")):
        if line.startswith(DATA) and PARAM.encode() in line:
            usage = msgspec.json.decode(line.removeprefix(DATA)).get("usage") or {}
            if (token := usage.get("pilotlight", {}).get(PARAM)) is not None:
                return str(token)
    return None


class _Server(uvicorn.Server):
    def __init__(self, app: App) -> None:
        super().__init__(server_config(app, CLOSE_TIMEOUT_S))

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the platform: this is not the main thread."""
        yield


def _scope(path: str, headers: dict[str, str]) -> dict[str, Any]:
    given = {"content-type": "application/json", **headers}
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "https",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in given.items()],
        "state": {},
    }
