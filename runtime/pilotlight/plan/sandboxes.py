"""Containers that a platform starts and stops by its own rules: AWS Lambda's sandboxes, Modal's containers.

In each runs an engine, so what happens inside is the project's own scheduler. What the platform does around it is a
model of what it documents: a request goes to the container that was used last and has a free place; where there is
none, another one is started for it; one that was idle for ``keep_s`` goes, down to ``min_containers``. Beyond
``max_containers`` requests are refused (Lambda's 429) or wait, at most ``max_queued`` of them.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from pilotlight.engine.policy import Policy
from pilotlight.plan.agenda import Agenda
from pilotlight.plan.engine import Capacity, Event, SimulatedEngine
from pilotlight.plan.outcomes import Outcomes, Sample
from pilotlight.plan.replica import Life, Speed
from pilotlight.request import Sequence


@dataclass(frozen=True, slots=True)
class SandboxTerms:
    """How a platform runs containers. ``sandbox_s``: what it takes to make one, before anything of ours runs in it."""

    max_inputs: int
    max_containers: int
    min_containers: int
    max_queued: int
    keep_s: float
    sandbox_s: float
    container_bytes: int


class Sandbox:
    """One container: an engine, and what is on its way to it."""

    def __init__(self, fleet: SandboxFleet) -> None:
        self.life = Life(fleet.agenda.now)
        self.busy_s = 0.0
        self.num_invocations = 0
        self.num_open = 0
        self.idle_number = 0
        self.waiting: list[Sequence] = []
        self._busy_since = 0.0
        self._fleet = fleet
        self.engine = SimulatedEngine(fleet.capacity, fleet.policy, fleet.speed.lean, fleet.agenda, self._emit)
        self.engine.delay_first_prompt(fleet.speed.first_run_s(light=False), fleet.speed.first_token_s)
        self._grown = False

    def give(self, sequence: Sequence) -> None:
        """Take one more; it runs as soon as the container is ready."""
        self.idle_number += 1
        self.num_invocations += 1
        if self.num_open == 0:
            self._busy_since = self._fleet.agenda.now
        self.num_open += 1
        if self.life.ready_at is None:
            self.waiting.append(sequence)
        else:
            self.engine.submit(sequence)

    def ready(self) -> None:
        now = self._fleet.agenda.now
        self.life.ready_at = now
        if self.num_open:
            self._busy_since = now
        for sequence in self.waiting:
            self.engine.submit(sequence)
        self.waiting.clear()

    def busy_until(self, now: float) -> float:
        """Return for how long it had work since it was ready."""
        return self.busy_s + (now - self._busy_since if self.num_open and self.life.ready_at is not None else 0.0)

    def _emit(self, events: list[Event]) -> None:
        self._fleet.outcomes.observe(events)
        if not self._grown:
            self._grown = True
            self.engine.go_on_with(self._fleet.speed.growing)
            self._fleet.agenda.at(
                self._fleet.agenda.now + self._fleet.speed.grow_s,
                lambda: self.engine.go_on_with(self._fleet.speed.whole),
            )
        for _, event in events:
            if event.finish is not None:
                self.num_open -= 1
        if self.num_open == 0:
            self.busy_s += self._fleet.agenda.now - self._busy_since
        if any(event.finish is not None for _, event in events):
            self._fleet.freed(self)


class SandboxFleet:
    """All containers of a function."""

    def __init__(
        self, terms: SandboxTerms, capacity: Capacity, policy: Policy, speed: Speed, agenda: Agenda, outcomes: Outcomes
    ) -> None:
        self.terms = terms
        self.capacity = capacity
        self.policy = policy
        self.speed = speed
        self.agenda = agenda
        self.outcomes = outcomes
        self.gone: list[Sandbox] = []
        self._free: list[Sandbox] = []
        """Those with a place, the one that was used last at the end."""
        self._living: dict[Sandbox, None] = {}
        self._queue: deque[Sequence] = deque()

    @property
    def all(self) -> list[Sandbox]:
        return [*self.gone, *self._living]

    @property
    def lives(self) -> list[Life]:
        return [sandbox.life for sandbox in self.all]

    def open(self) -> None:
        for _ in range(self.terms.min_containers):
            self._free.append(self._start())

    def submit(self, sequence: Sequence) -> None:
        if self._free:
            sandbox = self._free[-1]
        elif len(self._living) < self.terms.max_containers:
            sandbox = self._start()
            self._free.append(sandbox)
        elif len(self._queue) < self.terms.max_queued:
            self._queue.append(sequence)
            return
        else:
            self.outcomes.refused()
            return
        self.outcomes.num_waited_for_start += sandbox.life.ready_at is None
        self._give(sandbox, sequence)

    def take_in(self, num_prompt_tokens: int) -> float:
        """Return after how many seconds a request that comes now is with its container."""
        return self.speed.request_s(num_prompt_tokens)

    def freed(self, sandbox: Sandbox) -> None:
        """A container has a place again."""
        if sandbox in self._free:
            self._free.remove(sandbox)
        while self._queue and sandbox.num_open < self.terms.max_inputs:
            sandbox.give(self._queue.popleft())
        if sandbox.num_open < self.terms.max_inputs:
            self._free.append(sandbox)
        if sandbox.num_open == 0:
            self.agenda.at(self.agenda.now + self.terms.keep_s, self._expire, sandbox, sandbox.idle_number)

    def sample(self) -> Sample:
        ready = [sandbox for sandbox in self._living if sandbox.life.ready_at is not None]
        return Sample(
            self.agenda.now,
            len(self._living),
            len(self._living) - len(ready),
            len(self._queue) + sum(len(sandbox.waiting) for sandbox in self._living),
            sum(sandbox.engine.scheduler.num_in_slots for sandbox in ready),
            len(ready) * self.terms.max_inputs,
            len(self._living) * self.terms.container_bytes,
            sum(sandbox.engine.signals().kv_used_bytes for sandbox in ready),
        )

    def close(self) -> None:
        """Nothing has to be counted."""

    def _give(self, sandbox: Sandbox, sequence: Sequence) -> None:
        sandbox.give(sequence)
        if sandbox.num_open >= self.terms.max_inputs:
            self._free.remove(sandbox)

    def _start(self) -> Sandbox:
        sandbox = Sandbox(self)
        self._living[sandbox] = None
        self.agenda.at(self.agenda.now + self.terms.sandbox_s + self.speed.start_s(light=False), sandbox.ready)
        return sandbox

    def _expire(self, sandbox: Sandbox, idle_number: int) -> None:
        if sandbox.idle_number != idle_number or len(self._living) <= self.terms.min_containers:
            return
        sandbox.life.ended_at = self.agenda.now
        sandbox.engine.stop()
        del self._living[sandbox]
        self._free.remove(sandbox)
        self.gone.append(sandbox)
