"""A function's queue before its replicas: a backend that starts them on demand and moves sequences when one dies.

Everything here runs on the event loop. ``act`` is the one place where anything is decided: it sends waiting sequences
to replicas, and asks the autoscaler how many there should be. The fleet carries that out.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol

import msgspec

from pilotlight.errors import Draining, QueueFull, StartFailed
from pilotlight.host.autoscaler import Load, Sleep, needed_replicas, predicted_wait_s, sleep_of, wanted_replicas
from pilotlight.host.back_off import BackOff
from pilotlight.host.backlog import Backlog
from pilotlight.host.fleet import Fleet, Unstartable
from pilotlight.host.journal import Entry
from pilotlight.host.link import Launcher
from pilotlight.host.machine import Machine
from pilotlight.host.measures import Measures
from pilotlight.host.memory import Idle
from pilotlight.host.pool_settings import PoolSettings
from pilotlight.host.replica_handle import Replica, State
from pilotlight.host.routing import PrefixKeys, prefix_keys, route
from pilotlight.host.wire import Abort, Beat, Failed, FromReplica, Stages, Started, Step, Submit
from pilotlight.mailbox import TokenStream
from pilotlight.request import Sequence, Signals, Start, TokenEvent

logger = logging.getLogger("pilotlight.host")

CLOSE_TIMEOUT_S = 5.0
NUM_WARM_UP_TOKENS = 2


class Watcher(Protocol):
    """Told what happens to replicas, for metrics."""

    def replica_started(self, function: str, stages: Stages) -> None:
        """A replica is ready."""

    def replica_lost(self, function: str) -> None:
        """A replica died that should not have."""


class Pool:
    """The open sequences of one version of a function, and the replicas that they are on."""

    def __init__(
        self,
        settings: PoolSettings,
        launcher: Launcher,
        machine: Machine,
        watcher: Watcher | None = None,
        clock: Callable[[], float] = time.monotonic,
        prefix_keys: PrefixKeys = prefix_keys,
    ) -> None:
        self.settings = settings
        self.fleet = Fleet(settings, launcher, machine, self, clock)
        self.measures = Measures()
        self._machine = machine
        self._watcher = watcher
        self._clock = clock
        self._prefix_keys = prefix_keys
        self._backlog = Backlog()
        self._back_off = BackOff()
        self._entries: dict[str, Entry] = {}
        self._places: dict[str, Replica] = {}
        self._floor = settings.policy.min_replicas
        self._last_used_at = clock()
        self._surplus_since: float | None = None
        self._closing = self._resting = False
        self._changed = asyncio.Event()
        machine.join(self)

    # what a function calls

    def submit(self, sequence: Sequence) -> TokenStream:
        """Take a sequence in and return its events; the last one carries a finish reason.

        Raises:
            QueueFull: too many requests, or prompt tokens, are waiting.
            StartFailed: no replica can be started at present.
            Draining: the pool is being closed.
        """
        self._check_room(sequence)
        now = self._clock()
        entry = self._entries[sequence.id] = Entry(sequence, now)
        entry.cold = not self.fleet.ready
        self._backlog.push(entry)
        self.measures.arrived(now)
        self.act()
        return entry.stream

    def abort(self, sequence_id: str) -> None:
        """Have a sequence end as cancelled: at once where it waits, before the next step where it runs."""
        entry = self._entries.get(sequence_id)
        if entry is None:
            return
        entry.aborted = True
        if (replica := self._places.get(sequence_id)) is not None:
            replica.link.send(Abort(sequence_id))
        elif self._backlog.remove(entry):
            self._forget(entry)
            entry.cancel(self._clock())

    def signals(self) -> Signals:
        """Return the load of all replicas, and the queue before them."""
        load = self.fleet.signals()
        num_waiting = load.num_waiting + len(self._backlog)
        num_tokens = load.num_prefill_backlog_tokens + self._backlog.num_tokens
        return msgspec.structs.replace(load, num_waiting=num_waiting, num_prefill_backlog_tokens=num_tokens)

    async def close(self) -> None:
        """Cancel what runs and end all replicas."""
        self._closing = True
        for sequence_id in list(self._entries):
            self.abort(sequence_id)
        for replica in list(self.fleet.replicas.values()):
            if replica.state is State.STARTING:
                replica.kill()
            if not replica.entries:
                replica.leave()
        try:
            await asyncio.wait_for(self.fleet.emptied(), CLOSE_TIMEOUT_S)
        except TimeoutError:
            self.fleet.kill()
            await self.fleet.emptied()
        self.fleet.drop_template()
        self._machine.leave(self)

    # what the host calls

    @property
    def num_queued(self) -> int:
        return len(self._backlog)

    @property
    def num_queued_tokens(self) -> int:
        return self._backlog.num_tokens

    @property
    def num_open(self) -> int:
        return len(self._entries)

    @property
    def idle_s(self) -> float:
        """How long nothing has been asked for."""
        return 0.0 if self._entries else self._clock() - self._last_used_at

    @property
    def failure(self) -> str:
        """Why the last start failed, or nothing."""
        return self._back_off.cause

    async def started(self) -> None:
        """Have one replica started, if there is none, and wait for it.

        Raises:
            StartFailed: it could not be.
        """
        self.hold(max(1, self._floor))
        while not self.fleet.ready:
            if self.failure:
                raise StartFailed(self.failure)
            self._changed.clear()
            await self._changed.wait()

    async def rest(self) -> None:
        """Let all replicas go, and the template, and wait until their memory is free."""
        self._floor = 0
        self._resting = True
        self.fleet.drop_template()
        self.fleet.let_go(self.fleet.spare)
        await self.fleet.emptied()
        self._resting = False

    def hold(self, num_replicas: int) -> None:
        """Keep at least so many replicas, whatever the load."""
        self._floor = num_replicas
        self.act()

    def load(self) -> Load:
        """Return what the autoscaler decides from."""
        now = self._clock()
        signals = self.signals()
        return Load(
            num_replicas=self.fleet.num_staying,
            num_waiting=len(self._backlog),
            num_running=len(self._entries) - len(self._backlog),
            backlog_tokens=signals.num_prefill_backlog_tokens,
            prefill_tokens_per_s=self.measures.prefill_tokens_per_s,
            service_s=self.measures.service_s,
            arrivals_per_s=self.measures.arrivals_per_s(now),
            oldest_wait_s=max((now - entry.queued_at for entry in self._backlog), default=0.0),
            kv_used_ratio=signals.kv_used_bytes / max(1, signals.kv_reserved_bytes),
            start_s=self.measures.start_s,
            idle_s=self.idle_s,
            surplus_s=now - self._surplus_since if self._surplus_since is not None else 0.0,
        )

    def tick(self) -> None:
        """A second has passed: see who is hung, and whether there is too little or too much."""
        for replica in list(self.fleet.replicas.values()):
            if replica.tick() > (self.settings.start_ticks if replica.starting else self.settings.hang_ticks):
                logger.warning("%s: replica %s hangs, and is killed", self.settings.name, replica.id)
                replica.kill()
        self.act()

    def act(self) -> None:
        """Send what waits to where there is a place, and have the right number of replicas."""
        self._dispatch()
        if not self._closing and not self._resting:
            self._scale()

    def idle(self) -> list[Idle]:
        """Return the replicas that could leave, were their memory needed."""
        return self.fleet.idle(self._floor, self.idle_s, self.measures.start_s * 1000)

    def evict(self, name: str) -> None:
        """Let an idle replica go, or the template."""
        self.fleet.evict(name)

    # what replicas say

    def received(self, replica: Replica, message: FromReplica) -> None:
        replica.silent_ticks = 0
        if isinstance(message, Step):
            replica.progressed(message)
            for sequence_id, event in message.events:
                self._deliver(replica, sequence_id, event)
            self._dispatch()
        elif isinstance(message, Beat):
            replica.beat(message)
        elif isinstance(message, Started):
            self._started(replica, message)
        elif isinstance(message, Failed):
            self.fleet.remove(replica)
            self._start_failed(message.problem)
            replica.link.close()

    def ended(self, replica: Replica, cause: str) -> None:
        """A replica's process is gone: on request, or its sequences have to go on elsewhere."""
        if replica.id not in self.fleet.replicas:
            return
        was = replica.state
        self.fleet.remove(replica)
        if was is not State.LEAVING:
            logger.warning("%s: replica %s is lost: %s", self.settings.name, replica.id, cause)
            if self._watcher is not None:
                self._watcher.replica_lost(self.settings.name)
        self._requeue(replica)
        if was is State.STARTING and (found := self._back_off.killed()) is not None:
            self._start_failed(found)
        self.act()

    # the rest

    def _check_room(self, sequence: Sequence) -> None:
        if self._closing:
            raise Draining
        settings, num_ready = self.settings, len(self.fleet.ready)
        if not num_ready and (left_s := self._back_off.left_s(self._clock())) > 0:
            raise StartFailed(self.failure, left_s)
        num_places = settings.spec.num_slots * max(1, num_ready) + settings.max_queued_requests
        if len(self._entries) >= num_places:
            raise QueueFull(settings.max_queued_requests, self._drain_s())
        num_tokens = self._backlog.num_tokens + len(sequence.prompt_ids)
        if self._backlog and num_tokens > settings.max_queued_tokens:
            raise QueueFull(settings.max_queued_tokens, self._drain_s(), "prompt tokens")

    def _drain_s(self) -> float:
        """Predict how long it takes until what waits now has its turn."""
        load, num_ready = self.load(), len(self.fleet.ready)
        wait_s = predicted_wait_s(load, self.settings.policy, max(1, num_ready))
        return min(600.0, max(1.0, wait_s + (0 if num_ready else load.start_s)))

    def _dispatch(self) -> None:
        while self._backlog and (open_replicas := [replica for replica in self.fleet.ready if replica.has_place]):
            entry = self._backlog.pop()
            keys = self._prefix_keys(entry.sequence, self.settings.spec.policy)
            replica = open_replicas[route([replica.choice(keys) for replica in open_replicas])]
            replica.take(entry, keys, self._clock())
            self._places[entry.sequence.id] = replica
            if entry.cold and replica.stages is not None:
                entry.start = _start_of(replica.stages, replica.ready_at - entry.queued_at)
                entry.cold = False
            replica.link.send(Submit(entry.continuation()))

    def _deliver(self, replica: Replica, sequence_id: str, event: TokenEvent) -> None:
        entry = replica.entries.get(sequence_id)
        if entry is None:
            return
        if event.prefill_started_at is not None:
            self.measures.prefilled(len(entry.sequence.prompt_ids), event.at - event.prefill_started_at)
        if event.token_id is not None:
            self._backlog.charge(entry.tenant, 1)
        if event.finish is not None:
            replica.drop(entry, self._clock())
            self._forget(entry)
            if entry.dispatched_at is not None:
                self.measures.served(self._clock() - entry.dispatched_at)
        entry.deliver(event, replica.id)
        if event.finish is not None and not replica.entries and (self._closing or replica.state is State.LEAVING):
            replica.leave()

    def _scale(self) -> None:
        now, fleet = self._clock(), self.fleet
        load, policy = self.load(), self.settings.policy
        surplus = max(self._floor, needed_replicas(load, policy)) < load.num_replicas
        self._surplus_since = (self._surplus_since or now) if surplus else None
        wanted = max(self._floor, wanted_replicas(load, policy))
        for _ in range(wanted - load.num_replicas):
            if self._back_off.left_s(now) > 0 or not self._start():
                break
        spare = fleet.spare
        if wanted == 0 and spare and fleet.prepare_to_sleep():
            return  # they leave when the template is there
        fleet.let_go(spare[: max(0, load.num_replicas - wanted)])
        if sleep_of(policy, load.num_replicas, load.idle_s) is Sleep.DEEP:
            fleet.drop_template()

    def _start(self) -> bool:
        try:
            return self.fleet.start(0 if self._backlog else NUM_WARM_UP_TOKENS)
        except Unstartable as error:
            self._start_failed(str(error))
            return False

    def _started(self, replica: Replica, message: Started) -> None:
        now = self._clock()
        replica.ready(message, now)
        self._changed.set()
        self._back_off.succeeded()
        self.measures.started(now - replica.asked_at)
        self.fleet.started(message.pid)
        if self._watcher is not None:
            self._watcher.replica_started(self.settings.name, message.stages)
        self._last_used_at = now if not self._entries else self._last_used_at
        self.act()

    def _start_failed(self, cause: str) -> None:
        """Tell all who wait why, and let some time pass before the next try."""
        self._changed.set()
        logger.error("%s: a replica could not start: %s", self.settings.name, cause)
        now = self._clock()
        back_off_s = self._back_off.failed(cause, now)
        while self._backlog and not self.fleet.ready:
            entry = self._backlog.pop()
            self._forget(entry)
            entry.fail(now, f"the function cannot start: {cause}", back_off_s)

    def _requeue(self, replica: Replica) -> None:
        """Put the sequences of a lost replica before all others, in their order."""
        now = self._clock()
        for place, entry in enumerate(replica.entries.values()):
            self._places.pop(entry.sequence.id, None)
            entry.moved(had_slot=place < self.settings.spec.num_slots)
            if entry.aborted:
                self._forget(entry)
                entry.cancel(now)
            elif entry.exhausted:
                self._forget(entry)
                entry.fail(now, "its replica died repeatedly while it ran")
            else:
                entry.cold = not entry.has_begun
                self._backlog.push_front(entry)
        replica.entries.clear()

    def _forget(self, entry: Entry) -> None:
        self._entries.pop(entry.sequence.id, None)
        self._places.pop(entry.sequence.id, None)
        self._last_used_at = self._clock()


def _start_of(stages: Stages, waited_s: float) -> Start:
    waited_ms = round(max(0.0, waited_s) * 1000, 3)
    return Start(waited_ms, stages.fork_ms, stages.map_ms, stages.session_ms, stages.warm_up_ms, stages.unseal_ms)
