"""Reasoning tokens in records, and in every API's usage."""

from __future__ import annotations

import asyncio
from pathlib import Path

from pilotlight.artifact import Artifact
from pilotlight.text.reasoning import ThinkMarkers
from scripted import Scripted
from support import EOS_ID, Serving, serving, toy_tokenizer

ANSWER = "a(bcd)e(f"
NUM_REASONING = len("bcd") + len("f")
OPENS_ID, CLOSES_ID = (toy_tokenizer().token_to_id(mark) for mark in "()")


def think_in_brackets(toy: Serving) -> None:
    toy.function.text_side._think_markers = ThinkMarkers(OPENS_ID, CLOSES_ID, frozenset({EOS_ID}))


def test_the_record_and_every_usage_count_reasoning_tokens(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path, Scripted(ANSWER)) as toy:
            think_in_brackets(toy)
            chat = (await toy.chat(headers={"x-request-id": "one"})).json()
            assert chat["usage"]["completion_tokens"] == len(ANSWER) + 1
            assert chat["usage"]["completion_tokens_details"] == {"reasoning_tokens": NUM_REASONING}
            record = toy.ledger.get("one")
            assert record is not None
            assert record.reasoning_tokens == NUM_REASONING
            both = (await toy.complete(n=2, max_tokens=4)).json()
            assert both["usage"]["completion_tokens_details"] == {"reasoning_tokens": 2 * len("bc")}
            response = await toy.client.post("/v1/responses", json={"model": "toy", "input": "hi"})
            assert response.json()["usage"]["output_tokens_details"] == {"reasoning_tokens": NUM_REASONING}

    asyncio.run(scenario())


def test_a_model_without_markers_has_no_reasoning_tokens(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path, Scripted(ANSWER)) as toy:
            chat = (await toy.chat()).json()
            assert chat["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}

    asyncio.run(scenario())
