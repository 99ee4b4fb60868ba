"""Tools over HTTP: what a scripted model writes becomes calls, and forced calls hold whatever the model wants."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from pilotlight.artifact import Artifact, open_artifact
from pilotlight.engine.fake import FakeSession
from scripted import HERMES, Scripted
from support import VOCAB_SIZE, Serving, events, serving, toy_tokenizer, write_artifact

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 8},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
TIME = {"type": "function", "function": {"name": "get_time"}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bern", "days": 2}}\n</tool_call>'


@pytest.fixture(scope="module")
def hermes(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return open_artifact(write_artifact(tmp_path_factory.mktemp("hermes") / "hermes", chat_template=HERMES))


@asynccontextmanager
async def scripted(artifact: Artifact, directory: Path, text: str) -> AsyncIterator[Serving]:
    async with serving(artifact, directory, Scripted(text)) as toy:
        yield toy


def message_of(answer: dict[str, Any]) -> dict[str, Any]:
    message: dict[str, Any] = answer["choices"][0]["message"]
    return message


def test_a_call_is_a_call_whole_and_streamed(hermes: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with scripted(hermes, tmp_path, f"Let me look. {CALL}") as toy:
            answer = (await toy.chat(tools=[WEATHER])).json()
            message = message_of(answer)
            assert message["content"] == "Let me look."
            (call,) = message["tool_calls"]
            assert call["type"] == "function"
            assert call["id"].startswith("call_")
            assert call["function"] == {"name": "get_weather", "arguments": '{"city": "Bern", "days": 2}'}
            assert answer["choices"][0]["finish_reason"] == "tool_calls"

            chunks = events((await toy.chat(tools=[WEATHER], stream=True)).text)
            pieces = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", [])]
            assert pieces[0]["function"] == {"name": "get_weather", "arguments": ""}
            assert {piece["index"] for piece in pieces} == {0}
            assert "".join(piece["function"]["arguments"] for piece in pieces) == call["function"]["arguments"]
            assert len(pieces) > 5, "the arguments come as they are written"
            text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
            assert text == "Let me look."
            assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"

    asyncio.run(scenario())


def test_without_tools_or_with_none_the_same_text_is_text(hermes: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with scripted(hermes, tmp_path, CALL) as toy:
            ways: list[dict[str, Any]] = [{}, {"tools": [WEATHER], "tool_choice": "none"}]
            for params in ways:
                answer = (await toy.chat(**params)).json()
                assert message_of(answer) == {"role": "assistant", "content": CALL, "refusal": None}
                assert answer["choices"][0]["finish_reason"] == "stop"

    asyncio.run(scenario())


def test_several_calls_have_indices_of_their_own(hermes: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with scripted(hermes, tmp_path, f"{CALL}\n{CALL}") as toy:
            message = message_of((await toy.chat(tools=[WEATHER])).json())
            assert message["content"] is None
            assert len({call["id"] for call in message["tool_calls"]}) == 2
            chunks = events((await toy.chat(tools=[WEATHER], stream=True)).text)
            pieces = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", [])]
            assert [piece["index"] for piece in pieces if "id" in piece] == [0, 1]

    asyncio.run(scenario())


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_forced_call_is_valid_whatever_the_model_wants(hermes: Artifact, tmp_path: Path, choice: object) -> None:
    async def scenario() -> None:
        async with scripted(hermes, tmp_path, "I would rather talk about the sea.") as toy:
            for seed in range(4):
                params: dict[str, Any] = {
                    "temperature": 2,
                    "seed": seed,
                    "max_tokens": 1500,
                    "parallel_tool_calls": False,
                }
                answer = (await toy.chat(tools=[WEATHER, TIME], tool_choice=choice, **params)).json()
                assert answer["choices"][0]["finish_reason"] == "tool_calls"
                (call,) = message_of(answer)["tool_calls"]
                arguments = json.loads(call["function"]["arguments"])
                if call["function"]["name"] == "get_weather":
                    jsonschema.validate(arguments, WEATHER["function"]["parameters"])  # type: ignore[index]
                else:
                    assert (choice, call["function"]["name"], arguments) == ("required", "get_time", {})

    asyncio.run(scenario())


def test_a_model_without_words_for_tools_is_told_of_them(toy_artifact: Artifact, tmp_path: Path) -> None:
    call = '{"name": "get_weather", "arguments": {"city": "Bern", "days": 2}}'

    async def scenario() -> None:
        async with scripted(toy_artifact, tmp_path, call) as toy:
            with_tools = (await toy.chat(tools=[WEATHER])).json()
            assert message_of(with_tools)["tool_calls"][0]["function"]["name"] == "get_weather"
            without = (await toy.chat()).json()
            assert message_of(without)["content"] == call
            told = with_tools["usage"]["prompt_tokens"] - without["usage"]["prompt_tokens"]
            assert told > len("Tells the weather.")

    asyncio.run(scenario())


def test_json_or_a_call(hermes: Artifact, tmp_path: Path) -> None:
    wanted = {
        "type": "json_schema",
        "json_schema": {
            "schema": {
                "type": "object",
                "properties": {"a": {"const": 1}},
                "required": ["a"],
                "additionalProperties": False,
            }
        },
    }

    async def scenario() -> None:
        async with scripted(hermes, tmp_path, CALL) as toy:
            message = message_of((await toy.chat(tools=[WEATHER], response_format=wanted)).json())
            assert message["tool_calls"][0]["function"]["name"] == "get_weather"
        (tmp_path / "b").mkdir()
        async with scripted(hermes, tmp_path / "b", '{"b": 2}') as toy:
            message = message_of((await toy.chat(tools=[WEATHER], response_format=wanted)).json())
            assert (message["content"], message.get("tool_calls")) == ('{"a": 1}', None)
            regex = {"type": "regex", "regex": "a"}
            refused = await toy.chat(tools=[WEATHER], response_format=regex)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "response_format")

    asyncio.run(scenario())


def test_a_call_that_was_cut_off_is_a_length(hermes: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with scripted(hermes, tmp_path, CALL) as toy:
            choice = (await toy.chat(tools=[WEATHER], max_tokens=60)).json()["choices"][0]
            assert choice["finish_reason"] == "length"
            arguments = choice["message"]["tool_calls"][0]["function"]["arguments"]
            assert '{"city": "Bern", "days": 2}'.startswith(arguments)
            assert arguments

    asyncio.run(scenario())


def test_earlier_calls_come_back_as_objects_for_the_template(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}:{% for c in m.tool_calls or [] %}"
        "{{ c.function.name }}/{{ c.function.arguments is mapping }}/{{ c.function.arguments | tojson }}{% endfor %}"
        "{{ m.content }}{{ m.tool_call_id }}\n{% endfor %}"
    )
    artifact = open_artifact(write_artifact(tmp_path / "a", chat_template=template))
    history = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": {"b": 1}}'}},
            {"id": "c2", "type": "function", "function": {"name": "g", "arguments": '{"cut'}},
        ]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]  # fmt: skip

    async def scenario() -> None:
        async with serving(artifact, tmp_path, FakeSession(VOCAB_SIZE, max_context_tokens=512)) as toy:
            body = {"model": "toy", "messages": history, "max_tokens": 1}
            assert (await toy.client.post("/v1/chat/completions", json=body)).status_code == 200
            prompt = toy_tokenizer().decode(toy.session.slots[0])
            assert prompt.startswith('user:hi\nassistant:f/True/{"a": {"b": 1}}g/False/"{\\"cut"\ntool:sunnyc1\n')

    asyncio.run(scenario())


def test_what_the_grammar_engine_refuses_of_a_tool_has_its_place_and_no_grammar(
    hermes: Artifact, tmp_path: Path
) -> None:
    function = {"name": "f", "parameters": {"properties": {"a": {"items": {"$ref": "#/nowhere"}}}}}

    async def scenario() -> None:
        async with serving(hermes, tmp_path) as toy:
            tools = [TIME, {"type": "function", "function": function}]
            error = (await toy.chat(tools=tools, tool_choice="required")).json()["error"]
            place = "tools[1].function.parameters.properties.a.items"
            assert (error["param"], error["code"]) == (place, "unsupported_schema")
            assert error["message"] == f"{place}: Pointer '/nowhere' does not exist"

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools[0].function.name"),
        ({"tools": [TIME, TIME]}, "tools[1].function.name"),
        ({"tools": [TIME], "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [TIME], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]}, "messages[0].tool_calls[0].function"),
        ({"functions": [{"name": "f"}]}, "functions"),
    ],
)
def test_what_is_wrong_is_refused_by_name(hermes: Artifact, tmp_path: Path, params: dict[str, Any], param: str) -> None:
    async def scenario() -> None:
        async with serving(hermes, tmp_path) as toy:
            body = {"model": "toy", "messages": [{"role": "user", "content": "hi"}], **params}
            response = await toy.client.post("/v1/chat/completions", json=body)
            assert (response.status_code, response.json()["error"]["param"]) == (400, param)

    asyncio.run(scenario())
