"""The Responses API over the fake session: exact events in their order, exact usage, and what is kept."""

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
from pilotlight.metering.keyring import KeyDesk
from pilotlight.metering.keys import Limits
from pilotlight.request import FinishReason
from support import (
    EOS_ID,
    VOCAB_SIZE,
    Serving,
    expected_tokens,
    named_events,
    serving,
    toy_chat_ids,
    toy_text,
)


async def ask(toy: Serving, given: Any = "hi", headers: dict[str, str] | None = None, **params: Any) -> httpx.Response:
    body = {"model": "toy", "max_output_tokens": 6, "input": given, **params}
    return await toy.client.post("/v1/responses", content=json.dumps(body), headers=headers)


def text_of(response: dict[str, Any]) -> str:
    (message,) = response["output"]
    (part,) = message["content"]
    return str(part["text"])


def test_a_response_is_the_models_own_answer(toy_artifact: Artifact, tmp_path: Path) -> None:
    prompt_ids = toy_chat_ids(("system", "Be brief."), ("user", "hi"))
    expected = expected_tokens(prompt_ids, 6)
    assert EOS_ID not in expected

    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:
            response = await ask(
                toy, instructions="Be brief.", metadata={"k": "v"}, user="u", headers={"x-request-id": "r1"}
            )
            assert response.status_code == 200, response.text
            answer = response.json()
            assert (answer["id"], answer["object"], answer["model"]) == ("resp_r1", "response", "toy")
            assert answer["output"] == [
                {
                    "type": "message",
                    "id": "msg_r1_0",
                    "status": "incomplete",
                    "role": "assistant",
                    "content": [{"type": "output_text", "text": toy_text(expected), "annotations": [], "logprobs": []}],
                }
            ]
            assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
            assert (answer["instructions"], answer["metadata"]) == ("Be brief.", {"k": "v"})
            assert (answer["error"], answer["previous_response_id"], answer["store"]) == (None, None, True)
            usage = answer["usage"]
            assert (usage["input_tokens"], usage["output_tokens"]) == (len(prompt_ids), len(expected))
            assert usage["total_tokens"] == len(prompt_ids) + len(expected)
            assert usage["input_tokens_details"]["cached_tokens"] == 0
            record = toy.ledger.get("r1")
            assert record is not None
            assert (record.prompt_tokens, record.completion_tokens) == (len(prompt_ids), len(expected))
            assert usage["pilotlight"]["cost_micros"] == record.cost_micros

    asyncio.run(scenario())


def test_items_and_a_string_ask_the_same(toy_artifact: Artifact, tmp_path: Path) -> None:
    items: list[Any] = [
        [{"role": "user", "content": "hi"}],
        [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}],
        [{"type": "reasoning", "id": "rs_1", "summary": []}, {"role": "user", "content": "hi"}],
    ]

    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:
            expected = text_of((await ask(toy)).json())
            for given in items:
                assert text_of((await ask(toy, given)).json()) == expected

    asyncio.run(scenario())


def test_calls_and_their_outputs_become_the_templates_messages(toy_artifact: Artifact, tmp_path: Path) -> None:
    given = [
        {"role": "developer", "content": "D"},
        {"role": "user", "content": "1+1"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "ok", "annotations": []}]},
        {
            "type": "function_call",
            "call_id": "c1",
            "name": "add",
            "arguments": "{}",
            "id": "fc_1",
            "status": "completed",
        },
        {"type": "function_call_output", "call_id": "c1", "output": "two"},
    ]
    prompt_ids = toy_chat_ids(("system", "D"), ("user", "1+1"), ("assistant", "ok"), ("tool", "two"))

    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path, FakeSession(VOCAB_SIZE, max_context_tokens=256)) as toy:
            answer = (await ask(toy, given)).json()
            assert answer["usage"]["input_tokens"] == len(prompt_ids)
            assert text_of(answer) == toy_text(expected_tokens(prompt_ids, 6))

    asyncio.run(scenario())


