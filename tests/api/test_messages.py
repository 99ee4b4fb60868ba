"""The Anthropic API over the fake session: exact events, exact usage, its own words for errors."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from pilotlight.api import sse
from pilotlight.artifact import Artifact
from pilotlight.engine.fake import FakeSession
from pilotlight.metering.keyring import KeyDesk
from pilotlight.metering.keys import Limits
from pilotlight.request import FinishReason
from support import (
    EOS_ID,
    MAX_BODY_BYTES,
    VOCAB_SIZE,
    Serving,
    expected_tokens,
    named_events,
    serving,
    toy_chat_ids,
    toy_text,
    toy_tokenizer,
)

TOKENIZER = toy_tokenizer()


async def ask(
    toy: Serving, content: Any = "hi", headers: dict[str, str] | None = None, **params: Any
) -> httpx.Response:
    body = {"model": "toy", "max_tokens": 6, "messages": [{"role": "user", "content": content}], **params}
    return await toy.client.post("/v1/messages", content=json.dumps(body), headers=headers)


def test_a_message_is_the_models_own_answer(toy_artifact: Artifact, tmp_path: Path) -> None:
    prompt_ids = toy_chat_ids(("system", "Be brief."), ("user", "hi"))

    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:
            response = await ask(
                toy,
                [{"type": "text", "text": "h", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "i"}],
                system=[{"type": "text", "text": "Be brief."}],
                metadata={"user_id": "u"},
                headers={"x-request-id": "m1", "anthropic-version": "2023-06-01"},
            )
            assert response.status_code == 200, response.text
            expected = expected_tokens(prompt_ids, 6)
            answer = response.json()
            usage = answer.pop("usage")
            assert answer == {
                "id": "msg_m1",
                "type": "message",
                "role": "assistant",
                "model": "toy",
                "content": [{"type": "text", "text": toy_text(expected)}],
                "stop_reason": "end_turn" if expected[-1] == EOS_ID else "max_tokens",
                "stop_sequence": None,
            }
            assert (usage["input_tokens"], usage["output_tokens"]) == (len(prompt_ids), len(expected))
            assert (usage["cache_read_input_tokens"], usage["cache_creation_input_tokens"]) == (0, 0)
            assert usage["pilotlight"]["cost_micros"] == 1_000_000 * len(prompt_ids) + 2_000_000 * len(expected)
            assert response.headers["request-id"] == "m1"
            record = toy.ledger.get("m1")
            assert record is not None
            assert (record.prompt_tokens, record.completion_tokens) == (len(prompt_ids), len(expected))

    asyncio.run(scenario())


def test_a_stream_says_the_same_in_typed_events(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:
            whole = (await ask(toy)).json()
            response = await ask(toy, stream=True)
            assert response.headers["content-type"].startswith("text/event-stream")
            events = named_events(response.text)
            assert all(name == event["type"] for name, event in events)
            names = [name for name, _ in events]
            deltas = [event for name, event in events if name == "content_block_delta"]
            assert names == [
                "message_start",
                "ping",
                "content_block_start",
                *["content_block_delta"] * len(deltas),
                "content_block_stop",
                "message_delta",
                "message_stop",
            ]
            started = events[0][1]["message"]
            assert started["content"] == []
            assert started["stop_reason"] is None
            assert started["usage"]["input_tokens"] == whole["usage"]["input_tokens"]
            assert "".join(event["delta"]["text"] for event in deltas) == whole["content"][0]["text"]
            assert {event["index"] for event in deltas} == {0}
            ended = events[-2][1]
            assert ended["delta"] == {key: whole[key] for key in ("stop_reason", "stop_sequence")}
            for name in ("input_tokens", "output_tokens"):
                assert ended["usage"][name] == whole["usage"][name]

    asyncio.run(scenario())


def test_stop_sequences_and_the_context_are_named_as_reasons(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:
            free = (await ask(toy, max_tokens=30, ignore_eos=True)).json()
            assert free["stop_reason"] == "max_tokens"
            text = free["content"][0]["text"]
            stop = text[8:10]
            for stream in (False, True):
                response = await ask(toy, max_tokens=30, ignore_eos=True, stop_sequences=["never", stop], stream=stream)
                answer = response.json() if not stream else named_events(response.text)[-2][1]["delta"]
                assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", stop)
            assert (await ask(toy, max_tokens=30, stop_sequences=[stop])).json()["content"][0]["text"] == text[
                : text.index(stop)
            ]
            full = (await ask(toy, max_tokens=4000, ignore_eos=True)).json()
            assert full["stop_reason"] == "model_context_window_exceeded"
            assert full["usage"]["input_tokens"] + full["usage"]["output_tokens"] == toy.function.max_context_tokens

    asyncio.run(scenario())


def test_an_answer_goes_on_behind_what_it_is_to_begin_with(toy_artifact: Artifact, tmp_path: Path) -> None:
    prompt_ids = toy_chat_ids(("user", "hi")) + TOKENIZER.encode("Well", add_special_tokens=False).ids

    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:
            for begun in ("Well", [{"type": "text", "text": "Well"}]):
                messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": begun}]
                answer = (await ask(toy, messages=messages)).json()
                assert answer["content"][0]["text"] == toy_text(expected_tokens(prompt_ids, 6))
                assert answer["usage"]["input_tokens"] == len(prompt_ids)

    asyncio.run(scenario())


def test_tool_blocks_of_earlier_turns_become_the_templates_messages(toy_artifact: Artifact, tmp_path: Path) -> None:
    call = {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 1}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "two"}]}
    thought = {"type": "thinking", "thinking": "hm", "signature": "s"}
    messages = [
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": [thought, {"type": "text", "text": "ok"}, call]},
        {"role": "user", "content": [result, {"type": "text", "text": "so"}]},
    ]
    prompt_ids = toy_chat_ids(("user", "1+1"), ("assistant", "ok"), ("tool", "two"), ("user", "so"))

    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:
            answer = (await ask(toy, messages=messages, max_tokens=2)).json()
            assert answer["usage"]["input_tokens"] == len(prompt_ids)
            assert answer["content"][0]["text"] == toy_text(expected_tokens(prompt_ids, 2))

    asyncio.run(scenario())


def test_tokens_are_counted_without_an_invocation(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:
            for content in ("hi", "x" * 500):
                body = {"model": "toy", "system": "S", "messages": [{"role": "user", "content": content}]}
                response = await toy.client.post("/v1/messages/count_tokens", json=body)
                expected = len(toy_chat_ids(("system", "S"), ("user", content)))
                assert (response.status_code, response.json()) == (200, {"input_tokens": expected})
                assert toy.ledger.get(response.headers["x-request-id"]) is None
            assert toy.session.num_runs == 0

    asyncio.run(scenario())


BAD: list[tuple[dict[str, Any], int, str, str]] = [
    ({"model": "nobody"}, 404, "not_found_error", "no function 'nobody' here"),
    ({"max_tokens": None}, 400, "invalid_request_error", "max_tokens: expected int"),
    ({"messages": []}, 400, "invalid_request_error", "messages: expected array of length >= 1"),
    ({"temperature": 1.5}, 400, "invalid_request_error", "temperature: expected number <= 1"),
    ({"tools": [{"name": "f"}], "max_tokens": 1}, 400, "invalid_request_error", "tools"),
    (
        {"thinking": {"type": "enabled", "budget_tokens": 1024}},
        400,
        "invalid_request_error",
        "thinking is not supported",
    ),
    ({"surprise": 1}, 400, "invalid_request_error", "unknown parameter: surprise"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        400,
        "invalid_request_error",
        "messages[0].content[0].type: invalid value 'image'",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "b", "input": {}}]}]},
        400,
        "invalid_request_error",
        "messages[0].content[0]: tool_use is no block of user messages",
    ),
    (
        {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "b", "input": {}}]}]},
        400,
        "invalid_request_error",
        "messages[0].content[0]: what the answer is to begin with can only be text",
    ),
    (
        {"messages": [{"role": "user", "content": "x" * 500}]},
        400,
        "invalid_request_error",
        "maximum context length is 64",
    ),
]


@pytest.mark.parametrize(("change", "status", "kind", "message"), BAD, ids=lambda value: str(value)[:40])
def test_refusals_are_worded_as_the_client_expects(
    toy_artifact: Artifact, tmp_path: Path, change: dict[str, Any], status: int, kind: str, message: str
) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:
            response = await ask(toy, **change)
            answer = response.json()
            assert (response.status_code, answer["type"], answer["error"]["type"]) == (status, "error", kind)
            assert message in answer["error"]["message"]
            assert answer["request_id"] == response.headers["request-id"]
            assert toy.session.num_runs == 0
            assert toy.ledger.get(answer["request_id"]) is None

    asyncio.run(scenario())


def test_refusals_outside_the_body_are_worded_so_too(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:
            old = await ask(toy, headers={"anthropic-version": "2023-01-01"})
            assert (old.status_code, old.json()["error"]["type"]) == (400, "invalid_request_error")
            large = await ask(toy, "x" * (MAX_BODY_BYTES + 1))
            assert (large.status_code, large.json()["error"]["type"]) == (413, "request_too_large")
            wrong = await toy.client.get("/v1/messages")
            assert (wrong.status_code, wrong.json()["type"]) == (405, "error")
            bad_id = await ask(toy, headers={"x-request-id": "a b"})
            assert (bad_id.status_code, bad_id.json()["type"]) == (400, "error")
            assert (await ask(toy, headers={"x-request-id": "mine"})).status_code == 200
            again = await ask(toy, headers={"x-request-id": "mine"})
            assert (again.status_code, again.json()["error"]["type"]) == (409, "conflict_error")
            await toy.function.drain(0)
            draining = await ask(toy)
            assert (draining.status_code, draining.json()["error"]["type"]) == (503, "overloaded_error")
            assert int(draining.headers["retry-after"]) >= 1

    asyncio.run(scenario())


def test_keys_are_taken_from_either_header(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        with KeyDesk(tmp_path / "usage.db") as desk:
            token = desk.create("app", "acme", None, Limits(), admin=False)[1]
        async with serving(toy_artifact, tmp_path) as toy:
            for headers in ({"x-api-key": token}, {"authorization": f"Bearer {token}"}):
                assert (await ask(toy, headers=headers)).status_code == 200
            refused = await ask(toy, headers={"x-api-key": "pl_wrong"})
            assert (refused.status_code, refused.json()["error"]["type"]) == (401, "authentication_error")
            assert refused.json()["request_id"] == refused.headers["request-id"]

    asyncio.run(scenario())


def test_a_run_that_fails_ends_the_stream_with_an_error_event(toy_artifact: Artifact, tmp_path: Path) -> None:
    runs = iter(range(100))

    def fail_on_third_run() -> None:
        if next(runs) == 2:
            raise RuntimeError("out of luck")

    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path, FakeSession(VOCAB_SIZE, before_run=fail_on_third_run)) as toy:
            response = await ask(toy, stream=True, ignore_eos=True)
            name, last = named_events(response.text)[-1]
            assert (name, last["error"]["type"]) == ("error", "api_error")
            assert last["request_id"] == response.headers["request-id"]
            assert "out of luck" not in response.text
            assert "message_stop" not in response.text
            record = toy.ledger.get(response.headers["x-request-id"])
            assert record is not None
            assert record.finish_reason is FinishReason.ERROR

    asyncio.run(scenario())


def test_a_stream_on_which_nothing_happens_is_pinged(
    toy_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PING_AFTER_S", "PING_BEFORE_FIRST_TOKEN_S"):
        monkeypatch.setattr(sse, name, 0.01)
    steps = threading.Semaphore(1)
    session = FakeSession(VOCAB_SIZE, before_run=steps.acquire)
    body = {"model": "toy", "max_tokens": 4, "messages": [{"role": "user", "content": "hi"}], "stream": True}
    sent: list[bytes] = []

    async def receive() -> dict[str, Any]:
        if not sent:
            return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Any) -> None:
        sent.append(message.get("body", b"start"))
        if sum(b"event: ping" in part for part in sent) >= 3:
            steps.release(100)

    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path, session) as toy:
            scope = {"type": "http", "method": "POST", "path": "/v1/messages", "query_string": b"", "headers": []}
            await toy.app({**scope, "raw_path": b""}, receive, send)
            names = [name for name, _ in named_events(b"".join(sent[1:]).decode())]
            assert names.count("ping") >= 3
            assert names[-1] == "message_stop"

    asyncio.run(asyncio.wait_for(scenario(), 300))
