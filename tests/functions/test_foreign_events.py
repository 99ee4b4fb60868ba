"""Events of other services: each is refused by name or answered, and none ends the process.

The events of ``foreign_events`` are written after AWS's documentation, not recorded; eight recorded ones are in
``test_event.py``, and here with pieces changed.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from event import UnsupportedEvent
from fake_runtime_api import Exchange
from foreign_events import EVENTS, QUERY, mutations
from lambda_support import on_lambda
from pilotlight.artifact import Artifact
from test_event import HTTP_EVENTS, REFUSALS, parsed, recorded
from test_handler import status_of, wait_for


def test_there_are_more_than_a_hundred() -> None:
    assert len(EVENTS) >= 100
    assert len({json.dumps(event, sort_keys=True) for event, _ in EVENTS.values()}) == len(EVENTS)


@pytest.mark.parametrize("name", EVENTS)
def test_each_is_refused_by_what_it_is(name: str) -> None:
    event, described = EVENTS[name]
    with pytest.raises(UnsupportedEvent) as refusal:
        parsed(event)
    assert refusal.value.message.startswith(f"cannot answer {described};")
    assert (refusal.value.reading is not None) is (described == QUERY)


def outcome(exchange: Exchange) -> str:
    """Return what became of an invocation: the error's type, or the status of its answer."""
    exchange.wait()
    if exchange.error is not None:
        return str(exchange.error["errorType"])
    raw = exchange.body()
    prelude, _, _ = raw.partition(bytes(8))
    answer: Any = json.loads(prelude)
    return str(answer["statusCode"]) if "statusCode" in answer else "payload"


def test_one_process_lives_through_all_of_them(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> Counter[str]:
        found: Counter[str] = Counter()
        async with on_lambda(toy_artifact, tmp_path) as aws:
            for event, described in EVENTS.values():
                seen = await wait_for(partial(outcome, aws.platform.invoke(event)))
                assert seen == ("501" if described == QUERY else "Pilotlight.UnsupportedEvent")
                found[seen] += 1
            assert await status_of(aws, "/livez") == 200
        return found

    found = asyncio.run(scenario())
    assert sum(found.values()) == len(EVENTS)


def test_a_balancer_that_wants_lists_gets_lists(toy_artifact: Artifact, tmp_path: Path) -> None:
    """With multi-value headers switched on, a load balancer takes no other headers for an answer."""

    async def scenario() -> None:
        async with on_lambda(toy_artifact, tmp_path) as aws:
            event, _ = EVENTS["balancer with multi-value headers"]
            answer = json.loads(await wait_for(aws.platform.invoke(event).body))
            assert answer["multiValueHeaders"]["content-type"] == ["application/json"]
            assert json.loads(answer["body"])["error"]["code"] == "unsupported_event"

    asyncio.run(scenario())


@pytest.mark.parametrize("name", [*HTTP_EVENTS, *REFUSALS])
def test_recorded_events_with_a_piece_changed_are_no_crash_either(name: str) -> None:
    for changed, event in mutations(json.loads(recorded(name))).items():
        with suppress(UnsupportedEvent):
            assert parsed(event).scope["type"] == "http", changed
