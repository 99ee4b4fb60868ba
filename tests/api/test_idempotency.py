"""Requests that are sent twice: one invocation, one answer, one bill; and streams taken up after a lost connection."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotlight.api.kept_answer import Head, KeptAnswer
from pilotlight.artifact import Artifact
from pilotlight.engine.fake import FakeSession
from pilotlight.errors import IdempotencyConflict
from pilotlight.metering.idempotency import Claim
from pilotlight.metering.keyring import KeyDesk
from pilotlight.metering.keys import Limits
from pilotlight.metering.ledger import Ledger
from pilotlight.metering.ledger_reader import LedgerReader
from pilotlight.metering.prices import PriceTable
from pilotlight.metering.record import Admission, UsageRecord
from pilotlight.request import FinishReason
from support import VOCAB_SIZE, Serving, serving

BODY: dict[str, Any] = {"model": "toy", "prompt": [1, 2, 3], "max_tokens": 8, "ignore_eos": True}
LONG = {**BODY, "max_tokens": 1000, "stream": True}


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


async def ask(
    api: Serving, body: dict[str, Any], key: str | None = "k", path: str = "/v1/completions", **headers: str
) -> httpx.Response:
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    if key is not None:
        sent["idempotency-key"] = key
    return await api.client.post(path, json=body, headers=sent)


def records(directory: Path) -> list[UsageRecord]:
    with LedgerReader(directory / "usage.db") as reader:
        return list(reader.records())


def frames(text: str) -> list[tuple[str, str]]:
    """Return the ids and the rest of a stream's events."""
    found = [event.partition("\n") for event in text.removesuffix("\n\n").split("\n\n")]
    return [(head.removeprefix("id: "), rest) for head, _, rest in found]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("restart", [False, True], ids=["same server", "after a restart"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_request_sent_again_gets_the_same_answer_and_one_record(
    toy_artifact: Artifact, tmp_path: Path, stream: bool, restart: bool, path: str
) -> None:
    prompt = {"prompt": "hi"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "hi"}]}
    body = {"model": "toy", "max_tokens": 6, "stream": stream, **prompt}

    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as api:
            first = await ask(api, body, path=path)
            if not restart:
                second = await ask(api, body, path=path)
        if restart:
            async with serving(toy_artifact, tmp_path) as api:
                second = await ask(api, body, path=path)
        assert first.status_code == second.status_code == 200
        assert first.content == second.content
        assert first.headers["content-type"] == second.headers["content-type"]
        assert [answer.headers.get("idempotent-replayed") for answer in (first, second)] == [None, "true"]
        (record,) = records(tmp_path)
        assert (record.idempotency_key, record.attempt) == ("k", 1)

    run(scenario())


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_request_sent_again_joins_the_one_that_runs(toy_artifact: Artifact, tmp_path: Path, stream: bool) -> None:
    gate = threading.Event()
    session = FakeSession(VOCAB_SIZE, before_run=gate.wait)

    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path, session) as api:
            asking = [asyncio.create_task(ask(api, {**BODY, "stream": stream})) for _ in range(20)]
            while api.function.num_running == 0:
                await asyncio.sleep(0)
            gate.set()
            answers = await asyncio.gather(*asking)
            assert len({answer.content for answer in answers}) == 1
            assert {answer.status_code for answer in answers} == {200}
            assert len(records(tmp_path)) == 1
            assert session.num_runs == 1 + 7, "one prefill, which gives the first of the 8 tokens"

    run(scenario())


def test_another_body_or_endpoint_under_the_same_key_is_a_conflict(toy_artifact: Artifact, tmp_path: Path) -> None:
    chat = {"model": "toy", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}

    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as api:
            await ask(api, BODY)
            for other, path in (({**BODY, "max_tokens": 7}, "/v1/completions"), (chat, "/v1/chat/completions")):
                refused = await ask(api, other, path=path)
                assert (refused.status_code, refused.json()["error"]["code"]) == (409, "idempotency_conflict")
                assert refused.headers["x-should-retry"] == "false"
            assert len(records(tmp_path)) == 1

    run(scenario())


def test_an_idempotency_key_is_that_of_one_api_key(toy_artifact: Artifact, tmp_path: Path) -> None:
    with KeyDesk(tmp_path / "usage.db") as desk:
        tokens = [desk.create(name, name, None, Limits())[1] for name in "ab"]

    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as api:
            answers = [await ask(api, BODY, authorization=f"Bearer {token}") for token in tokens]
            assert answers[0].json()["id"] != answers[1].json()["id"]
            assert {record.tenant for record in records(tmp_path)} == {"a", "b"}

    run(scenario())


@pytest.mark.parametrize("key", ["", "x" * 256, "with space", "größe".encode().decode("latin-1")])
def test_a_malformed_key_is_refused(toy_artifact: Artifact, tmp_path: Path, key: str) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as api:
            refused = await api.client.post(
                "/v1/completions", json=BODY, headers=[(b"idempotency-key", key.encode("latin-1"))]
            )
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "idempotency-key")

    run(scenario())


