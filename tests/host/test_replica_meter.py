"""How long replicas live and work: looked at many times, written down now and then, and nothing twice."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from pilotlight.errors import LedgerUnavailable
from pilotlight.host.replica_meter import Rate, ReplicaMeter, Seen
from pilotlight.metering.machine_cost import ReplicaTime

RATE = Rate("toy", "USD", 90_000)


class Times:
    """A ledger that adds up, unless its disk is full."""

    def __init__(self) -> None:
        self.alive_ms: Counter[str] = Counter()
        self.busy_ms: Counter[str] = Counter()
        self.full = False

    async def add_replica_time(self, spent: ReplicaTime) -> None:
        if self.full:
            raise LedgerUnavailable("full")
        assert (spent.function, spent.currency, spent.micros_per_hour) == RATE
        self.alive_ms[spent.replica_id] += spent.alive_ms
        self.busy_ms[spent.replica_id] += spent.busy_ms


@pytest.fixture
def times() -> Times:
    return Times()


def test_life_and_work_add_up(times: Times) -> None:
    now = 100.0
    replicas: list[Seen] = []
    meter = ReplicaMeter(times, clock=lambda: now)
    meter.watch(RATE, lambda: replicas)
    for seen in (
        [],
        [Seen("a", False)],
        [Seen("a", True), Seen("b", False)],
        [Seen("a", True), Seen("b", True)],
        [Seen("b", False)],
        [],
    ):
        replicas[:] = seen
        now += 0.25
        meter.look()
        asyncio.run(meter.write())
    assert times.alive_ms == {"a": 750, "b": 750}
    assert times.busy_ms == {"a": 500, "b": 250}


def test_what_cannot_be_written_is_written_the_next_time(times: Times) -> None:
    now = 0.0
    meter = ReplicaMeter(times, clock=lambda: now)
    meter.watch(RATE, lambda: [Seen("a", True)])
    for times.full in (True, True, False):
        now += 1.0
        meter.look()
        asyncio.run(meter.write())
    asyncio.run(meter.write())
    assert times.alive_ms == times.busy_ms == {"a": 3000}


def test_two_who_write_at_the_same_time_write_nothing_twice_and_forget_nothing(times: Times) -> None:
    now = 0.0
    meter = ReplicaMeter(times, clock=lambda: now)
    meter.watch(RATE, lambda: [Seen("a", True), Seen("b", False)])
    add = times.add_replica_time

    async def look_and_add(spent: ReplicaTime) -> None:
        nonlocal now
        if now < 1.0:  # time goes on while a write is under way
            now += 0.25
            meter.look()
        await asyncio.sleep(0)
        await add(spent)

    times.add_replica_time = look_and_add  # type: ignore[method-assign]

    async def scenario() -> None:
        nonlocal now
        now = 0.5
        meter.look()
        await asyncio.gather(meter.write(), meter.write())
        await meter.write()

    asyncio.run(scenario())
    assert times.alive_ms == {"a": 1000, "b": 1000}
    assert times.busy_ms == {"a": 1000, "b": 0}
