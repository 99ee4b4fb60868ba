"""Bad input: the right status, the OpenAI envelope, the name of the parameter, and nothing left behind."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest

from pilotlight.api.wire import MAX_DEPTH
from pilotlight.artifact import Artifact
from pilotlight.engine.fake import FakeSession
from support import MAX_BODY_BYTES, VOCAB_SIZE, serving

USER = {"role": "user", "content": "hi"}

BAD_CHATS: list[tuple[dict[str, Any], int, str | None, str]] = [
    ({"repetition_penalty": 5e-324}, 400, "repetition_penalty", "0.01"),
    ({"model": "nobody"}, 404, "model", "no function 'nobody' here; available: toy"),
    ({"model": None}, 400, "model", "expected str"),
    ({"model": 7}, 400, "model", "expected string, got integer"),
    ({"messages": None}, 400, "messages", "expected array"),
    ({"messages": []}, 400, "messages", "length >= 1"),
    ({"messages": "hi"}, 400, "messages", "expected array, got string"),
    ({"messages": [{"role": "user"}]}, 400, "messages[0].content", "is required"),
    ({"messages": [{"role": "king", "content": "hi"}]}, 400, "messages[0].role", "invalid enum value"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content[0]", "image_url"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        400,
        "messages[0].content[0].text",
        "expected str",
    ),
    ({"messages": [{"role": "user", "content": "x" * 500}]}, 400, "messages", "maximum context length is 64"),
    ({"max_tokens": -1}, 400, "max_tokens", ">= 1"),
    ({"max_tokens": 0}, 400, "max_tokens", ">= 1"),
    ({"max_tokens": "many"}, 400, "max_tokens", "expected int"),
    ({"max_completion_tokens": -1}, 400, "max_completion_tokens", ">= 1"),
    ({"temperature": 3}, 400, "temperature", "<= 2"),
    ({"temperature": "hot"}, 400, "temperature", "expected number | null, got string"),
    ({"top_p": 0}, 400, "top_p", "> 0"),
    ({"logit_bias": {"9999": 1}}, 400, "logit_bias", "not in the vocabulary"),
    ({"logit_bias": {"a": 1}}, 400, "logit_bias", "logit_bias: its keys: expected integer, got string"),
    ({"logit_bias": {"1": 1000}}, 400, "logit_bias", "<= 100"),
    ({"stop": ""}, 400, "stop", "length >= 1"),
    ({"stop": ["a", 1]}, 400, "stop[1]", "expected str"),
    ({"stream": "yes"}, 400, "stream", "expected bool"),
    ({"seed": 2**70}, 400, "seed", ""),
    ({"n": 17}, 400, "n", "<= 16"),
    ({"audio": {}}, 400, "audio", "not supported"),
    ({"tools": [{"type": "function"}]}, 400, "tools[0].function", "is required"),
    ({"response_format": {"type": "json"}}, 400, "response_format.type", "invalid value"),
    ({"temprature": 1}, 400, "temprature", "unknown parameter"),
    ({"stream_options": {"include_usage": 1}}, 400, "stream_options.include_usage", "expected bool"),
    ({"stream_options": {"int": 1}}, 400, "stream_options.int", "is not a known parameter"),
    ({"messages": [{"role": "king"}]}, 400, "messages[0].role", "one of assistant, developer, system, tool, user"),
    ({"tools": [{"type": "retrieval"}]}, 400, "tools[0].type", "expected function"),
    ({"response_format": {"type": "xml"}}, 400, "response_format.type", "one of grammar, json_object, json_schema"),
]


@pytest.mark.parametrize(("change", "status", "param", "message"), BAD_CHATS, ids=lambda value: str(value)[:40])
def test_bad_chat_requests(
    toy_artifact: Artifact, tmp_path: Path, change: dict[str, Any], status: int, param: str, message: str
) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:
            response = await toy.chat(**{"messages": [USER], **change})
            error = response.json()["error"]
            assert (response.status_code, error["param"]) == (status, param)
            assert message in error["message"]
            assert error["type"] == "invalid_request_error"
            assert error["code"]
            assert response.headers["x-request-id"]
            assert toy.session.num_runs == 0
            assert toy.ledger.get(response.headers["x-request-id"]) is None

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "empty"),
        ([], "length >= 1"),
        ([[]], "empty"),
        ([-1], "between 0 and 257"),
        ([258], "between 0 and 257"),
        (["a", "b"], "one prompt"),
        (None, "expected"),
        ({"a": 1}, "expected"),
        ([1.5], "expected"),
        (list(range(64)), "maximum context length is 64"),
    ],
    ids=str,
)
def test_bad_prompts(toy_artifact: Artifact, tmp_path: Path, prompt: object, message: str) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:
            response = await toy.complete(prompt)
            assert response.status_code == 400
            assert response.json()["error"]["param"].startswith("prompt")
            assert message in response.json()["error"]["message"]

    asyncio.run(scenario())


def test_bodies_that_are_not_json_objects(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:
            for body in (b"", b"{", b"nonsense", b"[]", b"7", b"\xff\xfe", b'{"a":' * 2000, b'{"model": "\xff"}'):
                response = await toy.client.post("/v1/chat/completions", content=body)
                assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json"), body[:20]

    asyncio.run(scenario())


def test_a_body_that_is_packed_is_refused_by_the_name_of_its_header(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:
            response = await toy.chat(headers={"content-encoding": "gzip"})
            assert (response.status_code, response.json()["error"]["param"]) == (400, "content-encoding")
            assert (await toy.chat(headers={"content-encoding": "identity"}, max_tokens=1)).status_code == 200

    asyncio.run(scenario())


def nested(depth: int, inner: str, outer: str, value: str = "{}") -> str:
    return inner * depth + value + outer * depth


DEEP_PLACES = {
    "ignored": '"metadata": %s',
    "format": '"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": %s}}',
    "default": '"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"default": %s}}}',
    "enum": '"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [%s]}}}',
    "tool": '"tools": [{"type": "function", "function": {"name": "f", "parameters": %s}}], "tool_choice": "required"',
    "call": '"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": %s}}]}]',
}


@pytest.mark.parametrize("place", DEEP_PLACES)
@pytest.mark.parametrize("kind", [('{"items": ', "}"), ('{"not": ', "}"), ('{"properties": {"a": ', "}}"), ("[", "]")])
def test_no_nesting_is_too_deep_for_an_answer(
    toy_artifact: Artifact, tmp_path: Path, place: str, kind: tuple[str, str]
) -> None:
    """Whatever reads a body recursively would end in an error of ours."""

    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:
            for depth in (60, 90, 180, 220, 800):
                given = DEEP_PLACES[place] % nested(depth, *kind)
                messages = "" if place == "call" else ', "messages": [{"role": "user", "content": "hi"}]'
                body = f'{{"model": "toy", "max_tokens": 1, {given}{messages}}}'
                response = await toy.client.post("/v1/chat/completions", content=body)
                assert response.status_code in (200, 400), (depth, response.text)
                if depth * (1 + kind[0].count("a")) > MAX_DEPTH:
                    assert response.status_code == 400
                    assert re.search("nested deeper than|not valid JSON", response.text)

    asyncio.run(scenario())


def test_arguments_of_a_call_may_be_no_json_that_can_be_read(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path, FakeSession(VOCAB_SIZE, max_context_tokens=90_000)) as toy:
            for arguments in ("[" * 50_000, '{"a":' * 5_000, "1" * 5_000, '{"a": NaN}', "{"):
                call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}}
                messages = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}, USER]
                response = await toy.chat(messages=messages, max_tokens=1)
                assert response.status_code == 200, response.text

    asyncio.run(scenario())


def test_a_large_body_is_refused_before_it_is_all_read(toy_artifact: Artifact, tmp_path: Path) -> None:
    read = 0

    async def endless() -> Any:
        nonlocal read
        for _ in range(1000):
            read += 10_000
            yield b" " * 10_000

    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:
            response = await toy.client.post("/v1/chat/completions", content=endless())
            assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
            assert read <= MAX_BODY_BYTES + 20_000

    asyncio.run(scenario())


def test_harmless_parameters_are_accepted(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:
            response = await toy.chat(
                max_tokens=2, user="u", metadata={"a": "b"}, store=False, service_tier="auto", n=1, logprobs=False,
                tools=[], tool_choice="auto", response_format={"type": "text"}, top_logprobs=None,
                stream=None, ignore_eos=None, temperature=None,
            )  # fmt: skip
            assert response.status_code == 200, response.text

    asyncio.run(scenario())


def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_defect(
    toy_artifact: Artifact, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sent = iter([{"type": "http.request", "body": b'{"model":', "more_body": True}, {"type": "http.disconnect"}])

    async def receive() -> Any:
        return next(sent)

    async def send(message: Any) -> None:
        pass

    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:
            path = "/v1/chat/completions"
            scope = {
                "type": "http",
                "method": "POST",
                "path": path,
                "raw_path": b"",
                "query_string": b"",
                "headers": [],
            }
            await toy.app(scope, receive, send)
            assert toy.function.num_running == 0
        assert not caplog.records

    asyncio.run(scenario())


def test_nobody_is_sent_elsewhere(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:
            for path in ("/v1/chat/completions/", "/chat/completions", "/v1/v1/messages"):
                response = await toy.client.post(path, json={})
                assert response.status_code == 404
                assert "/docs lists the endpoints" in response.text

    asyncio.run(scenario())


def test_unknown_routes_and_methods(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:
            missing = await toy.client.get("/v2/nothing")
            assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
            wrong = await toy.client.get("/v1/chat/completions")
            assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
            assert wrong.headers["allow"] == "POST"
            unknown = await toy.client.get("/v1/usage/never")
            assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "request_not_found")
            model = await toy.client.get("/v1/models/other")
            assert (model.status_code, model.json()["error"]["code"]) == (404, "model_not_found")

    asyncio.run(scenario())


def test_request_ids(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:
            first = await toy.chat(headers={"x-request-id": "order-1"}, max_tokens=1)
            assert first.headers["x-request-id"] == "order-1"
            assert first.json()["id"] == "order-1"
            again = await toy.chat(headers={"x-request-id": "order-1"}, max_tokens=1)
            assert (again.status_code, again.json()["error"]["code"]) == (409, "request_id_in_use")
            assert again.headers["x-should-retry"] == "false"
            bad = await toy.chat(headers={"x-request-id": "a b"}, max_tokens=1)
            assert (bad.status_code, bad.json()["error"]["param"]) == (400, "x-request-id")
            both = await asyncio.gather(*(toy.chat(headers={"x-request-id": "twin"}, max_tokens=2) for _ in range(2)))
            assert sorted(response.status_code for response in both) == [200, 409]

    asyncio.run(scenario())


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_defect_while_generating_ends_the_answer(
    toy_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:

            def break_down(*usage: object) -> None:
                raise KeyError("secret")

            monkeypatch.setattr("pilotlight.function.run.final_record", break_down)
            response = await asyncio.wait_for(toy.chat(max_tokens=2, stream=stream), 300)
            assert "an internal error occurred" in response.text
            assert "secret" not in response.text
            assert "[DONE]" not in response.text
            assert toy.function.num_running == 0

    asyncio.run(scenario())


def test_an_unexpected_failure_shows_no_internals(
    toy_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:

            async def break_down(request: object) -> None:
                raise KeyError("secret")

            monkeypatch.setattr(toy.function, "invoke", break_down)
            response = await toy.chat()
            assert response.status_code == 500
            assert "secret" not in response.text
            assert response.json()["error"]["message"] == "an internal error occurred"

    asyncio.run(scenario())
