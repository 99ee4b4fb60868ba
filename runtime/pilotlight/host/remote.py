"""A backend whose replicas are on other machines, where somebody else starts, places and replaces them.

It keeps the journal of each open sequence and carries it from attempt to attempt: when a replica is lost, or hands over
because its machine has to leave, the sequence goes on elsewhere behind its last token. Clients see a pause.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

import msgspec

from pilotlight.errors import Draining, QueueFull
from pilotlight.host.attempt import Attempt, FromAttempt, HandOver, Part
from pilotlight.host.journal import Entry
from pilotlight.host.measures import Measures
from pilotlight.host.wire import Stages
from pilotlight.mailbox import TokenStream
from pilotlight.request import Sequence, Signals, Start, TokenEvent

logger = logging.getLogger("pilotlight.host")

RETRY_S = 0.2
MAX_RETRY_S = 5.0
"""How long to wait after attempts that brought nothing: first so short, twice as long each time, and at most so long.

As many as make a sequence fail take a quarter of a minute, in which Ray finds out which machines are gone.
"""


class ReplicaLost(Exception):
    """An attempt's replica is gone, cannot be reached or contradicts itself; the sequence has to go on elsewhere."""


class Place(Protocol):
    """Where replicas are: a deployment, with somebody's routing before it."""

    def attempt(self, attempt: Attempt) -> AsyncGenerator[FromAttempt, None]:
        """Have some replica take an attempt and yield what it answers, the finish last.

        Closing the iterator ends the attempt there, too.

        Raises:
            ReplicaLost: before the finish, there will be no more answers.
        """

    def leaving(self, replica_id: str) -> None:
        """Send nothing more to this replica."""


class Watcher(Protocol):
    """Told what happens, for metrics."""

    def replica_lost(self, function: str) -> None:
        """An attempt ended before its sequence did."""


@dataclass(frozen=True, slots=True)
class RemoteSettings:
    """What a backend has to know of its function. ``max_open`` bounds the sequences that run or wait."""

    name: str
    max_open: int
    max_waiting_tokens: int


