"""The description of the API: valid, complete, and true of what is answered."""

from __future__ import annotations

import asyncio
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate
from starlette.applications import Starlette
from starlette.routing import Route

from pilotlight.api import openai_types
from pilotlight.api.openapi import PATH_PARAMETER
from pilotlight.artifact import Artifact
from pilotlight.engine.fake import FakeSession
from support import VOCAB_SIZE, Serving, events, named_events, serving

USER = [{"role": "user", "content": "hi"}]
Document = dict[str, Any]


async def described(toy: Serving) -> Document:
    document: Document = (await toy.client.get("/openapi.json")).json()
    return document


def schema_of(document: Document, method: str, path: str, status: int = 200) -> Document:
    """Return the schema of an endpoint's JSON answer, with everything it refers to."""
    content = document["paths"][path][method]["responses"][str(status)]["content"]
    return {**content["application/json"]["schema"], "components": document["components"]}


def check(document: Document, method: str, path: str, response: httpx.Response) -> None:
    Draft202012Validator(schema_of(document, method, path, response.status_code)).validate(response.json())


def test_the_document_is_valid_and_has_every_route(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:
            document = await described(toy)
            validate(document)
            assert isinstance(toy.app, Starlette)
            routes = [route for route in toy.app.routes if isinstance(route, Route)]
            served = {
                (method.lower(), PATH_PARAMETER.sub(r"{\1}", route.path))
                for route in routes
                for method in (route.methods or set()) - {"HEAD"}
            }
            assert served == {(method, path) for path, methods in document["paths"].items() for method in methods}
            assert not [name for name in document["components"]["schemas"] if "." in name]

    asyncio.run(scenario())


def test_answers_are_as_described(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:
            document = await described(toy)

            async def ask(path: str, **body: Any) -> httpx.Response:
                response = await toy.client.post(path, json={"model": "toy", **body})
                check(document, "post", path, response)
                return response

            chat = await ask("/v1/chat/completions", messages=USER, max_tokens=4, logprobs=True, top_logprobs=2, n=2)
            await ask("/v1/chat/completions", messages=USER, max_tokens=4, return_token_ids=True)
            await ask("/v1/completions", prompt="a", logprobs=2)
            answer = await ask("/v1/responses", input="hi", max_output_tokens=4)
            await ask("/v1/messages", messages=USER, max_tokens=4)
            await ask("/v1/messages/count_tokens", messages=USER)
            for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"):
                assert (await ask(path)).status_code == 400
                assert (await ask(path, messages=USER, prompt="a", input="a", max_tokens=1)).status_code == 400
            response_id, request_id = answer.json()["id"], chat.json()["id"]
            for path, values in (
                ("/v1/models", {}),
                ("/v1/models/{name}", {"name": "toy"}),
                ("/v1/models/{name}", {"name": "other"}),
                ("/v1/usage/{request_id}", {"request_id": request_id}),
                ("/v1/usage/{request_id}", {"request_id": "other"}),
                ("/v1/responses/{response_id}", {"response_id": response_id}),
                ("/v1/responses/{response_id}", {"response_id": "other"}),
                ("/v1/responses/{response_id}/input_items", {"response_id": response_id}),
                ("/livez", {}),
                ("/readyz", {}),
                ("/openapi.json", {}),
            ):
                check(document, "get", path, await toy.client.get(path.format(**values)))
            path = "/v1/responses/{response_id}"
            check(document, "delete", path, await toy.client.delete(f"/v1/responses/{response_id}"))

    asyncio.run(scenario())


def test_stream_events_are_as_described(toy_artifact: Artifact, tmp_path: Path) -> None:
    streams: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {"messages": USER, "max_tokens": 4, "stream_options": {"include_usage": True}},
        "/v1/completions": {"prompt": "a", "logprobs": 1, "max_tokens": 4},
        "/v1/responses": {"input": "hi", "max_output_tokens": 4},
        "/v1/messages": {"messages": USER, "max_tokens": 4},
    }

    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:
            document = await described(toy)
            for path, body in streams.items():
                content = document["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]
                data = content["itemSchema"]["properties"]["data"]
                event = {**data.get("else", data)["contentSchema"], "components": document["components"]}
                text = (await toy.client.post(path, json={"model": "toy", "stream": True, **body})).text
                found = events(text) if "[DONE]" in text else [event for _, event in named_events(text)]
                assert len(found) > 4
                for each in found:
                    Draft202012Validator(event).validate(each)
                assert ("[DONE]" in text) == (data.get("if") == {"const": "[DONE]"})

    asyncio.run(scenario())


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_the_error_that_ends_a_stream_is_described(toy_artifact: Artifact, tmp_path: Path, path: str) -> None:
    def before_run() -> None:
        if session.num_runs > 2:
            raise RuntimeError("no such kernel")

    session = FakeSession(VOCAB_SIZE, before_run=before_run)

    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path, session) as toy:
            document = await described(toy)
            content = document["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]
            schema = content["itemSchema"]["properties"]["data"]["else"]["contentSchema"]
            given: dict[str, Any] = {"messages": USER} if "chat" in path else {"prompt": "a"}
            body = {"model": "toy", "stream": True, "max_tokens": 9, "ignore_eos": True, **given}
            found = events((await toy.client.post(path, json=body)).text)
            assert found[-1]["error"]["code"] == "engine_error"
            for each in found:
                Draft202012Validator({**schema, "components": document["components"]}).validate(each)

    asyncio.run(scenario())


def test_completions_say_nothing_that_is_not_described(toy_artifact: Artifact, tmp_path: Path) -> None:
    """Response schemas are open, so fields without a description would pass the tests above."""

    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:
            params: dict[str, Any] = {"max_tokens": 3, "return_token_ids": True}
            chat = (await toy.chat(logprobs=True, top_logprobs=1, **params)).json()
            text = (await toy.complete("a", logprobs=1, **params)).json()
            for given, kind in ((chat, openai_types.ChatCompletion), (text, openai_types.TextCompletion)):
                assert msgspec.to_builtins(msgspec.convert(given, kind)) == given

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("path", "body", "accepted"),
    [
        ("/v1/chat/completions", {"messages": USER, "user": 7}, True),
        ("/v1/chat/completions", {"messages": USER, "temperature": None}, True),
        ("/v1/chat/completions", {"messages": USER, "audio": {}}, False),
        ("/v1/chat/completions", {"messages": USER, "surprise": 1}, False),
        ("/v1/chat/completions", {"messages": []}, False),
        ("/v1/messages", {"messages": USER, "max_tokens": 2, "thinking": {"type": "disabled"}}, True),
        ("/v1/messages", {"messages": USER, "max_tokens": 2, "temperature": 2}, False),
        ("/v1/messages", {"messages": USER}, False),
        ("/v1/responses", {"input": [{"role": "user", "content": "hi"}], "stream": None}, True),
        ("/v1/responses", {"input": "hi", "background": True}, False),
        ("/v1/responses", {"input": [{"role": "king", "content": "hi"}]}, False),
    ],
    ids=str,
)
def test_bodies_are_refused_where_the_document_refuses_them(
    toy_artifact: Artifact, tmp_path: Path, path: str, body: dict[str, Any], accepted: bool
) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:
            document = await described(toy)
            content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
            validator = Draft202012Validator({**content["schema"], "components": document["components"]})
            whole = {"model": "toy", **body}
            assert validator.is_valid(whole) is accepted
            assert ((await toy.client.post(path, json=whole)).status_code == 200) is accepted

    asyncio.run(scenario())


class Links(HTMLParser):
    """Collects what a page loads or leads to."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name in ("src", "href", "action"):
                self.addresses.append(value or "")
            if name == "id":
                self.ids.add(value or "")


def test_the_docs_page_loads_nothing_and_its_links_lead_somewhere(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:
            response = await toy.client.get("/docs")
            assert response.headers["content-type"] == "text/html; charset=utf-8"
            assert "default-src 'none'" in response.headers["content-security-policy"]
            links = Links()
            links.feed(response.text)
            assert not links.tags & {"script", "link", "img", "iframe", "object"}
            assert "openapi.json" in links.addresses
            assert {address[1:] for address in links.addresses if address != "openapi.json"} <= links.ids
            document = await described(toy)
            for path in document["paths"]:
                assert path in response.text

    asyncio.run(scenario())


def test_the_document_is_the_same_every_time(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> str:
        async with serving(toy_artifact, tmp_path) as toy:
            return json.dumps(await described(toy))

    assert asyncio.run(scenario()) == asyncio.run(scenario())
