"""Answers that were cut off and go on, on the wire: the same tokens, the same text, the same bill."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pilotlight.artifact import Artifact, open_artifact
from pilotlight.engine.fake import FakeSession
from pilotlight.metering.keyring import KeyDesk
from pilotlight.metering.keys import Limits
from pilotlight.metering.record import UsageRecord
from pilotlight.request import FinishReason
from scripted import HERMES, Scripted
from support import (
    EOS_ID,
    VOCAB_SIZE,
    Serving,
    events,
    expected_tokens,
    named_events,
    run_out_of_time,
    serving,
    toy_chat_ids,
    toy_text,
    toy_tokenizer,
    write_artifact,
)

SECRET = "a secret of the tests"
CONTEXT = 256
ALL: dict[str, Any] = {"max_tokens": 40, "ignore_eos": True, "return_token_ids": True}
SAMPLED: dict[str, Any] = {**ALL, "temperature": 2, "seed": 7, "repetition_penalty": 1.1, "presence_penalty": 0.5}


def ids_of(text: str) -> list[int]:
    ids: list[int] = toy_tokenizer().encode(text, add_special_tokens=False).ids
    return ids


HELLO = ids_of("hello")


def guarded(take: Callable[[], object]) -> FakeSession:
    return FakeSession(VOCAB_SIZE, max_context_tokens=CONTEXT, before_run=take)


class Gate:
    """A session that can be stopped after so many runs, and whoever runs has to wait."""

    def __init__(self, session: Callable[[Callable[[], object]], FakeSession] = guarded) -> None:
        self._permits = threading.Semaphore(0)
        self.waits = threading.Event()
        self.session = session(self._take)

    def _take(self) -> None:
        if not self._permits.acquire(blocking=False):
            self.waits.set()
            self._permits.acquire()

    async def let(self, num_runs: int) -> None:
        """Permit so many runs, and wait until the next one would begin."""
        self.waits.clear()
        if num_runs:
            self._permits.release(num_runs)
        await asyncio.to_thread(self.waits.wait)

    def open(self) -> None:
        self._permits.release(100_000)


async def cut_off(
    artifact: Artifact, directory: Path, num_runs: int, ask: Callable[[Serving], Any], gate: Gate | None = None
) -> Any:
    """Ask a host that shuts down after so many runs, and return its response."""
    gate = gate or Gate()
    async with serving(artifact, directory, gate.session, resume_secret=SECRET) as toy:
        asking = asyncio.create_task(ask(toy))
        await gate.let(num_runs)
        draining = asyncio.create_task(toy.function.drain(timeout_s=0))
        while not any(invocation.cut for invocation in toy.function._running.values()):
            await asyncio.sleep(0)
        gate.open()
        await draining
        return await asking


def host(artifact: Artifact, directory: Path) -> Any:
    return serving(artifact, directory, FakeSession(VOCAB_SIZE, max_context_tokens=CONTEXT), resume_secret=SECRET)


def pilotlight(answer: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = answer["usage"]["pilotlight"]
    return found


def record_of(toy: Serving, answer: dict[str, Any]) -> UsageRecord:
    record = toy.ledger.get(pilotlight(answer)["request_id"])
    assert record is not None
    return record


def run(scenario: Any) -> None:
    asyncio.run(asyncio.wait_for(scenario, 300))


@pytest.mark.parametrize("params", [ALL, SAMPLED, {**SAMPLED, "seed": None}], ids=["greedy", "seeded", "unseeded"])
@pytest.mark.parametrize("num_runs", [1, 2, 7, 30])
def test_the_continuation_is_what_would_have_followed(
    toy_artifact: Artifact, tmp_path: Path, params: dict[str, Any], num_runs: int
) -> None:
    async def scenario() -> None:
        first = (await cut_off(toy_artifact, tmp_path, num_runs, lambda toy: toy.complete("hello", **params))).json()
        token = pilotlight(first)["resume_token"]
        assert first["choices"][0]["finish_reason"] == "length"
        async with host(toy_artifact, tmp_path) as toy:
            rest = (await toy.complete("hello", resume_token=token, **params)).json()
            parts = [answer["choices"][0]["token_ids"] for answer in (first, rest)]
            assert all(parts)
            assert len(parts[0]) + len(parts[1]) == 40
            if params is ALL:
                assert [*parts[0], *parts[1]] == expected_tokens(HELLO, 40, frozenset())
            elif params["seed"] is not None:
                whole = (await toy.complete("hello", **params)).json()
                assert [*parts[0], *parts[1]] == whole["choices"][0]["token_ids"]

    run(scenario())


def test_both_parts_are_billed_as_if_it_had_been_one(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        first = (await cut_off(toy_artifact, tmp_path, 9, lambda toy: toy.complete("hello", **ALL))).json()
        async with host(toy_artifact, tmp_path) as toy:
            rest = (await toy.complete("hello", resume_token=pilotlight(first)["resume_token"], **ALL)).json()
            whole = (await toy.complete("hello", **ALL)).json()
            before, after, once = (record_of(toy, answer) for answer in (first, rest, whole))
            assert (before.finish_reason, before.stop_detail) == (FinishReason.DEADLINE, "the server shuts down")
            assert (after.finish_reason, after.resumes) == (FinishReason.LENGTH, before.request_id)
            assert (after.prompt_tokens, after.cached_tokens) == (0, 0)
            assert after.resumed_tokens == before.prompt_tokens + before.completion_tokens
            assert pilotlight(rest)["resumed_tokens"] == after.resumed_tokens
            for name in ("prompt_tokens", "completion_tokens", "delivered_tokens", "cost_micros"):
                assert getattr(before, name) + getattr(after, name) == getattr(once, name), name
            assert after.reserved_tokens == 40 - before.completion_tokens

    run(scenario())


def test_a_token_that_is_used_again_is_work_like_any_other(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        first = (await cut_off(toy_artifact, tmp_path, 9, lambda toy: toy.complete("hello", **ALL))).json()
        token = pilotlight(first)["resume_token"]
        async with host(toy_artifact, tmp_path) as toy:
            once, again = [(await toy.complete("hello", resume_token=token, **ALL)).json() for _ in range(2)]
            assert once["choices"] == again["choices"]
            record = record_of(toy, again)
            num_before = len(first["choices"][0]["token_ids"])
            assert (record.prompt_tokens, record.resumed_tokens) == (5 + num_before, 0)
            assert record.resumes == pilotlight(first)["request_id"]

    run(scenario())


def test_an_answer_may_be_cut_off_again_and_again(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        found: list[int] = []
        token: dict[str, Any] = {}
        costs = 0
        for _ in range(4):
            ask = partial(Serving.chat, content="go", **SAMPLED, **token)
            answer = (await cut_off(toy_artifact, tmp_path, 6, ask)).json()
            found += answer["choices"][0]["token_ids"]
            token = {"resume_token": pilotlight(answer)["resume_token"]}
            costs += pilotlight(answer)["cost_micros"]
        async with host(toy_artifact, tmp_path) as toy:
            last = (await toy.chat("go", **SAMPLED, **token)).json()
            whole = (await toy.chat("go", **SAMPLED)).json()
            assert found + last["choices"][0]["token_ids"] == whole["choices"][0]["token_ids"]
            assert costs + pilotlight(last)["cost_micros"] == pilotlight(whole)["cost_micros"]

    run(scenario())


@pytest.mark.parametrize("num_runs", range(2, 24, 3))
def test_the_text_of_all_parts_is_the_text(toy_artifact: Artifact, tmp_path: Path, num_runs: int) -> None:
    """The fake session's bytes are hardly ever whole characters, so a part ends within one most of the time."""

    async def scenario() -> None:
        params: dict[str, Any] = {"max_tokens": 40, "ignore_eos": True, "stream": True, "return_token_ids": True}
        response = await cut_off(toy_artifact, tmp_path, num_runs, lambda toy: toy.chat("hi", **params))
        *_, last = first = events(response.text)
        async with host(toy_artifact, tmp_path) as toy:
            rest = events((await toy.chat("hi", resume_token=pilotlight(last)["resume_token"], **params)).text)
        text = "".join(frame["choices"][0]["delta"].get("content") or "" for frame in first + rest)
        ids = [token for frame in first + rest for token in frame["choices"][0].get("token_ids", [])]
        assert ids == expected_tokens(toy_chat_ids(("user", "hi")), 40, frozenset())
        assert text == toy_text(ids)

    run(scenario())


