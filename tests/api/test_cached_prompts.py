"""Prompts that begin as an earlier one did: what clients see of it, and what it costs."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from pilotlight.artifact import Artifact
from pilotlight.engine.fake import FakeSession
from pilotlight.engine.policy import Policy
from pilotlight.metering.keyring import KeyDesk
from pilotlight.metering.keys import Limits
from support import VOCAB_SIZE, Serving, serving

CACHING = Policy(max_chunk_tokens=8, prefix_cache_bytes=1 << 20)
PROMPT = list(range(1, 31))


async def num_cached(toy: Serving, prompt: list[int], token: str | None = None, **params: Any) -> int:
    headers = {"authorization": f"Bearer {token}"} if token else {}
    body = {"model": "toy", "prompt": prompt, "max_tokens": 2, "ignore_eos": True, **params}
    answer = (await toy.client.post("/v1/completions", json=body, headers=headers)).json()
    usage = answer["usage"]
    record = toy.ledger.get(answer["id"])
    assert record is not None
    assert record.cached_tokens == usage["prompt_tokens_details"]["cached_tokens"]
    assert usage["prompt_tokens"] == len(prompt)
    return int(record.cached_tokens)


def test_the_second_request_says_what_was_cached_and_for_whom(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def check() -> None:
        async with serving(toy_artifact, tmp_path, FakeSession(VOCAB_SIZE), policy=CACHING) as toy:
            assert await num_cached(toy, PROMPT) == 0
            assert await num_cached(toy, PROMPT) == 24
            assert await num_cached(toy, [*PROMPT[:17], 99, 98]) == 16
            assert await num_cached(toy, PROMPT, prompt_cache_key="other") == 0
            assert await num_cached(toy, PROMPT, prompt_cache_key="other") == 24
            metrics = (await toy.client.get("/metrics")).text
            assert 'pilotlight_prefix_cache_hits{function="toy"} 64.0' in metrics

    asyncio.run(check())


def test_the_choices_of_one_request_read_its_prompt_once(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def check() -> None:
        async with serving(toy_artifact, tmp_path, FakeSession(VOCAB_SIZE), policy=CACHING) as toy:
            assert await num_cached(toy, PROMPT, n=3) == 0
            assert toy.function.backend.signals().num_prefix_hit_tokens == 48

    asyncio.run(check())


def test_another_tenant_finds_nothing(toy_artifact: Artifact, tmp_path: Path) -> None:
    with KeyDesk(tmp_path / "usage.db") as desk:
        tokens = [desk.create("app", tenant, None, Limits(), admin=False)[1] for tenant in ("a", "b")]

    async def check() -> None:
        async with serving(toy_artifact, tmp_path, FakeSession(VOCAB_SIZE), policy=CACHING) as toy:
            assert [await num_cached(toy, PROMPT, token) for token in (*tokens, *tokens)] == [0, 0, 24, 24]

    asyncio.run(check())
