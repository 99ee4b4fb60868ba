"""``response_format`` over HTTP: valid answers from a model that knows nothing, and refusals that name the place."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from pilotlight.artifact import Artifact
from pilotlight.engine.fake import FakeSession
from support import VOCAB_SIZE, events, serving

RECIPE = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 12},
        "minutes": {"type": "integer", "minimum": 1, "maximum": 600},
        "tags": {"type": "array", "items": {"enum": ["sweet", "sour"]}, "maxItems": 3},
        "author": {"$ref": "#/$defs/person"},
    },
    "required": ["title", "minutes", "tags", "author"],
    "additionalProperties": False,
    "$defs": {
        "person": {
            "type": ["object", "null"],
            "properties": {"id": {"type": "boolean"}},
            "required": ["id"],
            "additionalProperties": False,
        }
    },
}


def session() -> FakeSession:
    return FakeSession(VOCAB_SIZE, max_context_tokens=1024)


def json_schema(schema: object) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}


def test_answers_are_valid_under_the_schema(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path, session()) as toy:
            for seed in range(8):
                params: dict[str, Any] = {"response_format": json_schema(RECIPE), "temperature": 2, "seed": seed}
                choice = (await toy.chat(**params)).json()["choices"][0]
                assert choice["finish_reason"] == "stop"
                jsonschema.validate(json.loads(choice["message"]["content"]), RECIPE)
                chunks = events((await toy.chat(stream=True, **params)).text)
                text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
                assert text == choice["message"]["content"]

    asyncio.run(scenario())


def test_an_object_is_an_object(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path, session()) as toy:
            params: dict[str, Any] = {"response_format": {"type": "json_object"}, "temperature": 2, "n": 4, "seed": 1}
            for choice in (await toy.chat(**params)).json()["choices"]:
                if choice["finish_reason"] == "stop":
                    assert isinstance(json.loads(choice["message"]["content"]), dict)
                assert choice["message"]["content"].startswith("{")

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("wanted", "pattern"),
    [
        ({"type": "regex", "regex": r"[a-c]{3}/[0-9]\n\/"}, r"[a-c]{3}/[0-9]\n/"),
        ({"type": "grammar", "syntax": "regex", "definition": "a|bb"}, "a|bb"),
        ({"type": "grammar", "definition": 'start: ("a" | "b")~3 "!"'}, "[ab]{3}!"),
        (
            {"type": "grammar", "syntax": "lark", "definition": 'start: sum\nsum: N ("+" N)~2\nN: /[0-9]/'},
            r"\d\+\d\+\d",
        ),
    ],
)
def test_regular_expressions_and_grammars(
    toy_artifact: Artifact, tmp_path: Path, wanted: dict[str, Any], pattern: str
) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path, session()) as toy:
            for response in (
                await toy.chat(response_format=wanted, temperature=2, max_tokens=30),
                await toy.complete("hello", response_format=wanted, temperature=2, max_tokens=30),
            ):
                choice = response.json()["choices"][0]
                text = choice["message"]["content"] if "message" in choice else choice["text"]
                assert re.fullmatch(pattern, text)
                assert choice["finish_reason"] == "stop"

    asyncio.run(scenario())


def test_a_limit_in_the_middle_of_an_object_is_a_length(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path, session()) as toy:
            answer = (await toy.chat(response_format=json_schema(RECIPE), max_tokens=9)).json()
            assert answer["choices"][0]["finish_reason"] == "length"
            assert answer["usage"]["completion_tokens"] == 9
            assert answer["choices"][0]["message"]["content"] == '{"title":'[:9]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("wanted", "param", "message"),
    [
        ({"type": "yaml"}, "response_format", "invalid value 'yaml'"),
        ({"type": "json_schema"}, "response_format.json_schema", "is required"),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, "response_format.json_schema.schema", "is required"),
        (json_schema({"type": "thing"}), "response_format.json_schema.schema.type", "no type 'thing'"),
        (
            json_schema({"properties": {"tags": {"type": "array", "uniqueItems": True}}}),
            "response_format.json_schema.schema.properties.tags.uniqueItems",
            "cannot be guaranteed",
        ),
        (
            json_schema({"$defs": {"a": {"items": {"multipleOf": 0}}}, "properties": {"b": {"$ref": "#/$defs/a"}}}),
            "response_format.json_schema.schema.$defs.a.items",
            "invalid multiple of",
        ),
        (
            json_schema({"properties": {"b": {"anyOf": [{"type": "null"}, {"pattern": "a("}]}}}),
            "response_format.json_schema.schema.properties.b.anyOf[1]",
            "unclosed group",
        ),
        (
            json_schema({"properties": {"a": {"$ref": "#/$defs/nobody"}}}),
            "response_format.json_schema.schema.properties.a",
            "does not exist",
        ),
        ({"type": "regex", "regex": "("}, "response_format", 'response_format: invalid regex "(": unclosed group'),
        ({"type": "grammar", "definition": "start: a\n"}, "response_format", 'at 1(8): unknown name: "a"'),
        ({"type": "regex", "regex": "(?=a)b"}, "response_format", "look-around"),
        ({"type": "grammar", "definition": "nothing"}, "response_format", "expected token"),
        ({"type": "grammar", "syntax": "ebnf", "definition": "a"}, "response_format.syntax", "ebnf"),
    ],
)
def test_what_cannot_be_held_is_refused_before_anything_runs(
    toy_artifact: Artifact, tmp_path: Path, wanted: object, param: str, message: str
) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:
            body = {"model": "toy", "messages": [{"role": "user", "content": "hi"}], "response_format": wanted}
            response = await toy.client.post("/v1/chat/completions", json=body)
            error = response.json()["error"]
            assert response.status_code == 400
            assert error["param"].startswith(param)
            assert message in error["message"].lower()
            assert toy.session.num_runs == 0

    asyncio.run(scenario())


def test_ignoring_the_end_contradicts_a_grammar(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:
            response = await toy.chat(response_format={"type": "json_object"}, ignore_eos=True)
            assert (response.status_code, response.json()["error"]["param"]) == (400, "ignore_eos")

    asyncio.run(scenario())