class RemoteBackend:
    """The journal of a function's open sequences, before a deployment of replicas."""

    def __init__(
        self,
        settings: RemoteSettings,
        place: Place,
        watcher: Watcher | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self.measures = Measures()
        self._place = place
        self._watcher = watcher
        self._clock = clock
        self._entries: dict[str, Entry] = {}
        self._carriers: dict[str, asyncio.Task[None]] = {}
        self._closing = False

    def submit(self, sequence: Sequence) -> TokenStream:
        """Take a sequence in and return its events; the last one carries a finish reason.

        Raises:
            QueueFull: too many sequences, or prompt tokens, are open.
            Draining: the backend is being closed.
        """
        self._check_room(sequence)
        now = self._clock()
        entry = self._entries[sequence.id] = Entry(sequence, now, cold=True, last_at=now)
        carrier = asyncio.create_task(self._carry(entry), name=f"carry {sequence.id}")
        self._carriers[sequence.id] = carrier
        return entry.stream

    def abort(self, sequence_id: str) -> None:
        """Have a sequence end as cancelled at once; its replica learns it as soon as it can."""
        if (entry := self._entries.pop(sequence_id, None)) is not None:
            entry.aborted = True
            self._carriers.pop(sequence_id).cancel()
            entry.cancel(self._clock())

    def signals(self) -> Signals:
        """Return the load as it is seen from here. Slots and caches are those of machines that others look after."""
        waiting = [entry for entry in self._entries.values() if not entry.has_begun]
        return Signals(
            num_waiting=len(waiting),
            num_running=len(self._entries) - len(waiting),
            num_slots=0,
            num_prefill_backlog_tokens=sum(entry.num_prefill_tokens for entry in waiting),
            kv_used_bytes=0,
            kv_reserved_bytes=0,
        )

    async def close(self) -> None:
        """Cancel what runs."""
        self._closing = True
        carriers = list(self._carriers.values())
        for sequence_id in list(self._entries):
            self.abort(sequence_id)
        await asyncio.gather(*carriers, return_exceptions=True)

    def _check_room(self, sequence: Sequence) -> None:
        if self._closing:
            raise Draining
        if len(self._entries) >= self.settings.max_open:
            raise QueueFull(self.settings.max_open)
        waiting = sum(entry.num_prefill_tokens for entry in self._entries.values() if not entry.has_begun)
        if waiting and waiting + len(sequence.prompt_ids) > self.settings.max_waiting_tokens:
            raise QueueFull(self.settings.max_waiting_tokens, of="prompt tokens")

    async def _carry(self, entry: Entry) -> None:
        """Bring one sequence to its end, over as many replicas as it takes."""
        num_emitted = num_in_vain = 0
        try:
            while not await self._attempt(entry):
                if entry.exhausted:
                    self._fail(entry, "its replica was lost repeatedly while it ran")
                    return
                num_in_vain = num_in_vain + 1 if len(entry.emitted_ids) == num_emitted else 0
                num_emitted = len(entry.emitted_ids)
                if entry.num_fruitless_moves or num_in_vain > 1:  # turned away once, it may go on elsewhere at once
                    await asyncio.sleep(retry_s(num_in_vain))
        except Exception:
            logger.exception("%s: %s cannot be carried on", self.settings.name, entry.sequence.id)
            self._fail(entry, "an internal error occurred")

    async def _attempt(self, entry: Entry) -> bool:
        """Make one attempt; False when the sequence has to go on elsewhere."""
        num_before = len(entry.emitted_ids)
        attempt = Attempt(self.settings.name, entry.continuation(), entry.epoch)
        clock = _RemoteClock(entry)
        try:
            async with aclosing(self._place.attempt(attempt)) as answers:
                async for answer in answers:
                    if isinstance(answer, HandOver):
                        self._place.leaving(answer.replica_id)
                        self._move(entry, num_before, had_slot=False)
                        return False
                    if self._take(entry, answer, clock):
                        return True
        except ReplicaLost as error:
            logger.warning("%s: %s goes on elsewhere: %s", self.settings.name, entry.sequence.id, error)
        if self._watcher is not None:
            self._watcher.replica_lost(self.settings.name)
        self._move(entry, num_before, had_slot=True)
        return False

    def _move(self, entry: Entry, num_before: int, had_slot: bool) -> None:
        if len(entry.emitted_ids) > num_before:
            entry.moved(had_slot=False)
        else:
            entry.turned_away(had_slot)

    def _take(self, entry: Entry, part: Part, clock: _RemoteClock) -> bool:
        """Deliver a part, and return whether that was the end. Tokens that are not the next ones are dropped.

        Raises:
            ReplicaLost: tokens are missing before these.
        """
        if not entry.accepts(part.epoch, part.position):
            if part.epoch < entry.epoch or part.position < entry.position:
                return False
            raise ReplicaLost(f"{part.replica_id} skipped from token {entry.position} to {part.position}")
        now = self._clock()
        if part.stages is not None and entry.cold:
            entry.start = _start_of(part.stages, now - entry.queued_at)
        entry.cold = False
        entry.dispatched_at = entry.dispatched_at or now
        clock.received(part, now)
        for event in part.events:
            self._deliver(entry, clock.rebased(event), part.replica_id)
        return bool(part.events) and part.events[-1].finish is not None

    def _deliver(self, entry: Entry, event: TokenEvent, replica_id: str) -> None:
        if event.prefill_started_at is not None:
            self.measures.prefilled(len(entry.sequence.prompt_ids), event.at - event.prefill_started_at)
        entry.deliver(event, replica_id)
        if event.finish is not None:
            self.measures.served(self._clock() - (entry.dispatched_at or entry.queued_at))
            self._forget(entry)

    def _fail(self, entry: Entry, problem: str) -> None:
        self._forget(entry)
        entry.fail(self._clock(), problem)

    def _forget(self, entry: Entry) -> None:
        self._entries.pop(entry.sequence.id, None)
        self._carriers.pop(entry.sequence.id, None)


def retry_s(num_in_vain: int) -> float:
    """Return how long to wait after so many attempts in a row that brought nothing."""
    return min(MAX_RETRY_S, RETRY_S * 2.0 ** (num_in_vain - 1))


class _RemoteClock:
    """A replica's clock by ours. The part that took the least time says best how they differ; time never runs back."""

    def __init__(self, entry: Entry) -> None:
        self._entry = entry
        self._shift_s = math.inf

    def received(self, part: Part, now: float) -> None:
        self._shift_s = min(self._shift_s, now - part.sent_at)

    def rebased(self, event: TokenEvent) -> TokenEvent:
        """Return an event with its instants by this machine's clock."""
        began_at = event.prefill_started_at
        if began_at is not None:
            began_at = self._entry.last_at = max(self._entry.last_at, began_at + self._shift_s)
        at = self._entry.last_at = max(self._entry.last_at, event.at + self._shift_s)
        return msgspec.structs.replace(event, at=at, prefill_started_at=began_at)


def _start_of(stages: Stages, waited_s: float) -> Start:
    waited_ms = round(max(0.0, waited_s) * 1000, 3)
    return Start(waited_ms, stages.fork_ms, stages.map_ms, stages.session_ms, stages.warm_up_ms, stages.unseal_ms)
