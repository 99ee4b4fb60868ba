"""Chat and text completions over the fake session: exact tokens, exact frames, exact usage."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine_support import Steps
from pilotlight.artifact import Artifact
from pilotlight.engine.fake import FakeSession
from pilotlight.request import FinishReason
from support import EOS_ID, VOCAB_SIZE, Serving, events, expected_tokens, serving, toy_tokenizer

TOKENIZER = toy_tokenizer()
CHAT_IDS = TOKENIZER.encode("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False).ids


def text_of(token_ids: list[int]) -> str:
    text: str = TOKENIZER.decode(token_ids, skip_special_tokens=True)
    return text.rstrip("�")


def test_chat_answers_with_the_models_own_tokens(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:
            response = await toy.chat(max_tokens=6, return_token_ids=True)
            answer = response.json()
            expected = expected_tokens(CHAT_IDS, 6)
            assert response.status_code == 200
            choice = answer["choices"][0]
            assert choice["token_ids"] == expected
            assert choice["message"] == {"role": "assistant", "content": text_of(expected), "refusal": None}
            assert choice["finish_reason"] == ("stop" if expected[-1] == EOS_ID else "length")
            usage = answer["usage"]
            assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(CHAT_IDS), len(expected))
            assert usage["total_tokens"] == len(CHAT_IDS) + len(expected)
            assert usage["pilotlight"]["cost_micros"] == 1_000_000 * len(CHAT_IDS) + 2_000_000 * len(expected)
            assert answer["object"] == "chat.completion"
            assert answer["id"] == response.headers["x-request-id"]

    asyncio.run(scenario())


def test_stream_carries_the_same_answer_frame_by_frame(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:
            whole = (await toy.chat(max_tokens=6)).json()
            response = await toy.chat(max_tokens=6, stream=True, stream_options={"include_usage": True})
            assert response.headers["content-type"].startswith("text/event-stream")
            assert response.text.endswith("data: [DONE]\n\n")
            chunks = events(response.text)
            assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
            *pieces, closing, usage = chunks
            text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in pieces)
            assert text == whole["choices"][0]["message"]["content"]
            assert closing["choices"][0] == {"index": 0, "delta": {}, "finish_reason": "length"}
            assert usage["choices"] == []
            assert usage["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]

    asyncio.run(scenario())


def test_text_completion_takes_text_and_token_ids(toy_artifact: Artifact, tmp_path: Path) -> None:
    prompt_ids = TOKENIZER.encode("hello").ids

    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:
            expected = expected_tokens(prompt_ids, 16)
            for prompt in ("hello", ["hello"], prompt_ids, [prompt_ids]):
                choice = (await toy.complete(prompt, return_token_ids=True)).json()["choices"][0]
                assert choice["token_ids"] == expected
                assert choice["text"] == text_of(expected)

    asyncio.run(scenario())


def test_ignore_eos_goes_on_behind_the_end_token(toy_artifact: Artifact, tmp_path: Path) -> None:
    prompt_ids = next(
        [seed]
        for seed in range(256)
        if EOS_ID in expected_tokens([seed], 20) and expected_tokens([seed], 1) != [EOS_ID]
    )

    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:
            stopped = (await toy.complete(prompt_ids, max_tokens=20, return_token_ids=True)).json()
            ignored = (await toy.complete(prompt_ids, max_tokens=20, return_token_ids=True, ignore_eos=True)).json()
            assert stopped["choices"][0]["finish_reason"] == "stop"
            assert stopped["choices"][0]["token_ids"] == expected_tokens(prompt_ids, 20)
            assert ignored["choices"][0]["finish_reason"] == "length"
            assert ignored["choices"][0]["token_ids"] == expected_tokens(prompt_ids, 20, frozenset())

    asyncio.run(scenario())


def test_a_stop_string_ends_text_tokens_and_bill_at_the_same_place(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:
            params: dict[str, Any] = {"max_tokens": 40, "ignore_eos": True, "return_token_ids": True}
            free = (await toy.complete("abc", **params)).json()
            text, token_ids = free["choices"][0]["text"], free["choices"][0]["token_ids"]
            stop = text[10:12]
            place = text.index(stop)
            stopped = (
                await toy.complete("abc", max_tokens=40, ignore_eos=True, return_token_ids=True, stop=stop)
            ).json()
            choice = stopped["choices"][0]
            assert choice["text"] == text[:place]
            assert choice["finish_reason"] == "stop"
            assert choice["token_ids"] == token_ids[: len(choice["token_ids"])]
            assert stop in text_of(choice["token_ids"])
            assert stop not in text_of(choice["token_ids"][:-1])
            assert stopped["usage"]["completion_tokens"] == len(choice["token_ids"])
            record = toy.ledger.get(stopped["id"])
            assert record is not None
            assert (record.finish_reason, record.stop_detail) == (FinishReason.STOP, stop)
            assert toy.function.backend.signals().num_running == 0

    asyncio.run(scenario())


def test_concurrent_requests_do_not_mix(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path, max_queued_requests=50) as toy:
            prompts = [TOKENIZER.encode(f"prompt {number}").ids for number in range(20)]
            answers = await asyncio.gather(
                *(toy.complete(ids, max_tokens=12, return_token_ids=True) for ids in prompts)
            )
            for ids, answer in zip(prompts, answers, strict=True):
                assert answer.json()["choices"][0]["token_ids"] == expected_tokens(ids, 12)
            records = [toy.ledger.get(answer.json()["id"]) for answer in answers]
            assert all(record is not None for record in records)

    asyncio.run(scenario())


def test_seeded_sampling_repeats_and_unseeded_does_not(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:

            async def draw(**seed: Any) -> list[int]:
                params: dict[str, Any] = {"max_tokens": 12, "return_token_ids": True, "ignore_eos": True}
                answer = await toy.complete("x", temperature=2, **params, **seed)
                token_ids: list[int] = answer.json()["choices"][0]["token_ids"]
                return token_ids

            assert await draw(seed=7) == await draw(seed=7)
            assert await draw(seed=7) != await draw(seed=8)
            assert await draw() != await draw()

    asyncio.run(scenario())


async def _ask_until(toy: Serving, body: bytes, leave: asyncio.Event) -> str:
    """Speak ASGI directly: send a request and hang up when told to. Returns the request id."""
    sent = iter([{"type": "http.request", "body": body, "more_body": False}])
    messages: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        message = next(sent, None)
        if message is None:
            await leave.wait()
            return {"type": "http.disconnect"}
        return message

    async def send(message: Any) -> None:
        messages.append(message)

    path = "/v1/completions"
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": b"", "query_string": b"", "headers": []}
    await toy.app(scope, receive, send)
    headers = dict(messages[0]["headers"])
    return str(headers[b"x-request-id"].decode())


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_a_client_that_leaves_frees_its_slot_and_is_metered_exactly(
    toy_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    steps = Steps(4)
    session = FakeSession(VOCAB_SIZE, max_context_tokens=4096, before_run=steps.take)
    request = {"model": "toy", "prompt": "hello", "max_tokens": 4000, "ignore_eos": True, "stream": stream}

    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path, session) as toy:
            leave, aborted = asyncio.Event(), asyncio.Event()
            abort = toy.function.backend.abort

            def abort_and_tell(sequence_id: str) -> None:
                abort(sequence_id)
                aborted.set()

            monkeypatch.setattr(toy.function.backend, "abort", abort_and_tell)
            leaving = asyncio.create_task(_ask_until(toy, json.dumps(request).encode(), leave))
            await asyncio.to_thread(steps.waits.wait)
            leave.set()
            await aborted.wait()
            steps.release(1000)
            record = toy.ledger.get(await leaving)
            assert record is not None
            assert record.finish_reason is FinishReason.CANCELLED
            assert session.num_runs == 5, "only the step that was under way may still run"
            assert (record.prompt_tokens, record.completion_tokens) == (5, 5)
            assert record.delivered_tokens <= 5
            signals = toy.function.backend.signals()
            assert (signals.num_running, signals.num_waiting, signals.kv_used_bytes) == (0, 0, 0)
            assert (await toy.complete("hello", max_tokens=2)).status_code == 200

    asyncio.run(asyncio.wait_for(scenario(), 300))


def test_cancel_endpoint_ends_a_stream_with_an_error_frame(toy_artifact: Artifact, tmp_path: Path) -> None:
    steps = threading.Semaphore(2)
    session = FakeSession(VOCAB_SIZE, max_context_tokens=4096, before_run=steps.acquire)

    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path, session) as toy:
            headers = {"x-request-id": "mine"}
            asking = asyncio.create_task(toy.chat(headers=headers, stream=True, ignore_eos=True))
            while session.num_runs < 2:
                await asyncio.sleep(0)
            cancelled = await toy.client.post("/v1/requests/mine/cancel")
            steps.release(5)
            response = await asking
            assert cancelled.status_code == 200
            assert events(response.text)[-1]["error"]["code"] == "request_cancelled"
            assert "[DONE]" not in response.text
            record = (await toy.client.get("/v1/usage/mine")).json()
            assert (record["finish_reason"], record["request_id"]) == ("cancelled", "mine")
            assert (await toy.client.post("/v1/requests/mine/cancel")).status_code == 404

    asyncio.run(asyncio.wait_for(scenario(), 300))


def test_a_failed_run_is_an_error_and_is_metered(toy_artifact: Artifact, tmp_path: Path) -> None:
    runs = iter(range(100))

    def fail_on_third_run() -> None:
        if next(runs) == 2:
            raise RuntimeError("out of luck")

    session = FakeSession(VOCAB_SIZE, before_run=fail_on_third_run)

    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path, session) as toy:
            response = await toy.complete("hi", max_tokens=8, ignore_eos=True)
            assert response.status_code == 500
            assert response.json()["error"]["code"] == "engine_error"
            assert "out of luck" not in response.text
            assert response.headers["x-should-retry"] == "false"
            record = toy.ledger.get(response.headers["x-request-id"])
            assert record is not None
            assert (record.finish_reason, record.completion_tokens) == (FinishReason.ERROR, 2)
            assert "out of luck" in (record.stop_detail or "")
            assert (await toy.complete("hi", max_tokens=8)).status_code == 200

    asyncio.run(scenario())


def test_a_full_queue_is_refused_with_retry_after(toy_artifact: Artifact, tmp_path: Path) -> None:
    steps = threading.Semaphore(0)
    session = FakeSession(VOCAB_SIZE, num_slots=1, before_run=steps.acquire)

    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path, session, max_queued_requests=1) as toy:
            taken = [asyncio.create_task(toy.complete("a", max_tokens=1)) for _ in range(2)]
            refused = httpx.Response(200)
            while refused.status_code == 200:
                await asyncio.sleep(0)
                if sum(1 for task in taken if not task.done()) == 2 and toy.function.num_running == 2:
                    refused = await toy.complete("b", max_tokens=1)
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["code"] == "overloaded"
            steps.release(100)
            assert [response.status_code for response in await asyncio.gather(*taken)] == [200, 200]

    asyncio.run(asyncio.wait_for(scenario(), 300))


def test_no_answer_is_longer_than_the_function_allows(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path, max_answer_tokens=5) as toy:
            for params in ({"max_tokens": 20}, {"max_tokens": 5}, {"max_tokens": 3}):
                answer = (await toy.complete("hi", ignore_eos=True, **params)).json()
                assert answer["usage"]["completion_tokens"] == min(5, params["max_tokens"])
                assert answer["choices"][0]["finish_reason"] == "length"
            message = {"model": "toy", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 20}
            answer = (await toy.client.post("/v1/messages", json={**message, "ignore_eos": True})).json()
            assert (answer["usage"]["output_tokens"], answer["stop_reason"]) == (5, "max_tokens")

    asyncio.run(scenario())


def test_draining_refuses_new_requests_and_meters_running_ones(toy_artifact: Artifact, tmp_path: Path) -> None:
    steps = threading.Semaphore(2)
    session = FakeSession(VOCAB_SIZE, max_context_tokens=4096, before_run=steps.acquire)

    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path, session) as toy:
            running = asyncio.create_task(toy.complete("hi", max_tokens=1000, ignore_eos=True))
            while session.num_runs < 2:
                await asyncio.sleep(0)
            draining = asyncio.create_task(toy.function.drain(timeout_s=0))
            await asyncio.sleep(0)
            refused = await toy.complete("hi")
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
            steps.release(1000)
            await draining
            response = await running
            assert response.status_code == 499
            record = toy.ledger.get(response.headers["x-request-id"])
            assert record is not None
            assert record.finish_reason is FinishReason.CANCELLED

    asyncio.run(asyncio.wait_for(scenario(), 300))
