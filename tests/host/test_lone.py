"""One function in a process, on a thread of its own: asked without a socket, and stopped while it answers."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from pilotlight.artifact import Artifact
from pilotlight.config import FunctionSettings, HostSettings
from pilotlight.engine.fake import FakeSession
from pilotlight.errors import ConfigError
from pilotlight.host.inprocess import prepare
from pilotlight.host.lone import LoneFunction, resume_token_of
from pilotlight.metering.ledger_reader import LedgerReader
from pilotlight.request import FinishReason
from support import PATIENCE_S, PRICES, VOCAB_SIZE, events

WARM_UP_RUNS = 2
"""What a start generates, unmetered."""


class Gate(FakeSession):
    """Runs the model only as often as it was permitted to."""

    def __init__(self, num_runs: int) -> None:
        self.permits = threading.Semaphore(num_runs)
        self.reached = threading.Event()
        super().__init__(VOCAB_SIZE, before_run=self._wait)

    def _wait(self) -> None:
        if not self.permits.acquire(blocking=False):
            self.reached.set()
            self.permits.acquire()


@contextmanager
def lone(artifact: Artifact, directory: Path, session: FakeSession, **changes: Any) -> Iterator[LoneFunction]:
    settings = FunctionSettings(artifact=str(artifact.path), max_chunk_tokens=64, prices=PRICES)
    host = HostSettings(ledger=str(directory / "usage.db"), **changes)
    function = LoneFunction(prepare("toy", settings), session, host)
    function.start()
    try:
        yield function
    finally:
        function.stop(0)


def body(**params: Any) -> bytes:
    return json.dumps({"model": "toy", "prompt": "hi", "max_tokens": 6, "ignore_eos": True, **params}).encode()


def test_an_answer_comes_piece_by_piece(toy_artifact: Artifact, tmp_path: Path) -> None:
    session = Gate(WARM_UP_RUNS + 2)
    with lone(toy_artifact, tmp_path, session) as function:
        pieces = function.ask("/v1/completions", body(stream=True))
        first = next(pieces)
        assert events(first.decode())[0]["choices"]
        session.permits.release(100)
        rest = b"".join(pieces)
        assert rest.endswith(b"data: [DONE]\n\n")


def test_a_refusal_is_an_answer_too(toy_artifact: Artifact, tmp_path: Path) -> None:
    with lone(toy_artifact, tmp_path, FakeSession(VOCAB_SIZE)) as function:
        (piece,) = function.ask("/v1/completions", body(model="other"))
        assert json.loads(piece)["error"]["code"] == "model_not_found"


def test_whoever_stops_reading_ends_the_generation(toy_artifact: Artifact, tmp_path: Path) -> None:
    session = Gate(WARM_UP_RUNS + 2)
    with lone(toy_artifact, tmp_path, session) as function:
        pieces = function.ask("/v1/completions", body(stream=True), {"x-request-id": "left"})
        next(pieces)
        invocation = function.function.running("left")
        assert invocation is not None
        pieces.close()
        while not invocation.cancelled:  # the event loop's thread hears of it a little later
            time.sleep(0.001)
        session.permits.release(100)
        assert b"id" in b"".join(function.ask("/v1/completions", body(max_tokens=1)))
    record = LedgerReader(tmp_path / "usage.db").get("left")
    assert record is not None
    assert record.finish_reason is FinishReason.CANCELLED


def test_it_answers_over_http_and_ends(toy_artifact: Artifact, tmp_path: Path) -> None:
    settings = FunctionSettings(artifact=str(toy_artifact.path))
    host = HostSettings(ledger=str(tmp_path / "usage.db"))
    function = LoneFunction(prepare("toy", settings), FakeSession(VOCAB_SIZE), host)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        function.start(listener, cold_start_ms=12.5)
        url = f"http://127.0.0.1:{function.port}"
        answer = httpx.post(f"{url}/v1/completions", content=body(), timeout=PATIENCE_S).json()
        assert answer["usage"]["pilotlight"]["cold_start_ms"] == 12.5
        function.stop(0)
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/livez", timeout=PATIENCE_S)
    function.stop(0)


def test_without_keys_it_does_not_start_where_some_are_needed(toy_artifact: Artifact, tmp_path: Path) -> None:
    host = HostSettings(ledger=str(tmp_path / "usage.db"))
    prepared = prepare("toy", FunctionSettings(artifact=str(toy_artifact.path)))
    function = LoneFunction(prepared, FakeSession(VOCAB_SIZE), host, needs_keys=True)
    with pytest.raises(ConfigError, match="there are no API keys"):
        function.start()
    function.stop(0)


SECRET = "a secret of some length"


def ids_of(pieces: list[bytes]) -> list[int]:
    """Return the tokens in the frames of a stream, or of several."""
    lines = [line for line in b"".join(pieces).split(b"\n") if line.startswith(b"data: {")]
    choices = [choice for line in lines for choice in json.loads(line[6:])["choices"]]
    return [token for choice in choices for token in choice.get("token_ids", [])]


def test_what_was_preempted_goes_on_elsewhere_and_is_billed_once(toy_artifact: Artifact, tmp_path: Path) -> None:
    """One container is taken back in the middle of an answer; Modal starts its input again in another one."""
    asked = body(stream=True, max_tokens=20, return_token_ids=True)
    session = Gate(WARM_UP_RUNS + 5)
    first: list[bytes] = []
    with lone(toy_artifact, tmp_path, session, resume_secret=SECRET) as function:
        pieces = function.ask_to_the_end("/v1/completions", asked, "input-1")
        reader = threading.Thread(target=lambda: first.extend(pieces))
        reader.start()
        session.reached.wait()
        stopping = threading.Thread(target=function.stop, args=(0,))
        stopping.start()
        while not any(i.cancelled for i in function.function._running.values()):
            time.sleep(0.001)
        session.permits.release(100)
        stopping.join()
        reader.join()
    assert resume_token_of(b"".join(first)) is not None
    assert 0 < len(ids_of(first)) < 20
    with lone(toy_artifact, tmp_path, FakeSession(VOCAB_SIZE), resume_secret=SECRET) as function:
        again = list(function.ask_to_the_end("/v1/completions", asked, "input-1"))
        whole = list(function.ask_to_the_end("/v1/completions", asked))
    assert b"".join(again).startswith(b"".join(first).partition(b"data: [DONE]")[0])
    assert ids_of(again) == ids_of(whole)
    assert len(ids_of(whole)) == 20
    records = list(LedgerReader(tmp_path / "usage.db").records())
    unbroken, *parts = records  # the newest first
    assert [record.finish_reason for record in parts] == [FinishReason.LENGTH, FinishReason.DEADLINE]
    for name in ("prompt_tokens", "completion_tokens", "cost_micros"):
        assert sum(getattr(record, name) for record in parts) == getattr(unbroken, name), name


def test_without_a_secret_a_preempted_answer_is_metered_and_ends(toy_artifact: Artifact, tmp_path: Path) -> None:
    session = Gate(WARM_UP_RUNS + 3)
    with lone(toy_artifact, tmp_path, session) as function:
        pieces = function.ask_to_the_end("/v1/completions", body(stream=True, max_tokens=20))
        next(pieces)
        session.reached.wait()
        stopping = threading.Thread(target=function.stop, args=(0,))
        stopping.start()
        while not any(i.cancelled for i in function.function._running.values()):
            time.sleep(0.001)
        session.permits.release(100)
        rest = b"".join(pieces)
        stopping.join()
    assert resume_token_of(rest) is None
    (record,) = LedgerReader(tmp_path / "usage.db").records()
    assert record.finish_reason is FinishReason.CANCELLED
    assert 0 < record.completion_tokens < 20


def test_a_word_in_an_answer_is_no_token() -> None:
    said = b'data: {"choices":[{"delta":{"content":"resume_token"}}]}\n\ndata: [DONE]\n\n'
    assert resume_token_of(said) is None
    assert resume_token_of(b'data: {"usage":{"pilotlight":{"resume_token":"plr1.x"}}}\n\n' + said) == "plr1.x"
