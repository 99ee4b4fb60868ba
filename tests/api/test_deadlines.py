"""``x-request-timeout-ms``: what a request gets that runs out of time, before its first token and after it."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from pilotlight.artifact import Artifact
from pilotlight.engine.fake import FakeSession
from support import VOCAB_SIZE, Serving, events, run_out_of_time, serving

TIMEOUT_S = 60
SOON = {"x-request-timeout-ms": f"{TIMEOUT_S}000"}


async def ask(toy: Serving, path: str, name: str, headers: dict[str, str], **params: Any) -> httpx.Response:
    body = {"model": "toy", "ignore_eos": True, **params}
    return await toy.client.post(path, content=json.dumps(body), headers={"x-request-id": name, **headers})


@pytest.mark.parametrize(
    ("path", "prompt", "error_type"),
    [
        ("/v1/completions", {"prompt": "hi"}, "server_error"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}, "server_error"),
        ("/v1/messages", {"messages": [{"role": "user", "content": "hi"}]}, "timeout_error"),
    ],
)
def test_what_expires_in_the_queue_gets_504_and_costs_nothing(
    toy_artifact: Artifact, tmp_path: Path, path: str, prompt: dict[str, Any], error_type: str
) -> None:
    steps = threading.Semaphore(0)
    session = FakeSession(VOCAB_SIZE, num_slots=2, before_run=steps.acquire)
    extra = {} if path == "/v1/messages" else {"ignore_eos": True}

    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path, session) as toy:
            running = [asyncio.create_task(toy.complete("a", max_tokens=2, ignore_eos=True)) for _ in range(2)]
            while toy.function.num_running < 2:
                await asyncio.sleep(0)
            body = {"model": "toy", "max_tokens": 5, **prompt, **extra}
            late = asyncio.create_task(
                toy.client.post(path, content=json.dumps(body), headers={"x-request-id": "late", **SOON})
            )
            await run_out_of_time(toy.function, "late", TIMEOUT_S)
            steps.release(100)
            response = await late
            assert response.status_code == 504
            assert response.headers["retry-after"] == "1"
            assert response.json()["error"]["type"] == error_type
            record = toy.ledger.get("late")
            assert record is not None
            assert (record.finish_reason, record.prompt_tokens, record.completion_tokens) == ("rejected", 0, 0)
            assert record.cost_micros == 0
            assert {done.status_code for done in await asyncio.gather(*running)} == {200}

    asyncio.run(asyncio.wait_for(scenario(), 300))


def test_a_stream_that_expires_in_the_queue_ends_with_an_error_frame(toy_artifact: Artifact, tmp_path: Path) -> None:
    steps = threading.Semaphore(0)
    session = FakeSession(VOCAB_SIZE, num_slots=2, before_run=steps.acquire)

    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path, session) as toy:
            running = [asyncio.create_task(toy.complete("a", max_tokens=2, ignore_eos=True)) for _ in range(2)]
            while toy.function.num_running < 2:
                await asyncio.sleep(0)
            late = asyncio.create_task(ask(toy, "/v1/completions", "late", SOON, prompt="hi", stream=True))
            await run_out_of_time(toy.function, "late", TIMEOUT_S)
            steps.release(100)
            response = await late
            assert "[DONE]" not in response.text
            assert events(response.text)[-1]["error"]["code"] == "deadline_exceeded"
            record = toy.ledger.get("late")
            assert record is not None
            assert (record.finish_reason, record.cost_micros) == ("rejected", 0)
            await asyncio.gather(*running)

    asyncio.run(asyncio.wait_for(scenario(), 300))


def test_an_answer_that_has_begun_ends_as_if_its_length_were_reached(toy_artifact: Artifact, tmp_path: Path) -> None:
    steps = threading.Semaphore(3)
    session = FakeSession(VOCAB_SIZE, max_context_tokens=4096, before_run=steps.acquire)

    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path, session) as toy:
            asking = asyncio.create_task(ask(toy, "/v1/completions", "cut", SOON, prompt="hi", max_tokens=4000))
            while session.num_runs < 3:
                await asyncio.sleep(0)
            await run_out_of_time(toy.function, "cut", TIMEOUT_S)
            steps.release(100)
            answer = (await asking).json()
            assert answer["choices"][0]["finish_reason"] == "length"
            assert answer["usage"]["completion_tokens"] in (3, 4)
            record = toy.ledger.get("cut")
            assert record is not None
            assert record.finish_reason == "deadline"
            assert record.completion_tokens == answer["usage"]["completion_tokens"]

    asyncio.run(asyncio.wait_for(scenario(), 300))


def test_what_expired_may_be_asked_for_again_under_its_key(toy_artifact: Artifact, tmp_path: Path) -> None:
    steps = threading.Semaphore(0)
    session = FakeSession(VOCAB_SIZE, num_slots=1, before_run=steps.acquire)

    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path, session) as toy:
            running = asyncio.create_task(toy.complete("a", max_tokens=2, ignore_eos=True))
            while toy.function.num_running < 1:
                await asyncio.sleep(0)
            once = {"idempotency-key": "once"}
            late = asyncio.create_task(ask(toy, "/v1/completions", "one", SOON | once, prompt="hi", max_tokens=2))
            await run_out_of_time(toy.function, "one", TIMEOUT_S)
            steps.release(100)
            response = await late
            await running
            assert response.status_code == 504
            again = await ask(toy, "/v1/completions", "two", once, prompt="hi", max_tokens=2)
            assert again.status_code == 200, again.text
            assert again.json()["usage"]["completion_tokens"] == 2

    asyncio.run(asyncio.wait_for(scenario(), 300))


@pytest.mark.parametrize("value", ["0", "-5", "soon", "1.5", "86400001", ""])
def test_a_timeout_that_is_none_is_refused(toy_artifact: Artifact, tmp_path: Path, value: str) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:
            response = await ask(toy, "/v1/completions", "odd", {"x-request-timeout-ms": value}, prompt="hi")
            assert response.status_code == 400
            assert response.json()["error"]["param"] == "x-request-timeout-ms"
            assert toy.ledger.get("odd") is None

    asyncio.run(asyncio.wait_for(scenario(), 300))
