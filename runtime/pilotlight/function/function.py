"""A function: its text side, its backend and its meter, and the invocations that run on it."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from datetime import UTC, datetime

from pilotlight.artifact import Artifact
from pilotlight.errors import Draining, RequestIdInUse
from pilotlight.function.contracts import Backend, Observer, Prices, Unobserved, UsageLedger
from pilotlight.function.delivery import Deliveries
from pilotlight.function.invocation import Cut, Invocation
from pilotlight.function.request import Request
from pilotlight.function.run import Run
from pilotlight.function.text_side import Texts, TextSide
from pilotlight.metering.record import Capacity
from pilotlight.tee import TeeLabel


class Function:
    """An artifact's text side, its backend and its meter, under the name that clients call ``model``."""

    def __init__(
        self,
        name: str,
        artifact: Artifact,
        backend: Backend,
        ledger: UsageLedger,
        prices: Prices,
        *,
        max_context_tokens: int,
        max_duration_s: float = 3600.0,
        max_answer_tokens: int | None = None,
        capacity: Capacity = Capacity.ON_DEMAND,
        capacity_of: Callable[[str], Capacity] | None = None,
        tee: TeeLabel = TeeLabel.NONE,
        observer: Observer | None = None,
        texts: Texts | None = None,
        provider: str = "cpu",
    ) -> None:
        self.name = name
        self.artifact = artifact
        self.backend = backend
        self.prices = prices
        self.max_context_tokens = max_context_tokens
        self.max_duration_s = max_duration_s
        self.max_answer_tokens = max_answer_tokens
        self.capacity = capacity
        self.capacity_of = capacity_of or (lambda replica_id: capacity)
        self.tee = tee
        self.created_at_utc = datetime.now(UTC)
        self.replica_id = _new_replica_id(name)
        self.ledger = ledger
        self.deliveries = Deliveries(ledger)
        self.observer: Observer = observer or Unobserved()
        self.provider = provider
        self.text_side = TextSide(artifact, texts, max_context_tokens, max_answer_tokens)
        self.drain_began = asyncio.Event()
        self._leaves = False
        self.cold_start_ms = 0.0
        self._cold_start_to_report_ms = 0.0
        self._running: dict[str, Invocation] = {}

    def started(self, cold_start_ms: float) -> None:
        """Note how long the start took; the first invocation's record reports it."""
        self.cold_start_ms = self._cold_start_to_report_ms = cold_start_ms

    def restored(self) -> None:
        """Go on in a copy of this process that was restored from a snapshot: a replica of its own, without a start."""
        self.replica_id = _new_replica_id(self.name)
        self.started(cold_start_ms=0.0)

    def reported_cold_start_ms(self) -> float:
        """Return how long the start took for the first invocation that asks, 0 for all others."""
        cold_start_ms, self._cold_start_to_report_ms = self._cold_start_to_report_ms, 0.0
        return cold_start_ms

    async def invoke(self, request: Request) -> Invocation:
        """Check a request, submit it and return its running invocation.

        Raises:
            InvalidRequest: the prompt or a parameter is not acceptable for this function.
            ContextLengthExceeded: the prompt leaves no room for an answer.
            QueueFull: no place is free.
            RequestIdInUse: the ledger holds an invocation of that id.
            LedgerUnavailable: the invocation cannot be metered, so it is not served.
            LimitExceeded, NotPermitted, InvalidKey: the request's key does not allow it.
            IdempotencyConflict: the request was sent before.
            Draining: the function is being closed.
        """
        if self.draining:
            raise Draining
        request, sequences, streams = await self.text_side.read(request)
        if request.id in self._running:
            raise RequestIdInUse(request.id)
        invocation = Invocation(self, request, request.num_new_prompt_tokens(sequences[0].prompt_ids), streams)
        invocation.seed = sequences[0].sampling.seed
        # What its key may not do takes no place and wakes nothing; without a key, the admission hardly ever fails, so
        # the prefill runs while it goes to disk.
        run = Run(self, invocation, sequences)
        if request.key_id is None:
            await run.submit()
        invocation.task = asyncio.create_task(run.carry(), name=f"invocation {request.id}")
        self._running[request.id] = invocation
        invocation.task.add_done_callback(lambda _: self._running.pop(request.id, None))
        try:
            await asyncio.shield(invocation.admitted)
        except asyncio.CancelledError:
            invocation.cancel()
            raise
        return invocation

    async def count_prompt_tokens(self, request: Request) -> int:
        """Return how many tokens a request's prompt has, whether or not they fit the context.

        Raises:
            InvalidRequest: the prompt is not acceptable for this function.
        """
        return len(await self.text_side.prompt_ids(request))

    @property
    def draining(self) -> bool:
        """Whether no more requests are taken."""
        return self.drain_began.is_set()

    @property
    def ready(self) -> bool:
        """Whether requests had better be sent here than elsewhere."""
        return not self._leaves and not self.draining

    def leave(self) -> None:
        """Be no longer ready, because this machine goes; requests are still taken until ``drain``."""
        self._leaves = True

    @property
    def num_running(self) -> int:
        return len(self._running)

    def running(self, request_id: str) -> Invocation | None:
        """Return the running invocation of that id."""
        return self._running.get(request_id)

    def cancel(self, request_id: str) -> bool:
        """End a running invocation as cancelled; False when there is none of that id."""
        if (invocation := self._running.get(request_id)) is None:
            return False
        invocation.cancelled = True
        if invocation.submitted:
            for stream in invocation.streams:
                self.backend.abort(stream.sequence_id)
        return True

    async def settled(self, request_id: str) -> None:
        """Wait until no invocation of that id runs any more, and its record is written."""
        if (invocation := self._running.get(request_id)) is not None:
            await asyncio.wait([invocation.task])

    async def drain(self, timeout_s: float) -> None:
        """Take no more requests; give the running ones a while, then cancel them and wait for their records."""
        self.drain_began.set()
        if self._running:
            await asyncio.wait(self._tasks(), timeout=timeout_s)
        for invocation in list(self._running.values()):
            if invocation.request.seal is not None:
                invocation.end_early(Cut.SHUTDOWN)
            else:
                invocation.cancel()
        await asyncio.gather(*self._tasks())

    async def close(self) -> None:
        """End what still runs, with its record, and stop the backend."""
        await self.drain(timeout_s=0)
        await self.backend.close()

    def _tasks(self) -> list[asyncio.Task[None]]:
        return [invocation.task for invocation in self._running.values()]


def _new_replica_id(name: str) -> str:
    return f"{name}-{secrets.token_hex(4)}"
