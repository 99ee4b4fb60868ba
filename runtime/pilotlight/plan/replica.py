"""Replicas, templates and what makes them, on simulated time: what a pool sees of processes that are not there."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from pilotlight.host.link import Listener, TemplateListener
from pilotlight.host.rates import Rates
from pilotlight.host.replica_handle import Replica, State
from pilotlight.host.step_times import StepTimes
from pilotlight.host.wire import Beat, Close, Dormant, ReplicaSpec, Stages, Started, Step, Submit, ToReplica
from pilotlight.plan.agenda import Agenda
from pilotlight.plan.desk import Desk
from pilotlight.plan.engine import Capacity, Event, SimulatedEngine
from pilotlight.plan.prompts import TOKEN

NO_PID = 0
"""No process has it, so whoever looks for its memory finds none."""


@dataclass(frozen=True)
class Speed:
    """How long everything takes on one kind of machine. ``boot_s`` comes before the first start on a machine."""

    rates: Rates
    lean: StepTimes
    growing: StepTimes
    whole: StepTimes
    factor: float = 1.0

    @classmethod
    def of(cls, rates: Rates, factor: float = 1.0) -> Speed:
        """Return the measured speed, or that of a machine so many times as fast."""
        host = rates.host
        growing = StepTimes(rates.lean, factor / rates.starts.growing_factor, host)
        return cls(rates, StepTimes(rates.lean, factor, host), growing, StepTimes(rates.whole, factor, host), factor)

    def start_s(self, light: bool) -> float:
        starts = self.rates.starts
        return (starts.light_ms if light else starts.deep_ms) / 1000 / self.factor

    def first_run_s(self, light: bool) -> float:
        starts = self.rates.starts
        return (starts.light_first_run_ms if light else starts.deep_first_run_ms) / 1000 / self.factor

    @property
    def first_token_s(self) -> float:
        return self.rates.starts.first_token_ms / 1000 / self.factor

    @property
    def template_s(self) -> float:
        return self.rates.starts.template_ms / 1000 / self.factor

    @property
    def grow_s(self) -> float:
        return self.rates.starts.grow_ms / 1000 / self.factor

    def request_s(self, num_prompt_tokens: int) -> float:
        """Return what the host adds to a request's time to first token."""
        host = self.rates.host
        return (host.request_ms + host.prompt_token_ms * num_prompt_tokens) / 1000 / self.factor


@dataclass(eq=False, slots=True)
class Life:
    """How long a replica lived, from the wish for it to its end, and on what kind of machine."""

    asked_at: float
    on_spot: bool = False
    ready_at: float | None = None
    ended_at: float | None = None
    interrupted: bool = False

    def seconds(self, now: float) -> float:
        return (now if self.ended_at is None else self.ended_at) - self.asked_at


