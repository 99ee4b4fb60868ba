"""A function's replicas and its queue: a backend that starts them on demand and moves sequences when one dies.

Everything here runs on the event loop. ``act`` is the one place where anything is decided: it sends waiting sequences
to replicas, and asks the autoscaler how many there should be.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import msgspec

from pilotlight.errors import Draining, QueueFull, StartFailed
from pilotlight.host.autoscaler import Load, Policy, Sleep, needed_replicas, predicted_wait_s, sleep_of, wanted_replicas
from pilotlight.host.fair_queue import FairQueue
from pilotlight.host.journal import Entry
from pilotlight.host.link import Launcher, Link
from pilotlight.host.machine import Machine, Room
from pilotlight.host.measures import Measures
from pilotlight.host.memory import Idle, estimated_bytes, private_bytes
from pilotlight.host.replica_handle import Replica, State, TemplateHandle
from pilotlight.host.routing import PrefixKeys, prefix_keys, route
from pilotlight.host.wire import Abort, Beat, Dormant, Failed, FromReplica, ReplicaSpec, Stages, Started, Step, Submit
from pilotlight.mailbox import TokenStream
from pilotlight.request import Sequence, Signals, Start, TokenEvent

logger = logging.getLogger("pilotlight.host")

MAX_KILLED_STARTS = 8
"""What dies so often in a row while it starts, does so by itself. Fewer can be bad luck: on a busy machine, starts take
longer, and whatever kills replicas hits more of them."""

MAX_BACK_OFF_S = 60.0
CLOSE_TIMEOUT_S = 5.0
TEMPLATE_BYTES = 100 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """All that a pool has to know of its function. ``spec`` is what its replicas are made from."""

    name: str
    spec: ReplicaSpec
    policy: Policy
    weights_bytes: int
    kv_bytes: int
    max_queued_requests: int = 64
    max_queued_tokens: int = 65536
    hang_ticks: int = 30
    start_ticks: int = 120


class Watcher(Protocol):
    """Told what happens to replicas, for metrics."""

    def replica_started(self, function: str, stages: Stages) -> None:
        """A replica is ready."""

    def replica_lost(self, function: str) -> None:
        """A replica died that should not have."""


class Pool:
    """The replicas of one version of a function."""

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
        self.replicas: dict[str, Replica] = {}
        self.measures = Measures()
        self._launcher = launcher
        self._machine = machine
        self._watcher = watcher
        self._clock = clock
        self._prefix_keys = prefix_keys
        self._queue = FairQueue()
        self._entries: dict[str, Entry] = {}
        self._places: dict[str, Replica] = {}
        self._floor = settings.policy.min_replicas
        self._last_used_at = clock()
        self._surplus_since: float | None = None
        self._measured_bytes: int | None = None
        self._num_failures = 0
        self._num_killed_starts = 0
        self._retry_at = 0.0
        self._cause = ""
        self._template = TemplateHandle(f"{settings.name}-template")
        self._closing = self._resting = False
        self._changed = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
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
        entry.cold = not self.ready
        self._queue.push(entry)
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
        elif self._queue.remove(entry):
            self._forget(entry)
            entry.cancel(self._clock())

    def signals(self) -> Signals:
        """Return the load of all replicas, and the queue before them."""
        of_replicas = [replica.signals for replica in self.replicas.values() if replica.signals is not None]
        return Signals(
            num_waiting=len(self._queue) + sum(s.num_waiting for s in of_replicas),
            num_running=sum(s.num_running for s in of_replicas),
            num_slots=self.settings.spec.num_slots * len(self.ready),
            num_prefill_backlog_tokens=self._queue.num_tokens + sum(s.num_prefill_backlog_tokens for s in of_replicas),
            kv_used_bytes=sum(s.kv_used_bytes for s in of_replicas),
            kv_reserved_bytes=sum(s.kv_reserved_bytes for s in of_replicas),
            num_preemptions=sum(s.num_preemptions for s in of_replicas),
            num_prefix_query_tokens=sum(s.num_prefix_query_tokens for s in of_replicas),
            num_prefix_hit_tokens=sum(s.num_prefix_hit_tokens for s in of_replicas),
            prefix_cache_bytes=sum(s.prefix_cache_bytes for s in of_replicas),
            num_drafted_tokens=sum(s.num_drafted_tokens for s in of_replicas),
            num_accepted_tokens=sum(s.num_accepted_tokens for s in of_replicas),
        )

    async def close(self) -> None:
        """Cancel what runs and end all replicas."""
        self._closing = True
        for sequence_id in list(self._entries):
            self.abort(sequence_id)
        for replica in list(self.replicas.values()):
            if replica.state is State.STARTING:
                replica.kill()
            if not replica.entries:
                self._let_go(replica)
        try:
            await asyncio.wait_for(self._empty.wait(), CLOSE_TIMEOUT_S)
        except TimeoutError:
            for replica in self.replicas.values():
                replica.kill()
            await self._empty.wait()
        self._drop_template()
        self._machine.leave(self)

    # what the host calls

    @property
    def ready(self) -> list[Replica]:
        return [replica for replica in self.replicas.values() if replica.state is State.READY]

    @property
    def num_queued(self) -> int:
        return len(self._queue)

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
        return self._cause

    @property
    def num_queued_tokens(self) -> int:
        return self._queue.num_tokens

    @property
    def replica_bytes(self) -> int:
        """What one replica may come to need."""
        return estimated_bytes(self.settings.weights_bytes, self.settings.kv_bytes, self._measured_bytes)

    async def started(self) -> None:
        """Have one replica started, if there is none, and wait for it.

        Raises:
            StartFailed: it could not be.
        """
        self.hold(max(1, self._floor))
        while not self.ready:
            if self._cause:
                raise StartFailed(self._cause)
            self._changed.clear()
            await self._changed.wait()

    async def rest(self) -> None:
        """Let all replicas go, and the template, and wait until their memory is free."""
        self._floor = 0
        self._resting = True
        self._drop_template()
        for replica in self.ready:
            if not replica.entries:
                self._let_go(replica)
        await self._empty.wait()
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
            num_replicas=sum(1 for replica in self.replicas.values() if replica.state is not State.LEAVING),
            num_waiting=len(self._queue),
            num_running=len(self._entries) - len(self._queue),
            backlog_tokens=signals.num_prefill_backlog_tokens,
            prefill_tokens_per_s=self.measures.prefill_tokens_per_s,
            service_s=self.measures.service_s,
            arrivals_per_s=self.measures.arrivals_per_s(now),
            oldest_wait_s=max((now - entry.queued_at for entry in self._queue), default=0.0),
            kv_used_ratio=signals.kv_used_bytes / max(1, signals.kv_reserved_bytes),
            start_s=self.measures.start_s,
            idle_s=self.idle_s,
            surplus_s=now - self._surplus_since if self._surplus_since is not None else 0.0,
        )

    def tick(self) -> None:
        """A second has passed: see who is hung, and whether there is too little or too much."""
        for replica in list(self.replicas.values()):
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
        spare = [replica for replica in self.ready if not replica.entries]
        spare = spare[: max(0, len(self.ready) - self._floor)]
        restart_ms = self.measures.start_s * 1000
        idle = [Idle(one.id, one.num_bytes, restart_ms, self._clock() - one.used_at) for one in spare]
        if self._template.forks is not None and not self.replicas:
            idle.append(Idle(self._template.name, self._template.num_bytes, restart_ms, self.idle_s))
        return idle

    def evict(self, name: str) -> None:
        """Let an idle replica go, or the template."""
        if name == self._template.name:
            self._drop_template()
        else:
            self._let_go(self.replicas[name])

    @property
    def sleep(self) -> Sleep:
        """Say whether there is a replica, or at least a template."""
        if self.replicas:
            return Sleep.AWAKE
        return Sleep.LIGHT if self._template.forks is not None else Sleep.DEEP

    @property
    def template_pid(self) -> int | None:
        return self._template.pid

    def template_dormant(self, message: Dormant) -> None:
        self._template.dormant(message)
        self.act()

    def template_ended(self, cause: str) -> None:
        logger.warning("%s: the template is lost: %s", self.settings.name, cause)
        self._template.failed = True
        self._drop_template()
        self.act()

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
            self._remove(replica)
            self._start_failed(message.problem)
            replica.link.close()

    def ended(self, replica: Replica, cause: str) -> None:
        """A replica's process is gone: on request, or its sequences have to go on elsewhere."""
        if replica.id not in self.replicas:
            return
        was = replica.state
        self._remove(replica)
        if was is not State.LEAVING:
            logger.warning("%s: replica %s is lost: %s", self.settings.name, replica.id, cause)
            if self._watcher is not None:
                self._watcher.replica_lost(self.settings.name)
        self._requeue(replica)
        if was is State.STARTING:
            self._num_killed_starts += 1
            if self._num_killed_starts >= MAX_KILLED_STARTS:
                self._start_failed(f"{self._num_killed_starts} replicas in a row died while they started")
        self.act()

    # the rest

    def _check_room(self, sequence: Sequence) -> None:
        if self._closing:
            raise Draining
        settings = self.settings
        if not self.ready and (left_s := self._retry_at - self._clock()) > 0:
            raise StartFailed(self._cause, left_s)
        num_places = settings.spec.num_slots * max(1, len(self.ready)) + settings.max_queued_requests
        if len(self._entries) >= num_places:
            raise QueueFull(settings.max_queued_requests, self._drain_s())
        num_tokens = self._queue.num_tokens + len(sequence.prompt_ids)
        if self._queue and num_tokens > settings.max_queued_tokens:
            raise QueueFull(settings.max_queued_tokens, self._drain_s(), "prompt tokens")

    def _drain_s(self) -> float:
        """Predict how long it takes until what waits now has its turn."""
        load = self.load()
        wait_s = predicted_wait_s(load, self.settings.policy, max(1, len(self.ready)))
        return min(600.0, max(1.0, wait_s + (0 if self.ready else load.start_s)))

    def _dispatch(self) -> None:
        while self._queue and (open_replicas := [replica for replica in self.ready if replica.has_place]):
            entry = self._queue.pop()
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
            self._queue.charge(entry.sequence.tenant or "", 1)
        if event.finish is not None:
            replica.drop(entry, self._clock())
            self._forget(entry)
            if entry.dispatched_at is not None:
                self.measures.served(self._clock() - entry.dispatched_at)
        entry.deliver(event, replica.id)
        if event.finish is not None and not replica.entries:
            self._settled(replica)

    def _settled(self, replica: Replica) -> None:
        """A replica has nothing left to do."""
        if self._closing or replica.state is State.LEAVING:
            self._let_go(replica)

    def _scale(self) -> None:
        now = self._clock()
        load, policy = self.load(), self.settings.policy
        surplus = max(self._floor, needed_replicas(load, policy)) < load.num_replicas
        self._surplus_since = (self._surplus_since or now) if surplus else None
        wanted = max(self._floor, wanted_replicas(load, policy))
        for _ in range(wanted - load.num_replicas):
            if now < self._retry_at or not self._start():
                break
        idle = [replica for replica in self.ready if not replica.entries]
        if wanted == 0 and idle and self._prepare_to_sleep():
            return  # they leave when the template is there
        for replica in sorted(idle, key=lambda one: one.used_at)[: max(0, load.num_replicas - wanted)]:
            self._let_go(replica)
        if sleep_of(policy, load.num_replicas, load.idle_s) is Sleep.DEEP:
            self._drop_template()

    def _prepare_to_sleep(self) -> bool:
        """Have a template made, where there should be one; True while it is in the making."""
        template = self._template
        if template.in_the_making:
            return True
        if self.settings.policy.sleep is Sleep.DEEP or template.forks is not None or template.failed:
            return False
        num_bytes = TEMPLATE_BYTES
        if not self._machine.fits(num_bytes) or self._machine.take(template.name, num_bytes) is not Room.TAKEN:
            return False
        spec = _spec_of(self.settings.spec, template.name, self._clock(), 0)
        try:
            template.link = self._launcher.launch_template(spec, self)
        except OSError:
            self._machine.release(template.name)
            return False
        template.num_bytes = num_bytes
        return True

    def _drop_template(self) -> None:
        """Sleep deeply from now on."""
        if self._template.link is not None:
            self._template.link.close()
            self._template.gone()
            self._machine.release(self._template.name)

    def _start(self) -> bool:
        """Start one more replica, if there is memory for it."""
        settings = self.settings
        replica_id = f"{settings.name}-{secrets.token_hex(4)}"
        num_bytes = self.replica_bytes
        room = self._machine.take(replica_id, num_bytes)
        if room is Room.NEVER and not self.replicas:
            self._start_failed(
                f"a replica may need {num_bytes / 1e6:,.0f} MB, and the functions of this host may take "
                f"{self._machine.budget_bytes / 1e6:,.0f} MB together"
            )
        if room is not Room.TAKEN:
            return False
        now = self._clock()
        num_warm_up_tokens = 0 if self._queue else 2
        spec = _spec_of(settings.spec, replica_id, now, num_warm_up_tokens)
        replica = Replica(spec, self, num_bytes)
        self.replicas[replica_id] = replica
        self._empty.clear()
        try:
            replica.link = self._fork(spec, replica)
        except OSError as error:
            self._remove(replica)
            self._start_failed(f"no process can be made ({error.strerror})")
            return False
        return True

    def _fork(self, spec: ReplicaSpec, replica: Replica) -> Link:
        """Fork a replica from the template; from nothing where there is none, or where it has just died.

        Raises:
            OSError: no process can be made.
        """
        if (template := self._template.forks) is not None:
            try:
                return template.launch(spec, replica)
            except ConnectionError:
                self._drop_template()
        return self._launcher.launch(spec, replica)

    def _started(self, replica: Replica, message: Started) -> None:
        now = self._clock()
        replica.ready(message, now)
        self._changed.set()
        self._num_failures = self._num_killed_starts = 0
        self._cause = ""
        self.measures.started(now - replica.asked_at)
        if (found := private_bytes(message.pid)) is not None:
            self._measured_bytes = max(self._measured_bytes or 0, found)
        if self._watcher is not None:
            self._watcher.replica_started(self.settings.name, message.stages)
        self._last_used_at = now if not self._entries else self._last_used_at
        self.act()

    def _start_failed(self, cause: str) -> None:
        """Tell all who wait why, and let some time pass before the next try."""
        self._changed.set()
        logger.error("%s: a replica could not start: %s", self.settings.name, cause)
        self._cause = cause
        back_off_s = min(MAX_BACK_OFF_S, 2.0**self._num_failures)
        self._num_failures += 1
        self._num_killed_starts = 0
        self._retry_at = self._clock() + back_off_s
        if not self.ready:
            while self._queue:
                entry = self._queue.pop()
                self._forget(entry)
                entry.fail(self._clock(), f"the function cannot start: {cause}", back_off_s)

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
                self._queue.push_front(entry)
        replica.entries.clear()

    def _let_go(self, replica: Replica) -> None:
        """End a replica that has nothing to do."""
        replica.leave()

    def _remove(self, replica: Replica) -> None:
        self.replicas.pop(replica.id, None)
        self._machine.release(replica.id)
        if not self.replicas:
            self._empty.set()

    def _forget(self, entry: Entry) -> None:
        self._entries.pop(entry.sequence.id, None)
        self._places.pop(entry.sequence.id, None)
        self._last_used_at = self._clock()


def _spec_of(spec: ReplicaSpec, replica_id: str, asked_at: float, num_warm_up_tokens: int) -> ReplicaSpec:
    """Return the spec of one replica."""
    return msgspec.structs.replace(
        spec, replica_id=replica_id, asked_at=asked_at, num_warm_up_tokens=num_warm_up_tokens
    )


def _start_of(stages: Stages, waited_s: float) -> Start:
    waited_ms = round(max(0.0, waited_s) * 1000, 3)
    return Start(waited_ms, stages.fork_ms, stages.map_ms, stages.session_ms, stages.warm_up_ms, stages.unseal_ms)
