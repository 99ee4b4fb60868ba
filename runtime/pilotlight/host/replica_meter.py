"""Writes down how long replicas live and work: every few seconds, so that a killed host forgets no more than that."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import NamedTuple, Protocol

from pilotlight.errors import LedgerUnavailable
from pilotlight.metering.machine_cost import ReplicaTime

SAMPLE_S = 0.1
WRITE_S = 10.0


class ReplicaTimeLedger(Protocol):
    """Where the time of replicas is kept."""

    async def add_replica_time(self, spent: ReplicaTime) -> None:
        """Add to how long a replica lived and worked."""


class Seen(NamedTuple):
    """A replica at one instant."""

    replica_id: str
    is_busy: bool


class Rate(NamedTuple):
    """What each replica of a function costs."""

    function: str
    currency: str
    micros_per_hour: int


class ReplicaMeter:
    """Looks at the replicas of a host many times a second, and adds up how long they lived and worked."""

    def __init__(self, ledger: ReplicaTimeLedger, clock: Callable[[], float] = time.monotonic) -> None:
        self._ledger = ledger
        self._clock = clock
        self._looked_at = clock()
        self._watched: list[tuple[Rate, Callable[[], Iterable[Seen]]]] = []
        self._alive_s: dict[tuple[Rate, str, str], float] = defaultdict(float)
        self._busy_s: dict[tuple[Rate, str, str], float] = defaultdict(float)
        self._writing = asyncio.Lock()

    def watch(self, rate: Rate, replicas: Callable[[], Iterable[Seen]]) -> None:
        """Meter the replicas of a function from now on."""
        self._watched.append((rate, replicas))

    async def run(self) -> None:
        """Look and write, until the task is cancelled."""
        while True:
            for _ in range(round(WRITE_S / SAMPLE_S)):
                await asyncio.sleep(SAMPLE_S)
                self.look()
            await self.write()

    def look(self) -> None:
        """Count the time since the last look for whoever lives and whoever works now."""
        now = self._clock()
        passed_s, self._looked_at = now - self._looked_at, now
        day = datetime.now(UTC).strftime("%Y-%m-%d")
        for rate, replicas in self._watched:
            for seen in replicas():
                self._alive_s[rate, seen.replica_id, day] += passed_s
                self._busy_s[rate, seen.replica_id, day] += passed_s if seen.is_busy else 0.0

    async def write(self) -> None:
        """Write what was counted; what cannot be written now is written the next time."""
        async with self._writing:  # a host that ends writes, too, and perhaps while this is under way
            for key in list(self._alive_s):
                alive_s, busy_s = self._alive_s.pop(key), self._busy_s.pop(key)
                rate, replica_id, day = key
                alive_ms, busy_ms = round(alive_s * 1000), round(busy_s * 1000)
                spent = ReplicaTime(
                    replica_id, rate.function, day, rate.currency, rate.micros_per_hour, alive_ms, busy_ms
                )
                try:
                    await self._ledger.add_replica_time(spent)
                except LedgerUnavailable:
                    self._alive_s[key] += alive_s
                    self._busy_s[key] += busy_s