class SimulatedReplica:
    """The link that a pool holds, and the replica at its other end."""

    def __init__(
        self,
        spec: ReplicaSpec,
        listener: Listener,
        speed: Speed,
        agenda: Agenda,
        kv_bytes_per_token: int,
        observe: Observer,
        desk: Desk,
    ) -> None:
        self.spec = spec
        self.listener = listener
        self.life = Life(agenda.now)
        self.ready = self.gone = False
        self._speed = speed
        self._agenda = agenda
        self._observe = observe
        self._desk = desk
        self._on_the_way: deque[list[Event]] = deque()
        self._grows = spec.num_threads > 1 or speed.rates.lean != speed.rates.whole
        capacity = Capacity(spec.num_slots, spec.max_context_tokens, kv_bytes_per_token)
        self.engine = SimulatedEngine(capacity, spec.policy, speed.lean, agenda, self._emit, desk)

    def start(self, start_s: float, first_run_s: float) -> None:
        """Be ready after so long; the first prompt takes ``first_run_s`` longer."""
        self.engine.delay_first_prompt(first_run_s, self._speed.first_token_s)
        self._agenda.at(self._agenda.now + start_s, self._started)

    def send(self, message: ToReplica) -> None:
        if self.gone:
            return
        if isinstance(message, Submit):
            self.engine.submit(message.sequence)
        elif isinstance(message, Close):
            self._agenda.soon(lambda: self.die("its process ended"))

    def kill(self) -> None:
        self._agenda.soon(lambda: self.die("it was killed"))

    def close(self) -> None:
        self.gone = True

    def die(self, cause: str) -> None:
        """End at once, whatever was running."""
        if self.gone:
            return
        while self._on_the_way:
            self._deliver()
        if isinstance(self.listener, Replica):
            for entry in self.listener.entries.values():
                # the tokens between a first and a last one were never delivered one by one
                num_missing = self.engine.generated(entry.sequence.id) - len(entry.emitted_ids)
                entry.emitted_ids += [TOKEN] * num_missing
        self.gone, self.life.ended_at = True, self._agenda.now
        self.engine.stop()
        self.listener.ended(cause)

    def retire(self) -> None:
        """Take nothing more, and leave when what runs has ended."""
        handle = self.listener
        assert isinstance(handle, Replica)
        if handle.state is State.READY:
            handle.state = State.LEAVING
            if not handle.entries:
                handle.leave()

    def beat(self) -> None:
        if self.ready and not self.gone:
            self.listener.received(Beat(self.engine.num_steps + self.engine.steps_under_way, self.engine.signals()))

    def _started(self) -> None:
        if self.gone:
            return
        self.ready, self.life.ready_at = True, self._agenda.now
        self.listener.received(Started(NO_PID, Stages()))
        if self.spec.num_warm_up_tokens:
            self._grow()

    def _emit(self, events: list[Event]) -> None:
        self._grow()
        num_ended = sum(event.finish is not None for _, event in events)
        self._on_the_way.append(events)
        if delay_s := self._desk.hand_out(len(events), num_ended):
            self._agenda.at(self._agenda.now + delay_s, self._deliver)
        else:
            self._deliver()

    def _deliver(self) -> None:
        """Hand over the events that have been on the way for longest."""
        if self._on_the_way:
            events = self._on_the_way.popleft()
            self._observe(events)
            prefixes = self.engine.scheduler.prefixes
            changes, prefixes.changes = prefixes.changes, {}
            self.listener.received(Step(events, self.engine.signals(), changes or {}))

    def _grow(self) -> None:
        if self._grows:
            self._grows = False
            self.engine.go_on_with(self._speed.growing)
            self._agenda.at(self._agenda.now + self._speed.grow_s, self._grown)

    def _grown(self) -> None:
        if not self.gone:
            self.engine.go_on_with(self._speed.whole)


Observer = Callable[[list[Event]], None]
"""Sees every first token and every end."""
OnLaunch = Callable[[SimulatedReplica, bool], None]
"""Told of every replica that is made, and whether it comes from a template; has it start."""


class SimulatedTemplate:
    """A dormant process that replicas are forked from."""

    def __init__(self, launcher: SimulatedLauncher) -> None:
        self._launcher = launcher
        self.closed = False

    def launch(self, spec: ReplicaSpec, listener: Listener) -> SimulatedReplica:
        return self._launcher.make(spec, listener, light=True)

    def close(self) -> None:
        self.closed = True


class SimulatedLauncher:
    """Makes replicas and templates."""

    def __init__(
        self,
        speed: Speed,
        agenda: Agenda,
        kv_bytes_per_token: int,
        observe: Observer,
        desk: Desk,
        on_launch: OnLaunch,
    ) -> None:
        self._desk = desk
        self._speed = speed
        self._observe = observe
        self._agenda = agenda
        self._kv_bytes_per_token = kv_bytes_per_token
        self._on_launch = on_launch

    def launch(self, spec: ReplicaSpec, listener: Listener) -> SimulatedReplica:
        return self.make(spec, listener, light=False)

    def launch_template(self, spec: ReplicaSpec, listener: TemplateListener) -> SimulatedTemplate:
        template = SimulatedTemplate(self)

        def dormant() -> None:
            if not template.closed:
                listener.template_dormant(Dormant(NO_PID, Stages()))

        self._agenda.at(self._agenda.now + self._speed.template_s, dormant)
        return template

    def make(self, spec: ReplicaSpec, listener: Listener, light: bool) -> SimulatedReplica:
        replica = SimulatedReplica(
            spec, listener, self._speed, self._agenda, self._kv_bytes_per_token, self._observe, self._desk
        )
        self._on_launch(replica, light)
        return replica
