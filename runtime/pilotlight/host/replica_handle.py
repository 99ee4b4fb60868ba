"""A replica as its pool keeps track of it."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import Protocol

from pilotlight.host.journal import Entry
from pilotlight.host.link import Link, TemplateLink
from pilotlight.host.routing import Choice, KnownPrefixes
from pilotlight.host.wire import Beat, Close, Dormant, FromReplica, ReplicaSpec, Stages, Started, Step
from pilotlight.request import Signals

LOOK_AHEAD = 1
"""Sequences that wait in the replica itself, so that a slot which comes free is filled in the same step."""


class State(Enum):
    STARTING = "starting"
    READY = "ready"
    LEAVING = "leaving"


class Owner(Protocol):
    """Whom a replica's messages concern."""

    def received(self, replica: Replica, message: FromReplica) -> None:
        """A message came."""

    def ended(self, replica: Replica, cause: str) -> None:
        """Its process is gone."""


class Replica:
    """One replica: its link, its state, and the sequences it was given. It is also its link's listener."""

    link: Link

    def __init__(self, spec: ReplicaSpec, owner: Owner, num_bytes: int) -> None:
        self.id = spec.replica_id
        self.num_bytes = num_bytes
        self.asked_at = self.ready_at = self.used_at = spec.asked_at
        self.state = State.STARTING
        self.entries: dict[str, Entry] = {}
        self.stages: Stages | None = None
        self.pid: int | None = None
        self.signals: Signals | None = None
        self.silent_ticks = 0
        self._owner = owner
        self._num_slots = spec.num_slots
        self._num_steps = 0
        self._stalled_ticks = 0
        self._prefixes = KnownPrefixes(spec.policy.prefix_block_tokens)
        self._keys: dict[str, list[bytes]] = {}

    @property
    def starting(self) -> bool:
        return self.state is State.STARTING

    @property
    def has_place(self) -> bool:
        return len(self.entries) < self._num_slots + LOOK_AHEAD

    def choice(self, keys: Iterable[bytes]) -> Choice:
        """Return what routing has to know, for a prompt with these prefix keys."""
        outstanding = sum(entry.num_prefill_tokens if not entry.has_begun else 1 for entry in self.entries.values())
        # a sequence behind full slots has to wait for one of them to end, whatever its tokens
        crowded = 1_000_000 if len(self.entries) >= self._num_slots else 0
        return Choice(outstanding + crowded, self._prefixes.num_tokens(keys))

    def take(self, entry: Entry, keys: list[bytes], now: float) -> None:
        self.entries[entry.sequence.id] = entry
        self._keys[entry.sequence.id] = keys
        self._prefixes.begin(keys)
        entry.dispatched_at = self.used_at = now

    def drop(self, entry: Entry, now: float) -> None:
        del self.entries[entry.sequence.id]
        self._prefixes.end(self._keys.pop(entry.sequence.id))
        self.used_at = now

    def ready(self, message: Started, now: float) -> None:
        if self.state is State.STARTING:
            self.state = State.READY
        self.pid, self.stages = message.pid, message.stages
        self.ready_at = self.used_at = now

    def leave(self) -> None:
        """Have the process end once it is told; it takes nothing more."""
        self.state = State.LEAVING
        self.link.send(Close())

    def kill(self) -> None:
        self.link.kill()

    def progressed(self, message: Step) -> None:
        self.signals = message.signals
        self._prefixes.change(message.prefixes)
        self._stalled_ticks = 0

    def beat(self, message: Beat) -> None:
        self.signals = message.signals
        if message.num_steps != self._num_steps:
            self._num_steps = message.num_steps
            self._stalled_ticks = 0

    def tick(self) -> int:
        """Count a second, and return for how many it has been silent, or has not moved although it has work."""
        self.silent_ticks += 1
        self._stalled_ticks = self._stalled_ticks + 1 if self.entries else 0
        return max(self.silent_ticks, self._stalled_ticks)

    def received(self, message: FromReplica) -> None:
        self._owner.received(self, message)

    def ended(self, cause: str) -> None:
        self._owner.ended(self, cause)


class TemplateHandle:
    """The template of a function, if there is one."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.num_bytes = 0
        self.link: TemplateLink | None = None
        self.pid: int | None = None
        self.failed = False

    @property
    def in_the_making(self) -> bool:
        return self.link is not None and self.pid is None

    @property
    def forks(self) -> TemplateLink | None:
        """What replicas can be forked from."""
        return self.link if self.pid is not None else None

    def dormant(self, message: Dormant) -> None:
        self.pid = message.pid

    def gone(self) -> None:
        self.link = self.pid = None
