"""Replicas without processes: they answer with the fake session's tokens, one step at a time, when a test says so."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from pilotlight.engine.fake import next_token
from pilotlight.engine.prefix_keys import PrefixChanges
from pilotlight.host.link import Listener, TemplateListener
from pilotlight.host.routing import prefix_keys
from pilotlight.host.wire import (
    Abort,
    Beat,
    Close,
    Dormant,
    Failed,
    FromReplica,
    ReplicaSpec,
    Stages,
    Started,
    Step,
    Submit,
    ToReplica,
    encode,
    from_replica,
    to_replica,
)
from pilotlight.request import FinishReason, Sequence, Signals, TokenEvent

VOCAB_SIZE = 258


class FakeReplica:
    """Both the link that a pool sees and the replica behind it; messages take the way over the wire's encoding."""

    def __init__(self, spec: ReplicaSpec, listener: Listener) -> None:
        self.spec = spec
        self.running: dict[str, list[int]] = {}
        self.sequences: dict[str, Sequence] = {}
        self.killed = self.alive = False
        self.gone = False
        self.template: FakeTemplate | None = None
        self.num_steps = 0
        self.prefixes: PrefixChanges = {}
        self._listener = listener

    # the link

    def send(self, message: ToReplica) -> None:
        if self.gone:
            return
        arrived = to_replica.decode(encode(message))
        if isinstance(arrived, Submit):
            sequence = arrived.sequence
            self.sequences[sequence.id] = sequence
            self.running[sequence.id] = [*sequence.prompt_ids, *sequence.emitted_ids]
        elif isinstance(arrived, Abort):
            if self.running.pop(arrived.sequence_id, None) is not None:
                self.say(Step([(arrived.sequence_id, TokenEvent(None, 0.0, FinishReason.CANCELLED))], self.signals()))
        elif isinstance(arrived, Close):
            self.die()

    def kill(self) -> None:
        self.killed = True
        self.die()

    def close(self) -> None:
        self.gone = True

    # the replica

    def start(self) -> None:
        self.alive = True
        self.say(Started(1, Stages("zygote", 1.0, 2.0, 3.0, 0.0)))

    def fail(self, problem: str) -> None:
        self.say(Failed(problem))

    def die(self) -> None:
        if not self.gone:
            self.gone = True
            self._listener.ended("its process ended")

    def beat(self) -> None:
        self.say(Beat(self.num_steps, self.signals()))

    def step(self) -> None:
        """Give every running sequence its next token."""
        events = []
        self.num_steps += 1
        for sequence_id, tokens in list(self.running.items())[: self.spec.num_slots]:
            sequence = self.sequences[sequence_id]
            tokens.append(next_token(tokens, VOCAB_SIZE))
            num_generated = len(tokens) - len(sequence.prompt_ids)
            finish = FinishReason.LENGTH if num_generated >= sequence.max_new_tokens else None
            begun = 0.0 if num_generated == 1 else None
            if begun is not None:
                self.prefixes |= dict.fromkeys(prefix_keys(sequence, self.spec.policy), True)
            events.append((sequence_id, TokenEvent(tokens[-1], 0.5, finish, begun)))
            if finish:
                del self.running[sequence_id]
        if events:
            changes, self.prefixes = self.prefixes, {}
            self.say(Step(events, self.signals(), changes))

    def signals(self) -> Signals:
        num_running = min(len(self.running), self.spec.num_slots)
        return Signals(len(self.running) - num_running, num_running, self.spec.num_slots, 0, 0, 1)

    def say(self, message: FromReplica) -> None:
        if not self.gone:
            self._listener.received(from_replica.decode(encode(message)))


class FakeTemplate:
    """A template which is dormant when a test says so."""

    def __init__(self, launcher: FakeLauncher, spec: ReplicaSpec, listener: TemplateListener) -> None:
        self.spec = spec
        self.listener = listener
        self.gone = self.dead = False
        self._launcher = launcher

    def settle(self) -> None:
        self.listener.template_dormant(Dormant(2, Stages()))

    def launch(self, spec: ReplicaSpec, listener: Listener) -> FakeReplica:
        assert not self.gone
        if self.dead:
            raise BrokenPipeError
        replica = self._launcher.launch(spec, listener)
        replica.template = self
        return replica

    def close(self) -> None:
        self.gone = True


class FakeLauncher:
    """Makes fake replicas; ``on_launch`` may start them at once."""

    def __init__(self, on_launch: Callable[[FakeReplica], object] = lambda _: None) -> None:
        self.launched: list[FakeReplica] = []
        self.on_launch = on_launch
        self.templates: list[FakeTemplate] = []

    def launch_template(self, spec: ReplicaSpec, listener: TemplateListener) -> FakeTemplate:
        self.templates.append(FakeTemplate(self, spec, listener))
        return self.templates[-1]

    @property
    def living(self) -> list[FakeReplica]:
        return [replica for replica in self.launched if not replica.gone]

    def launch(self, spec: ReplicaSpec, listener: Listener) -> FakeReplica:
        replica = FakeReplica(spec, listener)
        self.launched.append(replica)
        asyncio.get_running_loop().call_soon(self.on_launch, replica)
        return replica