def test_what_was_refused_is_not_claimed(toy_artifact: Artifact, tmp_path: Path) -> None:
    with KeyDesk(tmp_path / "usage.db") as desk:
        _, token = desk.create("a", "a", None, Limits(max_concurrent=1))
    gate = threading.Event()
    session = FakeSession(VOCAB_SIZE, before_run=gate.wait)

    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path, session) as api:
            running = asyncio.create_task(ask(api, BODY, "first", authorization=f"Bearer {token}"))
            while api.function.num_running == 0:
                await asyncio.sleep(0)
            refused = await ask(api, BODY, "second", authorization=f"Bearer {token}")
            assert refused.status_code == 429
            gate.set()
            assert (await running).status_code == 200
            assert (await ask(api, BODY, "second", authorization=f"Bearer {token}")).status_code == 200

    run(scenario())


def test_a_crashed_attempt_is_followed_by_another(tmp_path: Path) -> None:
    claim = Claim("", "k", "f", now=0.0, expires_at=100.0)

    def admission(request_id: str) -> Admission:
        return Admission(
            request_id=request_id,
            function="toy",
            artifact_digest="sha256:1",
            precision="fp32",
            provider="cpu",
            replica_id="r",
            started_at_utc="2026-11-22T12:00:00.000000Z",
            prices=PriceTable.from_config({}),
        )

    path = tmp_path / "usage.db"
    with Ledger(path) as ledger:
        assert asyncio.run(ledger.admit(admission("a"), claim)).attempt == 1
        with pytest.raises(IdempotencyConflict, match="'a' of this Idempotency-Key is running elsewhere or has run"):
            asyncio.run(ledger.admit(admission("b"), claim))
    with Ledger(path) as ledger:
        with pytest.raises(IdempotencyConflict, match="was used for another request"):
            asyncio.run(ledger.admit(admission("b"), claim._replace(fingerprint="g")))
        assert asyncio.run(ledger.admit(admission("b"), claim)).attempt == 2
    with Ledger(path) as ledger:
        second = ledger.get("b")
        assert second is not None
        assert (second.attempt, second.finish_reason) == (2, FinishReason.CRASHED)
        late = claim._replace(now=100.0, expires_at=200.0, fingerprint="g")
        assert asyncio.run(ledger.admit(admission("c"), late)).attempt == 1


def test_last_event_id_goes_on_after_that_event(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as api:
            whole = frames((await ask(api, {**BODY, "stream": True})).text)
            request_id = whole[0][0].partition(":")[0]
            assert [event_id for event_id, _ in whole] == [f"{request_id}:{n + 1}" for n in range(len(whole))]
            assert whole[-1][1] == "data: [DONE]"
            for number, (event_id, _) in enumerate(whole[:-1]):
                rest = await ask(api, {**BODY, "stream": True}, last_event_id=event_id)
                assert frames(rest.text) == whole[number + 1 :]
            beyond = await ask(api, {**BODY, "stream": True}, last_event_id=f"{request_id}:999")
            assert beyond.status_code == 409
            other = await ask(api, {**BODY, "stream": True}, last_event_id="other:1")
            assert other.status_code == 409
            unknown = await ask(api, {**BODY, "stream": True}, key=None, last_event_id="other:1")
            assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "request_not_found")
            malformed = await ask(api, {**BODY, "stream": True}, last_event_id="nonsense")
            assert (malformed.status_code, malformed.json()["error"]["param"]) == (400, "last-event-id")
            assert len(records(tmp_path)) == 1

    run(scenario())


class Connection:
    """A client over ASGI that can leave in the middle."""

    def __init__(self, api: Serving, body: dict[str, Any], **headers: str) -> None:
        self.left = asyncio.Event()
        self.bodies: list[bytes] = []
        self.progress = asyncio.Event()
        content = json.dumps(body).encode()
        incoming = [{"type": "http.request", "body": content, "more_body": False}]

        async def receive() -> Any:
            if incoming:
                return incoming.pop()
            await self.left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if not self.left.is_set():
                self.bodies.append(message.get("body", b""))
                self.progress.set()

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "raw_path": b"",
            "query_string": b"",
            "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
        }

        async def connect() -> None:
            await api.app(scope, receive, send)

        self.task = asyncio.create_task(connect())

    async def read(self, num_events: int) -> list[tuple[str, str]]:
        while len(found := frames(b"".join(self.bodies).decode())) < num_events or found == [("", "")]:
            self.progress.clear()
            await self.progress.wait()
        return found

    async def leave(self) -> None:
        self.left.set()
        await self.task


