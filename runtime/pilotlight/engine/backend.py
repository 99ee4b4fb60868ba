"""The engine in this process as a backend for asyncio callers."""

from __future__ import annotations

import asyncio

from pilotlight.engine.engine import Engine, Event
from pilotlight.engine.grammar import Grammars
from pilotlight.engine.policy import DEFAULT_POLICY, Policy
from pilotlight.engine.session import Session
from pilotlight.errors import QueueFull
from pilotlight.mailbox import TokenStream
from pilotlight.request import Sequence, Signals


class EngineBackend:
    """Sequences in, token events out, on the event loop that called ``start``."""

    def __init__(
        self,
        session: Session,
        max_queued_requests: int,
        policy: Policy = DEFAULT_POLICY,
        grammars: Grammars | None = None,
    ) -> None:
        self._engine = Engine(session, self._emit, policy, grammars)
        self._max_queued_requests = max_queued_requests
        self._max_sequences = session.num_slots + max_queued_requests
        self._streams: dict[str, TokenStream] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._engine.start()

    async def close(self) -> None:
        """Cancel what runs, deliver the last events, stop the engine's thread."""
        await asyncio.to_thread(self._engine.close)

    def submit(self, sequence: Sequence) -> TokenStream:
        """Reserve a place at once and return the sequence's events; the last one carries a finish reason.

        Raises:
            QueueFull: all slots are taken and the queue is full.
        """
        if len(self._streams) >= self._max_sequences:
            raise QueueFull(self._max_queued_requests)
        stream = self._streams[sequence.id] = TokenStream()
        self._engine.submit(sequence)
        return stream

    def abort(self, sequence_id: str) -> None:
        """Have a sequence end as cancelled before the next step."""
        self._engine.abort(sequence_id)

    def signals(self) -> Signals:
        return self._engine.signals()

    def _emit(self, events: list[Event]) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._deliver, events)

    def _deliver(self, events: list[Event]) -> None:
        for sequence_id, event in events:
            stream = self._streams[sequence_id]
            if event.finish is not None:
                del self._streams[sequence_id]
            stream.put(event)
