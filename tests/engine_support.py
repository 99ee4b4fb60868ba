"""An engine on the fake session, and what it emitted."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from pilotlight.engine.engine import Engine, Event
from pilotlight.engine.fake import FakeSession
from pilotlight.engine.grammar import Grammars
from pilotlight.engine.policy import Policy
from pilotlight.engine.session import Session
from pilotlight.request import Sequence, TokenEvent


class Log:
    """Collects the events that an engine emits."""

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.by_sequence: dict[str, list[TokenEvent]] = {}

    def emit(self, events: list[Event]) -> None:
        for event in events:
            self._events.put(event)

    def wait_for_end(self, *names: str) -> None:
        missing = set(names) - {name for name, events in self.by_sequence.items() if events[-1].finish}
        while missing:
            name, event = self._events.get(timeout=300)
            events = self.by_sequence.setdefault(name, [])
            assert not (events and events[-1].finish), "an event after the last one"
            events.append(event)
            if event.finish:
                missing.discard(name)

    def tokens(self, name: str) -> list[int]:
        return [event.token_id for event in self.by_sequence[name] if event.token_id is not None]


class Steps:
    """What a session asks before each run: it runs as often as it is let, and says when it would go on."""

    def __init__(self, num_runs: int = 0) -> None:
        self._permits = threading.Semaphore(num_runs)
        self.waits = threading.Event()

    def take(self) -> None:
        if not self._permits.acquire(blocking=False):
            self.waits.set()
            self._permits.acquire()

    def release(self, num_runs: int = 1) -> None:
        self.waits.clear()
        self._permits.release(num_runs)


SMALL_CHUNKS = Policy(max_chunk_tokens=4)
CHUNKS_OF_64 = Policy(max_chunk_tokens=64)


@contextmanager
def engine_on(
    session: FakeSession,
    policy: Policy = SMALL_CHUNKS,
    grammars: Grammars | None = None,
    log: Log | None = None,
) -> Iterator[tuple[Engine, Log]]:
    log = log or Log()
    engine = Engine(session, log.emit, policy, grammars)
    engine.start()
    try:
        yield engine, log
    finally:
        engine.close()


def generate(
    session: Session, sequences: list[Sequence], joins: Iterable[int] = (), policy: Policy = CHUNKS_OF_64
) -> dict[str, list[int]]:
    """Run sequences through an engine; ``joins`` says how many tokens to wait for before each submission."""
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def emit(step: list[Event]) -> None:
        for event in step:
            events.put(event)

    engine = Engine(session, emit, policy)
    engine.start()
    tokens: dict[str, list[int]] = {sequence.id: [] for sequence in sequences}
    pauses = iter(joins)
    running = 0

    def receive() -> int:
        name, event = events.get(timeout=300)
        assert event.error is None
        if event.token_id is not None:
            tokens[name].append(event.token_id)
        return 1 if event.finish else 0

    try:
        for sequence in sequences:
            engine.submit(sequence)
            running += 1
            for _ in range(next(pauses, 0)):
                if running:
                    running -= receive()
        while running:
            running -= receive()
    finally:
        engine.close()
    return tokens
