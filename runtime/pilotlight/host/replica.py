"""A replica: one artifact, one engine, one wire to the host. Ends when the host closes the wire, or asks for it."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path

from pilotlight.artifact import open_artifact
from pilotlight.engine.engine import Engine, Event
from pilotlight.engine.policy import Policy
from pilotlight.engine.session import OnnxSession, Session
from pilotlight.errors import PilotlightError
from pilotlight.host.wire import Abort, Beat, BlockingWire, Close, Failed, ReplicaSpec, Stages, Started, Step, Submit
from pilotlight.request import Sequence

BEAT_INTERVAL_S = 1.0


class Loaded:
    """A session and how long each stage of its making took."""

    def __init__(self, session: Session, map_ms: float, session_ms: float) -> None:
        self.session = session
        self.map_ms = map_ms
        self.session_ms = session_ms


def load(spec: ReplicaSpec, num_threads: int) -> Loaded:
    """Open an artifact, whose checksums the host has compared, and its session.

    Raises:
        ArtifactError: the artifact is damaged or cannot be loaded.
    """
    begun_at = time.monotonic()
    artifact = open_artifact(Path(spec.artifact))
    mapped_at = time.monotonic()
    cache_dir = Path(spec.cache_dir) if spec.cache_dir else None
    session = OnnxSession(artifact, spec.num_slots, spec.max_context_tokens, num_threads, cache_dir)
    return Loaded(session, _ms(mapped_at - begun_at), _ms(time.monotonic() - mapped_at))


def run(spec: ReplicaSpec, connection: socket.socket) -> None:
    """Serve one artifact until the host is gone or says that it is over."""
    fork_ms = _ms(time.monotonic() - spec.asked_at)
    wire = BlockingWire(connection)
    try:
        loaded = load(spec, spec.num_threads)
        warm_up_ms = _warm_up(spec, loaded.session)
    except (PilotlightError, MemoryError) as error:
        wire.send(Failed(_problem(spec, error)))
        return
    stages = Stages("zygote", fork_ms, loaded.map_ms, loaded.session_ms, warm_up_ms)
    serve(wire, loaded.session, spec, stages)


def serve(wire: BlockingWire, session: Session, spec: ReplicaSpec, stages: Stages) -> None:
    """Report the start, then carry messages to the engine, and its events back."""
    threading.excepthook = _end_process
    outbox = Outbox(wire, session, spec.policy)
    engine = outbox.engine
    engine.start()
    wire.send(Started(os.getpid(), stages))
    while (messages := wire.receive(BEAT_INTERVAL_S)) is not None:
        for message in messages:
            if isinstance(message, Submit):
                engine.submit(message.sequence)
            elif isinstance(message, Abort):
                engine.abort(message.sequence_id)
            elif isinstance(message, Close):
                engine.close()
                return
        outbox.beat()


class Outbox:
    """The engine's events on their way to the host."""

    def __init__(self, wire: BlockingWire, session: Session, policy: Policy) -> None:
        self.engine = Engine(session, self._emit, policy)
        self._wire = wire
        self._num_steps = 0
        self._next_beat_at = 0.0

    def beat(self) -> None:
        """Give a sign of life, if the last one is old enough."""
        now = time.monotonic()
        if now >= self._next_beat_at:
            self._next_beat_at = now + BEAT_INTERVAL_S / 2
            self._wire.send(Beat(self._num_steps, self.engine.signals()))

    def _emit(self, events: list[Event]) -> None:
        """Runs on the engine's thread, once a step, also where a step has no events."""
        self._num_steps += 1
        if events:
            self._wire.send(Step(events, self.engine.signals()))


def _warm_up(spec: ReplicaSpec, session: Session) -> float:
    """Generate a token that nobody asked for, where the host wants the replica's first request to find it warm."""
    if not spec.num_warm_up_tokens:
        return 0.0
    begun_at = time.monotonic()
    done = threading.Event()
    engine = Engine(session, lambda events: done.set() if any(e.finish for _, e in events) else None, spec.policy)
    engine.start()
    engine.submit(Sequence("warm-up", (0,), spec.num_warm_up_tokens))
    done.wait()
    engine.close()
    return _ms(time.monotonic() - begun_at)


def _problem(spec: ReplicaSpec, error: Exception) -> str:
    """Say what went wrong, for clients too: they need not know where artifacts lie."""
    return str(error).replace(f"{spec.artifact}/", "") or "there is not enough memory"


def _end_process(args: object) -> None:
    """A replica whose engine died is no replica; the host sees its end and moves its sequences."""
    os._exit(70)


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