def test_a_stop_string_across_the_cut_still_stops(toy_artifact: Artifact, tmp_path: Path) -> None:
    """What is held back as the beginning of a stop string is not shown before the cut, and decided behind it."""

    async def scenario() -> None:
        schema: dict[str, Any] = {"response_format": {"type": "regex", "regex": "abcdef(gh)+"}, "max_tokens": 30}
        params = {**schema, "stop": "cdefg", "stream": True}
        response = await cut_off(toy_artifact, tmp_path, 5, lambda toy: toy.chat("hi", **params))
        *_, last = first = events(response.text)
        async with host(toy_artifact, tmp_path) as toy:
            rest = events((await toy.chat("hi", resume_token=pilotlight(last)["resume_token"], **params)).text)
        texts = ["".join(frame["choices"][0]["delta"].get("content") or "" for frame in part) for part in (first, rest)]
        assert "".join(texts) == "ab"
        assert (first[-1]["choices"][0]["finish_reason"], rest[-1]["choices"][0]["finish_reason"]) == ("length", "stop")

    run(scenario())


@pytest.mark.parametrize("num_runs", [4, 9])
def test_a_grammar_goes_on_where_it_was(toy_artifact: Artifact, tmp_path: Path, num_runs: int) -> None:
    async def scenario() -> None:
        params = {"response_format": {"type": "regex", "regex": "[ab]{6}-[cd]{6}"}, **SAMPLED, "ignore_eos": False}
        first = (await cut_off(toy_artifact, tmp_path, num_runs, lambda toy: toy.chat("hi", **params))).json()
        async with host(toy_artifact, tmp_path) as toy:
            rest = (await toy.chat("hi", resume_token=pilotlight(first)["resume_token"], **params)).json()
            whole = (await toy.chat("hi", **params)).json()
        parts = [answer["choices"][0]["message"]["content"] for answer in (first, rest)]
        assert "".join(parts) == whole["choices"][0]["message"]["content"]
        assert all(parts)

    run(scenario())


