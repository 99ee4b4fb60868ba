"""Tools and structured output in the words of the Responses and the Messages API."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from pilotlight.artifact import Artifact, open_artifact
from scripted import HERMES, Scripted
from support import Serving, named_events, serving, write_artifact

PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
ARGUMENTS = '{"city": "Bern", "days": 2}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
OPENAI_TOOL = {"type": "function", "name": "get_weather", "description": "Tells.", "parameters": PARAMETERS}
ANTHROPIC_TOOL = {"name": "get_weather", "description": "Tells.", "input_schema": PARAMETERS}
WANTED = {
    "type": "object",
    "properties": {"a": {"const": 1}},
    "required": ["a"],
    "additionalProperties": False,
}
SEA = "I would rather talk about the sea."


@pytest.fixture(scope="module")
def hermes(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return open_artifact(write_artifact(tmp_path_factory.mktemp("hermes") / "hermes", chat_template=HERMES))


async def respond(toy: Serving, given: Any = "hi", **params: Any) -> httpx.Response:
    return await toy.client.post("/v1/responses", json={"model": "toy", "input": given, **params})


async def message(toy: Serving, messages: Any = None, **params: Any) -> httpx.Response:
    messages = messages or [{"role": "user", "content": "hi"}]
    body = {"model": "toy", "max_tokens": 1500, "messages": messages, **params}
    return await toy.client.post("/v1/messages", json=body)


def test_a_response_calls_whole_and_streamed(hermes: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(hermes, tmp_path, Scripted(f"Let me look. {CALL}")) as toy:
            answer = (await respond(toy, tools=[OPENAI_TOOL])).json()
            assert answer["status"] == "completed"
            said, call = answer["output"]
            assert said["content"][0]["text"] == "Let me look."
            assert (call["type"], call["status"], call["name"]) == ("function_call", "completed", "get_weather")
            assert call["arguments"] == ARGUMENTS
            assert (answer["tools"][0]["name"], answer["tool_choice"]) == ("get_weather", "auto")

            events = named_events((await respond(toy, tools=[OPENAI_TOOL], stream=True)).text)
            assert [event["sequence_number"] for _, event in events] == list(range(len(events)))
            names = [name for name, _ in events]
            of_call = [event for name, event in events if name == "response.function_call_arguments.delta"]
            assert len(of_call) > 5, "the arguments come as they are written"
            assert "".join(event["delta"] for event in of_call) == ARGUMENTS
            assert names[-3 - len(of_call) - 1 :] == [
                "response.output_item.added",
                *["response.function_call_arguments.delta"] * len(of_call),
                "response.function_call_arguments.done",
                "response.output_item.done",
                "response.completed",
            ]
            assert {event["output_index"] for event in of_call} == {1}
            assert [item["type"] for item in events[-1][1]["response"]["output"]] == ["message", "function_call"]

    asyncio.run(scenario())


def test_a_conversation_goes_on_with_what_a_call_returned(hermes: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(hermes, tmp_path, Scripted(CALL)) as toy:
            first = (await respond(toy, tools=[OPENAI_TOOL])).json()
            (call,) = first["output"]
            returned = {"type": "function_call_output", "call_id": call["call_id"], "output": "sunny"}
            second = await respond(toy, [returned], previous_response_id=first["id"], tools=[OPENAI_TOOL])
            assert second.status_code == 200, second.text
            longer = second.json()["usage"]["input_tokens"] - first["usage"]["input_tokens"]
            assert longer >= len("sunny")

    asyncio.run(scenario())


def test_a_message_uses_tools_whole_and_streamed(hermes: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(hermes, tmp_path, Scripted(f"Let me look. {CALL}")) as toy:
            answer = (await message(toy, tools=[ANTHROPIC_TOOL])).json()
            said, use = answer["content"]
            assert said == {"type": "text", "text": "Let me look."}
            assert (use["type"], use["name"], use["input"]) == ("tool_use", "get_weather", json.loads(ARGUMENTS))
            assert answer["stop_reason"] == "tool_use"

            streamed = await message(toy, tools=[ANTHROPIC_TOOL], stream=True)
            events = [event for _, event in named_events(streamed.text)]
            started = [event["content_block"]["type"] for event in events if event["type"] == "content_block_start"]
            assert started == ["text", "tool_use"]
            pieces = [event for event in events if event.get("delta", {}).get("type") == "input_json_delta"]
            assert "".join(event["delta"]["partial_json"] for event in pieces) == ARGUMENTS
            assert {event["index"] for event in pieces} == {1}
            assert [event["index"] for event in events if event["type"] == "content_block_stop"] == [0, 1]
            assert events[-2]["delta"]["stop_reason"] == "tool_use"

            result = {"type": "tool_result", "tool_use_id": use["id"], "content": "sunny"}
            turns = [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": answer["content"]},
                {"role": "user", "content": [result]},
            ]
            assert (await message(toy, turns, tools=[ANTHROPIC_TOOL])).status_code == 200

    asyncio.run(scenario())


def test_forced_calls_are_valid_whatever_the_model_wants(hermes: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(hermes, tmp_path, Scripted(SEA)) as toy:
            for openai_choice, anthropic_choice in (
                ("required", {"type": "any", "disable_parallel_tool_use": True}),
                ({"type": "function", "name": "get_weather"}, {"type": "tool", "name": "get_weather"}),
            ):
                params = {"tools": [OPENAI_TOOL], "parallel_tool_calls": False, "tool_choice": openai_choice}
                (call,) = (await respond(toy, **params)).json()["output"]
                jsonschema.validate(json.loads(call["arguments"]), PARAMETERS)
                answer = (await message(toy, tools=[ANTHROPIC_TOOL], tool_choice=anthropic_choice)).json()
                (use,) = answer["content"]
                jsonschema.validate(use["input"], PARAMETERS)
                assert answer["stop_reason"] == "tool_use"
            counted = await toy.client.post(
                "/v1/messages/count_tokens",
                json={"model": "toy", "messages": [{"role": "user", "content": "hi"}], "tools": [ANTHROPIC_TOOL]},
            )
            assert counted.json()["input_tokens"] == answer["usage"]["input_tokens"]

    asyncio.run(scenario())


def test_structured_text_is_valid_whatever_the_model_wants(hermes: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(hermes, tmp_path, Scripted(SEA)) as toy:
            named = {"type": "json_schema", "name": "answer", "schema": WANTED, "strict": True}
            answer = (await respond(toy, text={"format": named})).json()
            assert json.loads(answer["output"][0]["content"][0]["text"]) == {"a": 1}
            assert answer["text"]["format"] == named
            written = (await message(toy, output_config={"format": {"type": "json_schema", "schema": WANTED}})).json()
            assert json.loads(written["content"][0]["text"]) == {"a": 1}

    asyncio.run(scenario())


def test_what_is_wrong_is_refused_by_name(hermes: Artifact, tmp_path: Path) -> None:
    impossible = {"type": "object", "properties": {"a": {"$ref": "http://elsewhere/schema"}}}
    responses: list[tuple[dict[str, Any], str]] = [
        ({"tools": [OPENAI_TOOL, OPENAI_TOOL]}, "tools[1].name"),
        ({"tools": [OPENAI_TOOL], "tool_choice": {"type": "function", "name": "other"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "file_search"}]}, "tools[0].type"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": impossible}}}, "text.format"),
    ]
    messages: list[tuple[dict[str, Any], str]] = [
        ({"tools": [ANTHROPIC_TOOL, ANTHROPIC_TOOL]}, "tools[1].name"),
        ({"tools": [ANTHROPIC_TOOL], "tool_choice": {"type": "tool", "name": "other"}}, "tool_choice"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [{"type": "web_search_20260209", "name": "web_search"}]}, "tools[0]"),
        ({"output_config": {"format": {"type": "json_schema", "schema": impossible}}}, "output_config.format"),
    ]

    async def scenario() -> None:
        async with serving(hermes, tmp_path) as toy:
            for params, param in responses:
                refused = await respond(toy, **params)
                assert refused.status_code == 400, params
                assert refused.json()["error"]["param"].startswith(param)
            for params, param in messages:
                refused = await message(toy, **params)
                assert refused.status_code == 400, params
                assert refused.json()["error"]["message"].startswith(param)

    asyncio.run(scenario())