def test_a_stream_tells_each_step_in_order(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:
            whole = (await ask(toy)).json()
            response = await ask(toy, stream=True, headers={"x-request-id": "r1"})
            assert response.headers["content-type"].startswith("text/event-stream")
            assert "[DONE]" not in response.text
            events = named_events(response.text)
            assert all(name == event["type"] for name, event in events)
            assert [event["sequence_number"] for _, event in events] == list(range(len(events)))
            deltas = [event for name, event in events if name == "response.output_text.delta"]
            assert [name for name, _ in events] == [
                "response.created",
                "response.in_progress",
                "response.output_item.added",
                "response.content_part.added",
                *["response.output_text.delta"] * len(deltas),
                "response.output_text.done",
                "response.content_part.done",
                "response.output_item.done",
                "response.incomplete",
            ]
            assert all(event["response"]["status"] == "in_progress" for _, event in events[:2])
            assert {event["item_id"] for event in deltas} == {"msg_r1_0"}
            text = "".join(event["delta"] for event in deltas)
            text_done, part_done, item_done, ended = [event for _, event in events[-4:]]
            assert text == text_done["text"] == part_done["part"]["text"] == text_of(whole)
            assert ended["response"]["output"] == [item_done["item"]]
            for name in ("input_tokens", "output_tokens"):
                assert ended["response"]["usage"][name] == whole["usage"][name]
            assert (await toy.client.get("/v1/responses/resp_r1")).json() == ended["response"]

    asyncio.run(scenario())


def test_an_answer_that_ends_by_itself_is_completed(toy_artifact: Artifact, tmp_path: Path) -> None:
    def ends(content: str) -> bool:
        return EOS_ID in expected_tokens(toy_chat_ids(("user", content)), 24)

    content = next(content for number in range(500) if ends(content := str(number)))

    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:
            answer = (await ask(toy, content, max_output_tokens=24)).json()
            assert (answer["status"], answer["incomplete_details"]) == ("completed", None)
            assert answer["output"][0]["status"] == "completed"
            events = named_events((await ask(toy, content, max_output_tokens=24, stream=True)).text)
            assert events[-1][0] == "response.completed"

    asyncio.run(scenario())


def test_log_probabilities_come_where_they_are_asked_for(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:
            params: dict[str, Any] = {
                "include": ["message.output_text.logprobs"],
                "top_logprobs": 2,
                "ignore_eos": True,
            }
            answer = (await ask(toy, **params)).json()
            scores = answer["output"][0]["content"][0]["logprobs"]
            assert len(scores) == 6
            assert all(score["logprob"] <= 0 and len(score["top_logprobs"]) == 2 for score in scores)
            events = named_events((await ask(toy, stream=True, **params)).text)
            streamed = [score for name, event in events if name.endswith("delta") for score in event["logprobs"]]
            assert streamed == scores
            refused = await ask(toy, top_logprobs=2)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "top_logprobs")

    asyncio.run(scenario())


def test_a_conversation_goes_on_from_a_response_without_its_instructions(
    toy_artifact: Artifact, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path, FakeSession(VOCAB_SIZE, max_context_tokens=256)) as toy:
            first = (await ask(toy, "a", instructions="One")).json()
            second = (await ask(toy, "b", instructions="Two", previous_response_id=first["id"])).json()
            turns = [("user", "a"), ("assistant", text_of(first)), ("user", "b")]
            prompt_ids = toy_chat_ids(("system", "Two"), *turns)
            assert second["usage"]["input_tokens"] == len(prompt_ids)
            assert text_of(second) == toy_text(expected_tokens(prompt_ids, 6))
            assert second["previous_response_id"] == first["id"]
            third = (await ask(toy, "c", previous_response_id=second["id"], stream=False)).json()
            prompt_ids = toy_chat_ids(*turns, ("assistant", text_of(second)), ("user", "c"))
            assert third["usage"]["input_tokens"] == len(prompt_ids)

    asyncio.run(scenario())


def test_responses_are_found_listed_and_forgotten(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:
            answer = (await ask(toy, [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])).json()
            url = f"/v1/responses/{answer['id']}"
            assert (await toy.client.get(url)).json() == answer
            items = (await toy.client.get(f"{url}/input_items", params={"order": "asc"})).json()
            assert [item["content"] for item in items["data"]] == ["a", "b"]
            assert (items["first_id"], items["has_more"]) == (items["data"][0]["id"], False)
            newest = (await toy.client.get(f"{url}/input_items", params={"limit": 1})).json()
            assert ([item["content"] for item in newest["data"]], newest["has_more"]) == (["b"], True)
            rest = (await toy.client.get(f"{url}/input_items", params={"after": newest["last_id"]})).json()
            assert [item["content"] for item in rest["data"]] == ["a"]
            for bad in ({"limit": "0"}, {"limit": "x"}, {"order": "up"}):
                assert (await toy.client.get(f"{url}/input_items", params=bad)).status_code == 400
            assert (await toy.client.get(url, params={"stream": "true"})).status_code == 400
            gone = await toy.client.delete(url)
            assert gone.json() == {"id": answer["id"], "object": "response", "deleted": True}
            for again in (
                await toy.client.get(url),
                await toy.client.delete(url),
                await toy.client.get(f"{url}/input_items"),
            ):
                assert (again.status_code, again.json()["error"]["code"]) == (404, "response_not_found")
            late = await ask(toy, previous_response_id=answer["id"])
            assert (late.status_code, late.json()["error"]["param"]) == (400, "previous_response_id")
            assert late.json()["error"]["code"] == "previous_response_not_found"
            record = (await toy.client.get(f"/v1/usage/{answer['usage']['pilotlight']['request_id']}")).json()
            assert record["completion_tokens"] == answer["usage"]["output_tokens"]

    asyncio.run(scenario())


def test_what_is_not_to_be_kept_is_not(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:
            answer = (await ask(toy, store=False)).json()
            assert answer["store"] is False
            assert (await toy.client.get(f"/v1/responses/{answer['id']}")).status_code == 404

    asyncio.run(scenario())


def test_a_response_is_seen_by_its_own_tenant_only(toy_artifact: Artifact, tmp_path: Path) -> None:
    def bearer(tenant: str) -> dict[str, str]:
        with KeyDesk(tmp_path / "usage.db") as desk:
            token = desk.create("app", tenant, None, Limits(), admin=False)[1]
        return {"authorization": f"Bearer {token}"}

    async def scenario() -> None:
        mine, ours, theirs = bearer("acme"), bearer("acme"), bearer("other")
        async with serving(toy_artifact, tmp_path) as toy:
            answer = (await ask(toy, headers=mine)).json()
            url = f"/v1/responses/{answer['id']}"
            assert (await toy.client.get(url, headers=ours)).json() == answer
            assert (await toy.client.get(url, headers=theirs)).status_code == 404
            assert (await toy.client.delete(url, headers=theirs)).status_code == 404
            stolen = await ask(toy, headers=theirs, previous_response_id=answer["id"])
            assert (stolen.status_code, stolen.json()["error"]["code"]) == (400, "previous_response_not_found")
            assert (await ask(toy, headers=ours, previous_response_id=answer["id"])).status_code == 200

    asyncio.run(scenario())


BAD: list[tuple[dict[str, Any], int, str, str]] = [
    ({"model": "nobody"}, 404, "model", "no function 'nobody' here"),
    ({"input": None}, 400, "input", "expected string | array"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, 400, "input[0].type", "invalid value 'item_reference'"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        400,
        "input[0].content[0].type",
        "invalid value 'input_image'",
    ),
    ({"input": [{"type": None, "role": "user", "content": "hi"}]}, 400, "input[0].type", "expected"),
    ({"background": 0}, 400, "background", "not supported"),
    ({"input": [7]}, 400, "input[0]", "expected object"),
    ({"input": "x" * 500}, 400, "input", "maximum context length is 64"),
    ({"max_output_tokens": 0}, 400, "max_output_tokens", ">= 1"),
    ({"metadata": {"k": 1}}, 400, "metadata", "expected str"),
    ({"background": True}, 400, "background", "not supported"),
    ({"conversation": "c"}, 400, "conversation", "not supported"),
    ({"truncation": "auto"}, 400, "truncation", "not supported"),
    ({"tools": [{"type": "web_search"}]}, 400, "tools", ""),
    ({"surprise": 1}, 400, "surprise", "unknown parameter"),
]


@pytest.mark.parametrize(("change", "status", "param", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_requests_name_the_parameter(
    toy_artifact: Artifact, tmp_path: Path, change: dict[str, Any], status: int, param: str, message: str
) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:
            response = await ask(toy, **{"given": change.pop("input", "hi"), **change})
            error = response.json()["error"]
            assert response.status_code == status
            assert error["param"].startswith(param)
            assert message in error["message"]
            assert toy.session.num_runs == 0
            assert toy.ledger.get(response.headers["x-request-id"]) is None

    asyncio.run(scenario())


def test_a_run_that_fails_ends_the_stream_as_failed(toy_artifact: Artifact, tmp_path: Path) -> None:
    runs = iter(range(100))

    def fail_on_third_run() -> None:
        if next(runs) == 2:
            raise RuntimeError("out of luck")

    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path, FakeSession(VOCAB_SIZE, before_run=fail_on_third_run)) as toy:
            response = await ask(toy, stream=True, ignore_eos=True, headers={"x-request-id": "r1"})
            name, last = named_events(response.text)[-1]
            assert (name, last["response"]["status"]) == ("response.failed", "failed")
            assert last["response"]["error"]["code"] == "server_error"
            assert "out of luck" not in response.text
            record = toy.ledger.get("r1")
            assert record is not None
            assert record.finish_reason is FinishReason.ERROR
            assert (await toy.client.get("/v1/responses/resp_r1")).status_code == 404

    asyncio.run(scenario())


def test_a_cancelled_stream_ends_as_failed_and_is_metered(toy_artifact: Artifact, tmp_path: Path) -> None:
    steps = threading.Semaphore(2)
    session = FakeSession(VOCAB_SIZE, max_context_tokens=4096, before_run=steps.acquire)

    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path, session) as toy:
            params: dict[str, Any] = {"stream": True, "ignore_eos": True, "max_output_tokens": 100}
            asking = asyncio.create_task(ask(toy, headers={"x-request-id": "mine"}, **params))
            while session.num_runs < 2:
                await asyncio.sleep(0)
            assert (await toy.client.post("/v1/requests/mine/cancel")).status_code == 200
            steps.release(50)
            name, last = named_events((await asking).text)[-1]
            assert (name, last["response"]["error"]["code"]) == ("response.failed", "request_cancelled")
            record = toy.ledger.get("mine")
            assert record is not None
            assert record.finish_reason is FinishReason.CANCELLED

    asyncio.run(asyncio.wait_for(scenario(), 300))