def test_a_stream_ends_with_length_usage_and_token_in_one_chunk(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        response = await cut_off(toy_artifact, tmp_path, 4, lambda toy: toy.chat("hi", stream=True, **ALL))
        assert response.text.endswith("data: [DONE]\n\n")
        last = events(response.text)[-1]
        assert last["choices"][0]["finish_reason"] == "length"
        assert pilotlight(last)["resume_token"].startswith("plr1.")
        asked = {"stream": True, "stream_options": {"include_usage": True}, **ALL}
        response = await cut_off(toy_artifact, tmp_path / "other", 4, lambda toy: toy.chat("hi", **asked))
        *_, closing, usage = events(response.text)
        assert "usage" not in closing
        assert usage["choices"] == []
        assert pilotlight(usage)["resume_token"].startswith("plr1.")

    (tmp_path / "other").mkdir()
    run(scenario())


def test_messages_go_on_too(toy_artifact: Artifact, tmp_path: Path) -> None:
    body = {"model": "toy", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 40, "ignore_eos": True}

    async def scenario() -> None:
        ask = lambda toy: toy.client.post("/v1/messages", json={**body, "stream": True})  # noqa: E731
        first = named_events((await cut_off(toy_artifact, tmp_path, 9, ask)).text)
        _, ended = first[-2]
        assert ended["delta"]["stop_reason"] == "max_tokens"
        async with host(toy_artifact, tmp_path) as toy:
            continued = {**body, "stream": True, "resume_token": pilotlight(ended)["resume_token"]}
            rest = named_events((await toy.client.post("/v1/messages", json=continued)).text)
            whole = (await toy.client.post("/v1/messages", json=body)).json()
        pieces = [event["delta"]["text"] for name, event in first + rest if name == "content_block_delta"]
        assert "".join(pieces) == whole["content"][0]["text"]

    run(scenario())


def test_responses_say_that_they_cannot_be_continued(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with host(toy_artifact, tmp_path) as toy:
            body = {"model": "toy", "input": "hi", "resume_token": "plr1.a.b"}
            refused = await toy.client.post("/v1/responses", json=body)
            assert refused.status_code == 400
            assert refused.json()["error"]["param"] == "resume_token"

    run(scenario())


def test_a_client_s_own_timeout_gives_a_token_that_is_billed_anew(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        gate = Gate()
        async with serving(toy_artifact, tmp_path, gate.session, resume_secret=SECRET) as toy:
            headers = {"x-request-timeout-ms": "60000", "x-request-id": "late"}
            asking = asyncio.create_task(toy.chat("hi", headers=headers, **ALL))
            await gate.let(5)
            await run_out_of_time(toy.function, "late", 60)
            gate.open()
            first = (await asking).json()
            assert record_of(toy, first).stop_detail == "the time that the client allows"
            rest = (await toy.chat("hi", resume_token=pilotlight(first)["resume_token"], **ALL)).json()
            assert len(rest["choices"][0]["token_ids"]) == 40 - len(first["choices"][0]["token_ids"])
            record = record_of(toy, rest)
            num_known = len(toy_chat_ids(("user", "hi"))) + len(first["choices"][0]["token_ids"])
            assert (record.prompt_tokens, record.resumed_tokens) == (num_known, 0)

    run(scenario())


def test_an_answer_that_never_began_is_billed_when_it_does(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        prompt = "a prompt that is read in several steps"
        first = (await cut_off(toy_artifact, tmp_path, 0, lambda toy: toy.complete(prompt, **ALL))).json()
        assert first["usage"]["total_tokens"] == 0
        async with host(toy_artifact, tmp_path) as toy:
            rest = (await toy.complete(prompt, resume_token=pilotlight(first)["resume_token"], **ALL)).json()
            assert rest["usage"]["prompt_tokens"] == len(prompt)
            assert rest["choices"][0]["token_ids"] == expected_tokens(ids_of(prompt), 40, frozenset())

    run(scenario())


def test_without_a_secret_there_are_no_tokens(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:
            refused = await toy.complete("hi", resume_token="plr1.a.b")
            assert (refused.status_code, refused.json()["error"]["code"]) == (400, "unsupported_parameter")

    run(scenario())


def test_several_choices_cannot_be_continued(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with host(toy_artifact, tmp_path) as toy:
            several = {"n": 2, **ALL}
            first = (await toy.complete("hi", **several)).json()
            assert pilotlight(first)["resume_token"] is None
        stopped = (await cut_off(toy_artifact, tmp_path, 3, lambda toy: toy.complete("hi", **ALL))).json()
        async with host(toy_artifact, tmp_path) as toy:
            refused = await toy.complete("hi", resume_token=pilotlight(stopped)["resume_token"], **several)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "resume_token")

    run(scenario())


def test_a_token_is_its_key_s_own(toy_artifact: Artifact, tmp_path: Path) -> None:
    with KeyDesk(tmp_path / "usage.db") as desk:
        mine, theirs = (desk.create("app", "acme", None, Limits(), admin=False)[1] for _ in range(2))

    def bearer(token: str) -> dict[str, str]:
        return {"authorization": f"Bearer {token}"}

    async def scenario() -> None:
        ask = lambda toy: toy.chat("hi", headers=bearer(mine), **ALL)  # noqa: E731
        first = (await cut_off(toy_artifact, tmp_path, 4, ask)).json()
        asked = {**ALL, "resume_token": pilotlight(first)["resume_token"]}
        async with host(toy_artifact, tmp_path) as toy:
            refused = await toy.chat("hi", headers=bearer(theirs), **asked)
            assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_resume_token")
            taken = await toy.chat("hi", headers=bearer(mine), **asked)
            assert taken.status_code == 200
            assert taken.headers["x-request-id"] == pilotlight(taken.json())["request_id"]
            record = record_of(toy, taken.json())
            assert (record.prompt_tokens, record.reserved_tokens) == (0, record.completion_tokens)

    run(scenario())


def test_two_that_use_a_token_at_the_same_time_do_not_both_go_free(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        first = (await cut_off(toy_artifact, tmp_path, 9, lambda toy: toy.complete("hello", **ALL))).json()
        token = pilotlight(first)["resume_token"]
        gate = Gate()
        async with serving(toy_artifact, tmp_path, gate.session, resume_secret=SECRET) as toy:
            both = [asyncio.create_task(toy.complete("hello", resume_token=token, **ALL)) for _ in range(2)]
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            gate.open()
            assert sorted([(await asked).status_code for asked in both]) == [200, 409]

    run(scenario())


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("num_runs", [40, 60, 90])
def test_tool_calls_go_on_too(tmp_path: Path, num_runs: int, is_stream: bool) -> None:
    """A continuation that comes whole has its calls from their beginning; the parts of a stream add up."""
    hermes = open_artifact(write_artifact(tmp_path / "hermes", chat_template=HERMES))
    tool = {"type": "function", "function": {"name": "weather"}}
    params: dict[str, Any] = {"tools": [tool], "max_tokens": 150, "stream": is_stream}
    script = 'Look: <tool_call>\n{"name": "weather", "arguments": {"city": "Bern", "days": 2}}\n</tool_call>'

    async def scenario() -> None:
        ask = lambda toy: toy.chat("hi", **params)  # noqa: E731
        response = await cut_off(hermes, tmp_path, num_runs, ask, Gate(lambda take: Scripted(script, take)))
        last = events(response.text)[-1] if is_stream else response.json()
        session = Scripted(script, num_prompt_tokens=last["usage"]["prompt_tokens"])
        async with serving(hermes, tmp_path, session, resume_secret=SECRET) as toy:
            rest = await toy.chat("hi", resume_token=pilotlight(last)["resume_token"], **params)
        if is_stream:
            frames = events(response.text) + events(rest.text)
            calls = [call for frame in frames for call in frame["choices"][0]["delta"].get("tool_calls", [])]
            assert [call["function"]["name"] for call in calls if "name" in call["function"]] == ["weather"]
            assert "".join(call["function"]["arguments"] for call in calls) == '{"city": "Bern", "days": 2}'
            assert frames[-1]["choices"][0]["finish_reason"] == "tool_calls"
        else:
            (choice,) = rest.json()["choices"]
            (call,) = choice["message"]["tool_calls"]
            assert call["function"] == {"name": "weather", "arguments": '{"city": "Bern", "days": 2}'}
            assert choice["finish_reason"] == "tool_calls"

    run(scenario())


def test_an_eos_behind_the_cut_still_ends(toy_artifact: Artifact, tmp_path: Path) -> None:
    prompt = next(f"p{i}" for i in range(10_000) if 8 < len(expected_tokens(ids_of(f"p{i}"), 60)) < 60)

    async def scenario() -> None:
        params = {"max_tokens": 60, "return_token_ids": True}
        first = (await cut_off(toy_artifact, tmp_path, 4, lambda toy: toy.complete(prompt, **params))).json()
        async with host(toy_artifact, tmp_path) as toy:
            rest = (await toy.complete(prompt, resume_token=pilotlight(first)["resume_token"], **params)).json()
        assert rest["choices"][0]["token_ids"][-1] == EOS_ID
        assert rest["choices"][0]["finish_reason"] == "stop"

    run(scenario())