@pytest.mark.parametrize("mode", ["idempotent", "all"])
def test_a_lost_stream_is_taken_up_again_while_it_is_generated(
    toy_artifact: Artifact, tmp_path: Path, mode: str
) -> None:
    steps = threading.Semaphore(4)
    session = FakeSession(VOCAB_SIZE, max_context_tokens=2000, before_run=steps.acquire)
    headers = {"idempotency_key": "k"} if mode == "idempotent" else {}
    body = {**BODY, "max_tokens": 40, "stream": True, "return_token_ids": True}

    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path, session, resumes_all_streams=mode == "all") as api:
            first = Connection(api, body, **headers)
            received = await first.read(2)
            await first.leave()
            second = Connection(api, body, **headers, last_event_id=received[-1][0])
            for _ in range(100):
                steps.release()
            await second.task
            received += frames(b"".join(second.bodies).decode())
            numbers = [int(event_id.rpartition(":")[2]) for event_id, _ in received]
            assert numbers == list(range(1, len(numbers) + 1))
            tokens = re.findall(r'"token_ids":\[(\d+)\]', "".join(rest for _, rest in received))
            assert len(tokens) == 40
            assert received[-1][1] == "data: [DONE]"
            (record,) = records(tmp_path)
            assert (record.finish_reason, record.completion_tokens) == (FinishReason.LENGTH, 40)
            assert session.num_runs == 40

    run(scenario())


def test_nobody_else_takes_up_a_stream(toy_artifact: Artifact, tmp_path: Path) -> None:
    with KeyDesk(tmp_path / "usage.db") as desk:
        mine, others = (desk.create(name, name, None, Limits())[1] for name in "ab")
    steps = threading.Semaphore(2)
    session = FakeSession(VOCAB_SIZE, before_run=steps.acquire)

    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path, session, resumes_all_streams=True) as api:
            body = {**BODY, "stream": True, "return_token_ids": True}
            first = Connection(api, body, authorization=f"Bearer {mine}")
            ((event_id, _), *_) = await first.read(1)
            stolen = await ask(api, body, None, authorization=f"Bearer {others}", last_event_id=event_id)
            assert stolen.status_code == 404
            for _ in range(20):
                steps.release()
            await first.task

    run(scenario())


def test_what_nobody_comes_back_for_is_cancelled_after_the_window(toy_artifact: Artifact, tmp_path: Path) -> None:
    session = FakeSession(VOCAB_SIZE, max_context_tokens=100_000, before_run=lambda: time.sleep(0.001))

    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path, session, resume_window_s=0.05) as api:
            body = {**LONG, "max_tokens": 90_000, "return_token_ids": True}
            lost = Connection(api, body, idempotency_key="k", x_request_id="lost")
            await lost.read(1)
            await lost.leave()
            await api.function.settled("lost")
            record = api.ledger.get("lost")
            assert record is not None
            assert record.finish_reason is FinishReason.CANCELLED
            again = await ask(api, body)
            assert "request_cancelled" in again.text, again.text[-500:]
            assert len(records(tmp_path)) == 1

    run(scenario())


def test_beyond_its_memory_an_answer_is_not_kept_and_still_not_made_twice(
    toy_artifact: Artifact, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path, max_kept_answer_bytes=600) as api:
            body = {**BODY, "stream": True, "return_token_ids": True}
            first = await ask(api, body)
            assert frames(first.text)[-1][1] == "data: [DONE]"
            again = await ask(api, body)
            assert again.status_code == 409
            assert "GET /v1/usage/" in again.json()["error"]["message"]
            assert len(records(tmp_path)) == 1

    run(scenario())


def test_a_failed_generation_is_answered_by_the_same_error_and_not_repeated(
    toy_artifact: Artifact, tmp_path: Path
) -> None:
    def fail() -> None:
        raise RuntimeError("the model run failed")

    session = FakeSession(VOCAB_SIZE, before_run=fail)

    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path, session) as api:
            first, second = await ask(api, BODY), await ask(api, BODY)
            assert (first.status_code, second.status_code) == (500, 500)
            assert first.content == second.content
            assert second.headers["x-should-retry"] == "false"
            assert len(records(tmp_path)) == 1

    run(scenario())


@settings(deadline=None)
@given(
    st.lists(st.one_of(st.just("add"), st.just("drop"), st.integers(0, 20)), max_size=30),
)
def test_every_reader_gets_every_piece_after_its_place_once(steps: list[str | int]) -> None:
    async def scenario() -> None:
        answer = KeptAnswer("r", "f", None)
        answer.begin(Head(200, {}, is_stream=True))
        num_pieces = 0
        readers: list[tuple[int, asyncio.Task[list[int]]]] = []

        async def read(after: int) -> list[int]:
            return [number async for number, piece in answer.read(after) if piece == b"%d" % number]

        for step in steps:
            if step == "add":
                num_pieces += 1
                answer.add(b"%d" % num_pieces)
            elif step == "drop":
                answer.drop_read()
            elif isinstance(step, int):
                try:
                    answer.check(step)
                except IdempotencyConflict:
                    continue
                readers.append((step, asyncio.create_task(read(step))))
            await asyncio.sleep(0)
        answer.end()
        for after, reader in readers:
            assert await reader == list(range(after + 1, num_pieces + 1))
        assert answer.num_readers == 0

    run(scenario())
