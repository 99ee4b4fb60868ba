"""Several choices in one answer: each its own sequence, one invocation, one usage record."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from pilotlight.artifact import Artifact
from pilotlight.engine.fake import FakeSession
from pilotlight.request import FinishReason
from support import VOCAB_SIZE, events, serving, toy_tokenizer

SAMPLED: dict[str, Any] = {"max_tokens": 8, "temperature": 2, "seed": 5, "return_token_ids": True, "ignore_eos": True}


def test_choices_differ_and_are_billed_together_with_one_prompt(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:
            answer = (await toy.complete("hello", n=3, **SAMPLED)).json()
            choices = answer["choices"]
            assert [choice["index"] for choice in choices] == [0, 1, 2]
            tokens = [tuple(choice["token_ids"]) for choice in choices]
            assert len(set(tokens)) == 3
            assert [choice["finish_reason"] for choice in choices] == ["length"] * 3
            usage = answer["usage"]
            assert (usage["prompt_tokens"], usage["completion_tokens"]) == (5, 24)
            record = toy.ledger.get(answer["id"])
            assert record is not None
            assert (record.prompt_tokens, record.completion_tokens, record.delivered_tokens) == (5, 24, 24)
            assert record.finish_reason is FinishReason.LENGTH
            alone = (await toy.complete("hello", **SAMPLED)).json()
            assert tuple(alone["choices"][0]["token_ids"]) == tokens[0], "the first choice is the one without n"

    asyncio.run(scenario())


def test_streamed_choices_are_told_apart_by_index(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:
            whole = (await toy.chat(n=2, **SAMPLED)).json()
            response = await toy.chat(n=2, stream=True, stream_options={"include_usage": True}, **SAMPLED)
            *chunks, usage = events(response.text)
            for index, choice in enumerate(whole["choices"]):
                of = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
                assert of[0]["delta"]["role"] == "assistant"
                text = "".join(each["delta"].get("content", "") for each in of)
                assert text == choice["message"]["content"]
                assert [each["finish_reason"] for each in of if each["finish_reason"]] == [choice["finish_reason"]]
                assert of[-1]["finish_reason"] == choice["finish_reason"]
            assert usage["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]

    asyncio.run(scenario())


def test_a_choice_that_meets_a_stop_string_ends_alone(toy_artifact: Artifact, tmp_path: Path) -> None:
    params = {**SAMPLED, "max_tokens": 30}

    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:
            free = (await toy.complete("hello", n=2, **params)).json()["choices"]
            stop = next(
                piece
                for place in range(5, 20)
                if (piece := free[0]["text"][place : place + 2]) not in free[1]["text"] and "�" not in piece
            )
            answer = (await toy.complete("hello", n=2, stop=stop, **params)).json()
            first, second = answer["choices"]
            assert first["finish_reason"] == "stop"
            assert first["text"] == free[0]["text"][: free[0]["text"].index(stop)]
            assert (second["finish_reason"], second["token_ids"]) == ("length", free[1]["token_ids"])
            assert answer["usage"]["completion_tokens"] == len(first["token_ids"]) + len(second["token_ids"])
            record = toy.ledger.get(answer["id"])
            assert record is not None
            assert record.finish_reason is FinishReason.LENGTH

    asyncio.run(scenario())


def test_without_room_for_all_choices_none_is_started(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path, max_queued_requests=1) as toy:
            response = await toy.complete("hello", n=6, max_tokens=4)
            assert response.status_code == 503
            assert "1 requests are waiting" in response.json()["error"]["message"]
            assert toy.ledger.get(response.headers["x-request-id"]) is None
            assert toy.function.num_running == 0
            assert (await toy.complete("hello", n=5, max_tokens=4)).status_code == 200

    asyncio.run(scenario())


def test_a_failed_run_of_one_choice_fails_the_answer(toy_artifact: Artifact, tmp_path: Path) -> None:
    runs = iter(range(1000))

    def fail_once() -> None:
        if next(runs) == 6:
            raise RuntimeError("out of luck")

    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path, FakeSession(VOCAB_SIZE, before_run=fail_once)) as toy:
            response = await toy.complete("hello", n=2, **{**SAMPLED, "max_tokens": 40})
            assert response.status_code == 500
            record = toy.ledger.get(response.headers["x-request-id"])
            assert record is not None
            assert record.finish_reason is FinishReason.ERROR
            assert 0 < record.completion_tokens < 80
            signals = toy.function.backend.signals()
            assert (signals.num_running, signals.num_waiting) == (0, 0)

    asyncio.run(scenario())


def test_cancelling_ends_every_choice(toy_artifact: Artifact, tmp_path: Path) -> None:
    steps = threading.Semaphore(6)
    session = FakeSession(VOCAB_SIZE, max_context_tokens=4096, before_run=steps.acquire)

    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path, session) as toy:
            headers = {"x-request-id": "mine"}
            asking = asyncio.create_task(toy.chat(headers=headers, n=3, ignore_eos=True))
            while session.num_runs < 6:
                await asyncio.sleep(0)
            assert (await toy.client.post("/v1/requests/mine/cancel")).status_code == 200
            steps.release(1000)
            assert (await asking).status_code == 499
            record = toy.ledger.get("mine")
            assert record is not None
            assert record.finish_reason is FinishReason.CANCELLED
            signals = toy.function.backend.signals()
            assert (signals.num_running, signals.num_waiting) == (0, 0)

    asyncio.run(asyncio.wait_for(scenario(), 300))


class TestLogprobs:
    def test_chat_has_one_entry_a_token_with_its_bytes(self, toy_artifact: Artifact, tmp_path: Path) -> None:
        async def scenario() -> None:
            async with serving(toy_artifact, tmp_path) as toy:
                params: dict[str, Any] = {"max_tokens": 6, "ignore_eos": True, "return_token_ids": True}
                choice = (await toy.chat(logprobs=True, top_logprobs=2, **params)).json()["choices"][0]
                content = choice["logprobs"]["content"]
                assert choice["logprobs"]["refusal"] is None
                assert len(content) == 6
                tokenizer = toy_tokenizer()
                for entry, token_id in zip(content, choice["token_ids"], strict=True):
                    text = bytes(entry["bytes"]).decode(errors="replace")
                    assert entry["token"] == text
                    if token_id < 256:
                        assert len(entry["bytes"]) == 1
                        assert tokenizer.decode([token_id]) == text
                    assert entry["top_logprobs"][0]["logprob"] == entry["logprob"] < 0
                    assert len(entry["top_logprobs"]) == 2
                plain = (await toy.chat(**params)).json()["choices"][0]
                assert plain["logprobs"] is None
                assert plain["token_ids"] == choice["token_ids"]
                bare = (await toy.chat(logprobs=True, **params)).json()["choices"][0]
                assert [entry["top_logprobs"] for entry in bare["logprobs"]["content"]] == [[]] * 6

        asyncio.run(scenario())

    def test_a_stream_carries_the_same(self, toy_artifact: Artifact, tmp_path: Path) -> None:
        async def scenario() -> None:
            async with serving(toy_artifact, tmp_path) as toy:
                params: dict[str, Any] = {"max_tokens": 9, "ignore_eos": True, "logprobs": True, "top_logprobs": 1}
                whole = (await toy.chat(**params)).json()["choices"][0]
                chunks = events((await toy.chat(stream=True, **params)).text)
                streamed = [
                    entry
                    for chunk in chunks
                    for entry in (chunk["choices"][0].get("logprobs") or {"content": []})["content"]
                ]
                assert streamed == whole["logprobs"]["content"]

        asyncio.run(scenario())

    def test_text_completions_have_their_own_shape(self, toy_artifact: Artifact, tmp_path: Path) -> None:
        async def scenario() -> None:
            async with serving(toy_artifact, tmp_path) as toy:
                params: dict[str, Any] = {"max_tokens": 6, "ignore_eos": True, "logprobs": 2}
                choice = (await toy.complete("hello", **params)).json()["choices"][0]
                logprobs = choice["logprobs"]
                assert logprobs.keys() == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
                assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == 6
                ends = [
                    start + len(text) for start, text in zip(logprobs["text_offset"], logprobs["tokens"], strict=True)
                ]
                assert logprobs["text_offset"] == [0, *ends[:-1]]
                chunks = events((await toy.complete("hello", stream=True, **params)).text)
                pieces = [chunk["choices"][0]["logprobs"] for chunk in chunks if chunk["choices"][0]["logprobs"]]
                for key, values in logprobs.items():
                    assert [value for piece in pieces for value in piece[key]] == values

        asyncio.run(scenario())

    def test_the_end_token_has_none(self, toy_artifact: Artifact, tmp_path: Path) -> None:
        async def scenario() -> None:
            async with serving(toy_artifact, tmp_path) as toy:
                answer = await toy.complete(
                    "hi", logprobs=0, logit_bias={"257": 100}, max_tokens=5, return_token_ids=True
                )
                choice = answer.json()["choices"][0]
                assert (choice["token_ids"], choice["logprobs"], choice["text"]) == ([257], None, "")

        asyncio.run(scenario())


@pytest.mark.parametrize(
    ("endpoint", "params", "param"),
    [
        ("chat", {"n": 0}, "n"),
        ("chat", {"n": 17}, "n"),
        ("chat", {"top_logprobs": 2}, "top_logprobs"),
        ("chat", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ("chat", {"logprobs": 3}, "logprobs"),
        ("completions", {"logprobs": 6}, "logprobs"),
        ("completions", {"logprobs": True}, "logprobs"),
        ("completions", {"n": 2, "best_of": 3}, "best_of"),
        ("completions", {"top_logprobs": 2}, "top_logprobs"),
        ("completions", {"echo": True}, "echo"),
    ],
)
def test_bad_values_are_refused_by_name(
    toy_artifact: Artifact, tmp_path: Path, endpoint: str, params: dict[str, Any], param: str
) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:
            response = await (toy.chat(**params) if endpoint == "chat" else toy.complete(**params))
            assert (response.status_code, response.json()["error"]["param"]) == (400, param)

    asyncio.run(scenario())
