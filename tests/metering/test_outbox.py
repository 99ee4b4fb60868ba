"""Usage events: every one arrives at least once, and exactly once after its receiver removed repetitions."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from admissions import admission, ended
from ledgers import KINDS, fresh, writer
from pilotlight.config import EventSettings
from pilotlight.host.courier import Courier
from pilotlight.metering.cloud_event import MAX_DELAY_S, delay_s
from pilotlight.metering.database import Location
from pilotlight.metering.ledger_reader import LedgerReader
from pilotlight.metering.outbox import DueEvent
from pilotlight.metering.sql_ledger import SqlLedger
from receiver import Receiver, receiver

NUM_EVENTS = 200


@pytest.fixture(params=KINDS)
def path(request: pytest.FixtureRequest) -> Iterator[Location]:
    with fresh(request.param) as location:
        yield location


def settings_for(server: Receiver, **changes: Any) -> EventSettings:
    return EventSettings(**{"url": server.url, "first_retry_s": 0.001, "max_attempts": 1000, **changes})


async def invoke(ledger: SqlLedger, request_id: str) -> str:
    admitted = admission(request_id, None)
    record = ended(admitted, completion_tokens=2)
    await ledger.admit(admitted)
    await ledger.finish(record)
    return record.event_id


async def deliver_all(ledger: SqlLedger, settings: EventSettings) -> None:
    courier = Courier(ledger, settings)
    with LedgerReader(ledger.location) as reader:
        while any(num_waiting for _, num_waiting, _ in reader.outbox_counts()):
            await courier.deliver()
    courier.close()


def test_a_receiver_that_fails_half_of_the_time_gets_every_event(path: Location) -> None:
    with (
        receiver(["none", "none", "none", "refuse", "forget", "hang up"]) as server,
        writer(path) as ledger,
    ):

        async def scenario() -> list[str]:
            await ledger.subscribe(server.url)
            ids = [await invoke(ledger, f"{number}") for number in range(NUM_EVENTS)]
            await deliver_all(ledger, settings_for(server))
            return ids

        sent = asyncio.run(scenario())
    received = Counter((event["source"], event["id"]) for event in server.events)
    assert received.keys() == {("pilotlight", event_id) for event_id in sent}
    assert server.num_requests > NUM_EVENTS * 1.5
    assert max(received.values()) > 1, "some came more than once, or nothing was tried"
    once = {event["id"]: event["data"] for event in server.events}
    assert len(once) == NUM_EVENTS
    assert all(event["data"] == once[event["id"]] for event in server.events)


def test_an_event_is_a_cloud_event_with_its_record(path: Location) -> None:
    with receiver(["none"]) as server, writer(path) as ledger:

        async def scenario() -> None:
            await ledger.subscribe(server.url)
            await invoke(ledger, "a")
            await deliver_all(ledger, settings_for(server, source="here", authorization="Bearer x"))

        asyncio.run(scenario())
        record = ledger.get("a")
    (event,) = server.events
    assert record is not None
    assert {name: event[name] for name in ("specversion", "type", "source", "id", "subject", "time")} == {
        "specversion": "1.0",
        "type": "pilotlight.usage.recorded",
        "source": "here",
        "id": record.event_id,
        "subject": "a",
        "time": record.started_at_utc,
    }
    assert event["data"]["completion_tokens"] == 2
    (headers,) = server.headers
    assert headers["content-type"].startswith("application/cloudevents+json")
    assert headers["authorization"] == "Bearer x"


def test_a_crash_is_told_too_and_a_restart_forgets_nothing(path: Location) -> None:
    with receiver(["none"]) as server:
        with writer(path) as ledger:
            asyncio.run(ledger.subscribe(server.url))
            asyncio.run(invoke(ledger, "finished"))
            asyncio.run(ledger.admit(admission("cut off", None)))
        with writer(path) as ledger:
            asyncio.run(deliver_all(ledger, settings_for(server)))
    assert [(event["subject"], event["data"]["finish_reason"]) for event in server.events] == [
        ("finished", "stop"),
        ("cut off", "crashed"),
    ]


def test_what_fails_too_often_is_a_dead_letter(path: Location) -> None:
    with receiver(["refuse"]) as server, writer(path) as ledger, LedgerReader(path) as reader:

        async def scenario() -> None:
            await ledger.subscribe(server.url)
            await invoke(ledger, "a")
            await deliver_all(ledger, settings_for(server, max_attempts=3))

        asyncio.run(scenario())
        assert reader.outbox_counts() == [(server.url, 0, 1)]
    assert server.num_requests == 3


def test_nobody_is_told_without_a_subscription_or_after_it(path: Location) -> None:
    with writer(path) as ledger, LedgerReader(path) as reader:
        asyncio.run(invoke(ledger, "before"))
        asyncio.run(ledger.subscribe("http://127.0.0.1:1/"))
        asyncio.run(invoke(ledger, "while"))
        asyncio.run(ledger.subscribe(None))
        asyncio.run(invoke(ledger, "after"))
        assert reader.outbox_counts() == [("http://127.0.0.1:1/", 1, 0)]


def test_an_unreachable_receiver_is_tried_again_later(path: Location) -> None:
    with receiver(["none"]) as server:
        url = server.url
    with writer(path) as ledger, LedgerReader(path) as reader:
        asyncio.run(ledger.subscribe(url))
        asyncio.run(invoke(ledger, "a"))
        courier = Courier(ledger, EventSettings(url=url, first_retry_s=100))
        assert asyncio.run(courier.deliver()) == 1
        assert asyncio.run(courier.deliver()) == 0, "not due yet"
        assert reader.outbox_counts() == [(url, 1, 0)]


def test_a_courier_goes_on_after_a_defect(path: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pilotlight.host.courier.IDLE_S", 0.001)
    with receiver(["none"]) as server, writer(path) as ledger:
        asyncio.run(ledger.subscribe(server.url))
        asyncio.run(invoke(ledger, "a"))
        courier = Courier(ledger, settings_for(server))
        attempt = courier._try

        def fail_once(event: DueEvent) -> str | None:
            monkeypatch.setattr(courier, "_try", attempt)
            raise ValueError("a header that is none")

        monkeypatch.setattr(courier, "_try", fail_once)

        async def scenario() -> None:
            running = asyncio.create_task(courier.run())
            while not server.events:
                await asyncio.sleep(0.001)
            running.cancel()

        asyncio.run(scenario())
    assert len(server.events) == 1


@pytest.mark.parametrize("num_attempts", [1, 2, 5, 12, 10_000])
def test_the_wait_doubles_up_to_a_limit_and_is_never_quite_the_same(num_attempts: int) -> None:
    longest = min(MAX_DELAY_S, 2.0 ** min(num_attempts - 1, 40))
    found = {delay_s(num_attempts, 1.0, random.Random(seed)) for seed in range(20)}
    assert len(found) == 20
    assert all(longest / 2 <= delay <= longest for delay in found)
