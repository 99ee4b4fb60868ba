"""A replica on Ray Serve: engines behind streams of attempts, their signals, and a departure with its node."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping

from pilotlight.host.attempt import Attempt, FromAttempt, HandOver, Part, read_attempt
from pilotlight.host.departure import MARGIN_S, Open, plan_departure
from pilotlight.host.loaded import Loaded
from pilotlight.host.measures import Measures
from pilotlight.host.notice import Kind, Notice, open_source, watch
from pilotlight.host.wire import ReplicaSpec, Stages, encode
from pilotlight.mailbox import TokenStream
from pilotlight.request import FinishReason, Sequence, TokenEvent
from ray_node import drain_this_node, is_replaced
from ray_scaling import ReplicaSignals

PART_INTERVAL_S = 0.02
"""Tokens of one attempt that come within so short a time travel together; the first one does not wait."""

PACE_WEIGHT = 0.05
WAITING_SHARE = 0.5
LOOK_AGAIN_S = 0.5

logger = logging.getLogger("pilotlight.ray")


class Running:
    """One attempt that is under way here."""

    def __init__(self, attempt: Attempt, loaded: Loaded) -> None:
        self.attempt = attempt
        self.engine_id = f"{attempt.sequence.id}@{attempt.epoch}"
        self.num_emitted = len(attempt.sequence.emitted_ids)
        self.has_begun = False
        self.begun_at = time.monotonic()
        self.last_at: float | None = None
        self._backend = loaded.backend

    @property
    def open(self) -> Open:
        left = self.attempt.sequence.max_new_tokens - self.num_emitted
        return Open(self.engine_id, left, self.has_begun)

    def move(self) -> None:
        """Have it go on elsewhere, behind what was generated until the next step."""
        self._backend.abort(self.engine_id)


class EngineReplica:
    """What Serve makes replicas of: the functions of one pool, loaded when they are first asked for."""

    def __init__(self, replica_id: str, specs: Mapping[str, ReplicaSpec], notices: str) -> None:
        self.id = replica_id
        self.specs = specs
        self._loaded: dict[str, Loaded] = {}
        self._opening: dict[str, asyncio.Task[Loaded]] = {}
        self._running: dict[str, Running] = {}
        self._measures = Measures(start_s=0.0)
        self._inter_token_s = 0.0
        self._interrupted = False
        self._leaving = False
        self._tasks: set[asyncio.Task[None]] = set()
        if (source := open_source(notices)) is not None:
            self._keep(asyncio.create_task(watch([source], self.noticed)))
        if len(specs) == 1:
            (function,) = specs
            self._start(function, Loaded(specs[function]))

    async def engine(self, function: str) -> Loaded:
        """Return a function's engine; a replica of one function has had it from the start."""
        return self._loaded[function]

    async def open(self, function: str, engine: Callable[[ReplicaSpec], Loaded]) -> Loaded:
        """Load a function in a thread, so that the streams of others go on; a caller that leaves does not undo it.

        Raises:
            ArtifactError: the artifact is damaged or cannot be loaded.
        """
        if function not in self._opening:
            self._opening[function] = asyncio.create_task(asyncio.to_thread(engine, self.specs[function]))
        opening = self._opening[function]
        try:
            self._start(function, await asyncio.shield(opening))
        finally:
            if opening.done():
                self._opening.pop(function, None)
        return self._loaded[function]

    async def generate(self, payload: bytes, **routing: object) -> AsyncIterator[bytes]:
        """Take an attempt and yield what becomes of it; ``routing`` is for the router."""
        attempt = read_attempt(payload)
        if self._leaving:
            yield encode(HandOver(attempt.epoch, self.id))
            return
        loaded = await self.engine(attempt.function)
        if self._leaving:  # while the function was loaded, which takes seconds
            yield encode(HandOver(attempt.epoch, self.id))
            return
        running = Running(attempt, loaded)
        self._running[running.engine_id] = running
        try:
            async for answer in self._answers(running, loaded):
                yield encode(answer)
        finally:
            del self._running[running.engine_id]
            loaded.backend.abort(running.engine_id)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return this replica's signals, for the autoscaler."""
        signals = [loaded.backend.signals() for loaded in self._loaded.values()]
        reserved = sum(one.kv_reserved_bytes for one in signals)
        found = ReplicaSignals(
            num_running=sum(one.num_running for one in signals),
            backlog_tokens=sum(one.num_prefill_backlog_tokens for one in signals),
            prefill_tokens_per_s=self._measures.prefill_tokens_per_s,
            service_s=self._measures.service_s,
            kv_used_ratio=sum(one.kv_used_bytes for one in signals) / max(1, reserved),
            start_s=max((loaded.start_s for loaded in self._loaded.values()), default=0.0),
            leaving=float(self._interrupted),
        )
        return {name: float(getattr(found, name)) for name in found.__struct_fields__}

    def noticed(self, notice: Notice) -> None:
        """The node will be taken away: have Ray start replacements elsewhere; after an interruption, leave."""
        self._keep(asyncio.create_task(self._leave(notice), name="leave"))

    async def unload(self, function: str) -> None:
        """Make place for another function; what runs of this one goes on elsewhere."""
        if (loaded := self._loaded.pop(function, None)) is not None:
            await loaded.close()

    def _start(self, function: str, loaded: Loaded) -> None:
        if self._loaded.get(function) is not loaded:
            self._loaded[function] = loaded
            loaded.start()

    async def close(self) -> None:
        """End everything; what still runs goes on elsewhere."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._opening.values(), return_exceptions=True)
        for function in list(self._loaded):
            await self.unload(function)

    async def _leave(self, notice: Notice) -> None:
        """Have a replacement started, and only then take nothing more and hand over what cannot end here in time.

        Where no replacement comes, half of the time that is left is for waiting, and half for leaving.
        """
        ends_at = time.monotonic() + notice.seconds_left
        interrupted = notice.kind is Kind.INTERRUPTION
        self._interrupted = self._interrupted or interrupted
        await asyncio.to_thread(drain_this_node, notice)
        if not interrupted:
            return
        await self._replacement(ends_at - notice.seconds_left * (1 - WAITING_SHARE))
        self._leaving = True
        seconds_left = ends_at - time.monotonic()
        plan = plan_departure([one.open for one in self._running.values()], self._inter_token_s, seconds_left)
        for engine_id in plan.moving:
            self._running[engine_id].move()
        await asyncio.sleep(max(0.0, ends_at - MARGIN_S - time.monotonic()))
        for running in self._running.values():
            running.move()

    async def _replacement(self, until: float) -> None:
        """Wait for a replacement, but not for ever."""
        while (left_s := until - time.monotonic()) > 0:
            try:
                if await asyncio.to_thread(is_replaced):
                    return
            except Exception as error:  # noqa: BLE001 - whatever Ray raises: it cannot say now
                logger.warning("whether there is a replacement is not known: %s", error)
            await asyncio.sleep(min(left_s, LOOK_AGAIN_S))

    async def _answers(self, running: Running, loaded: Loaded) -> AsyncIterator[FromAttempt]:
        attempt = running.attempt
        stages: Stages | None = loaded.stages
        async for events in _gathered(loaded.backend.submit(_renamed(attempt.sequence, running.engine_id))):
            # nobody but this replica itself cancels what is still listened to
            handed_over = events[-1].finish is FinishReason.CANCELLED
            tokens = events[:-1] if handed_over else events
            if tokens:
                part = Part(attempt.epoch, running.num_emitted, self.id, time.monotonic(), tokens, stages)
                stages = None
                self._count(running, tokens)
                yield part
            if handed_over:
                yield HandOver(attempt.epoch, self.id)

    def _count(self, running: Running, events: list[TokenEvent]) -> None:
        for event in events:
            if event.token_id is None:
                continue
            running.num_emitted += 1
            running.has_begun = True
            if running.last_at is not None:
                gap_s = event.at - running.last_at
                self._inter_token_s += (PACE_WEIGHT if self._inter_token_s else 1.0) * (gap_s - self._inter_token_s)
            running.last_at = event.at
            if event.prefill_started_at is not None:
                num_tokens = len(running.attempt.sequence.prompt_ids)
                self._measures.prefilled(num_tokens, event.at - event.prefill_started_at)
        if events[-1].finish is not None:
            self._measures.served(time.monotonic() - running.begun_at)

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _renamed(sequence: Sequence, engine_id: str) -> Sequence:
    """Return a sequence under the name of its attempt: the one before may still be on its way out."""
    return dataclasses.replace(sequence, id=engine_id)


async def _gathered(events: TokenStream) -> AsyncIterator[list[TokenEvent]]:
    """Yield the first event at once, and then what came in each interval."""
    gathered: list[TokenEvent] = []
    came = asyncio.Event()

    async def gather() -> None:
        async for event in events:
            gathered.append(event)
            came.set()

    gathering = asyncio.create_task(gather())
    try:
        finished = False
        while not finished:
            await came.wait()
            came.clear()
            batch, gathered[:] = gathered[:], []
            if not batch:
                continue
            finished = batch[-1].finish is not None
            yield batch
            if not finished:
                await asyncio.sleep(PART_INTERVAL_S)
    finally:
        gathering.cancel()
