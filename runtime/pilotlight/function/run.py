"""One invocation on its way to its record: admitted, generated, metered token by token, and written down."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Sequence as Items
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import msgspec

from pilotlight.answer import ChoiceStream, Delta, overall_finish
from pilotlight.errors import (
    CapacityError,
    DeadlineExceeded,
    Draining,
    EngineError,
    LedgerUnavailable,
    OutOfMemory,
    PilotlightError,
    StartFailed,
)
from pilotlight.function.invocation import Cut, Invocation, deadline
from pilotlight.function.progress import Progress
from pilotlight.mailbox import TokenStream
from pilotlight.metering.marks import Mark
from pilotlight.metering.record import Admission, UsageRecord, final_record, utc_text
from pilotlight.metering.usage import Usage
from pilotlight.request import FinishReason, Sequence, TokenEvent

if TYPE_CHECKING:
    from pilotlight.function.function import Function

logger = logging.getLogger("pilotlight.function")

RETRY_DELAYS_S = (0.1, 0.3, 1.0, 3.0, 5.0)
"""How long to wait before a record is written again, while the ledger cannot be written."""


class Run:
    """What a function does for one invocation."""

    def __init__(self, function: Function, invocation: Invocation, sequences: Items[Sequence]) -> None:
        request = invocation.request
        self._function = function
        self._invocation = invocation
        self._sequences = sequences
        self._events: list[TokenStream] | None = None
        self._held: list[Delta] = []
        self._progress = Progress(request.received_at, invocation.submitted_at)
        self._progress.prompt_is_paid = request.is_paid

    async def submit(self) -> None:
        """Submit all sequences of the request, or none.

        Raises:
            CapacityError: no place is free.
        """
        self._invocation.submitted = True
        submitted: list[TokenStream] = []
        try:
            for sequence in self._sequences:
                submitted.append(self._function.backend.submit(sequence))
        except PilotlightError:
            await self._discard(submitted)
            raise
        self._events = submitted

    async def carry(self) -> None:
        """Carry the invocation to its record; what was not submitted yet is submitted once it is admitted."""
        function, invocation = self._function, self._invocation
        self._progress.cold_start_ms = function.reported_cold_start_ms()
        admission = self._admission()
        try:
            admitted = await function.ledger.admit(admission, invocation.request.claim)
        except PilotlightError as error:
            await self._discard(self._events or [])
            invocation.admitted.set_exception(error)
            return
        invocation.standing = admitted.standing
        admission = msgspec.structs.replace(admission, attempt=admitted.attempt)
        try:
            if self._events is None and invocation.cancelled:
                self._events = [_cancelled() for _ in self._sequences]
            elif self._events is None:
                await self.submit()
        except PilotlightError as error:
            await self._reject(admission, error)
            return
        invocation.admitted.set_result(None)
        await self._end(admission)

    async def _end(self, admission: Admission) -> None:
        """Generate and write the record; a defect of ours ends this invocation, and no other."""
        function, invocation, progress = self._function, self._invocation, self._progress
        try:
            with deadline(invocation, invocation.request.received_at + function.max_duration_s):
                failure = await self._generate()
            usage = progress.usage(invocation)
            if progress.replica_id is not None:
                admission = msgspec.structs.replace(
                    admission, replica_id=progress.replica_id, capacity=function.capacity_of(progress.replica_id)
                )
            record = final_record(admission, usage, progress.timings(), progress.finish, progress.stop_detail)
            await self._finish(record)
            function.observer.finished(record)
            invocation.record = record
            invocation.push(failure)
        except PilotlightError as error:
            invocation.push(error)
        except Exception as error:
            logger.exception("invocation %s failed", invocation.request.id)
            invocation.cancel()
            invocation.push(_caused_by(error))

    async def _generate(self) -> PilotlightError | None:
        """Turn token events into deltas; a failed run is returned, since it is metered like any other end."""
        streams, progress = self._invocation.streams, self._progress
        await asyncio.gather(
            *(self._follow(stream, of) for stream, of in zip(streams, self._events or [], strict=True))
        )
        self._function.deliveries.release()
        progress.finish = overall_finish([self._invocation.finish(stream.index) for stream in streams])
        details = (stream.stop_detail for stream in streams if stream.finish is progress.finish)
        progress.stop_detail = next(details, None)
        if progress.checkpoint is not None:
            await progress.checkpoint
        return self._failure()

    def _failure(self) -> PilotlightError | None:
        """Return what the client is told instead of a finish; it is noted in the record."""
        invocation, progress = self._invocation, self._progress
        if invocation.unmetered is not None:
            progress.finish, progress.stop_detail = FinishReason.ERROR, invocation.unmetered.message
            return invocation.unmetered
        if (refusal := _refusal(invocation, progress)) is not None:
            progress.finish, progress.stop_detail = FinishReason.REJECTED, refusal.message
            return refusal
        if progress.finish is not FinishReason.ERROR:
            return None
        if progress.retry_after_s is not None:
            return StartFailed(progress.stop_detail or "", progress.retry_after_s)
        if progress.out_of_memory_retry_s is not None:
            return OutOfMemory(progress.out_of_memory_retry_s)
        return EngineError("the model run failed; what was generated until then is metered")

    async def _follow(self, stream: ChoiceStream, events: TokenStream) -> None:
        """Carry one choice to its end. Its events are taken where they arrive, without waking a task for each."""
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def listen(event: TokenEvent) -> None:
            if ended.done():
                return
            try:
                self._take(event, stream)
            except Exception as error:  # noqa: BLE001 - a defect here must end this invocation, and no other
                ended.set_exception(error)
            else:
                if event.finish is not None:
                    ended.set_result(None)

        events.listen(listen)
        await ended
        if stream.finish is FinishReason.ERROR:
            self._invocation.cancel()  # the other choices: nobody will see them

    def _take(self, event: TokenEvent, stream: ChoiceStream) -> None:
        """Count one event of a choice, and pass on what it adds."""
        if stream.finish is not None:
            return  # was under way when the stop string was found: neither billed nor delivered
        function, invocation, progress = self._function, self._invocation, self._progress
        if event.token_id is not None:
            progress.count(event)
            stream.count(event.token_id)
            function.observer.token(function.name, stream.gap_s(event))
            self._hold(stream.push(event, function.text_side.tokenizer))
        if stream.finish is not None:
            function.backend.abort(stream.sequence_id)
        elif event.finish is FinishReason.CANCELLED and invocation.cut is not None:
            stream.finish, stream.stop_detail = FinishReason.DEADLINE, invocation.cut
            if invocation.request.seal is None:  # or what is held back belongs to the continuation
                self._hold(stream.cut())
        elif event.finish is not None:
            stream.finish, stream.stop_detail = event.finish, event.error
            progress.retry_after_s = event.retry_after_s
            progress.out_of_memory_retry_s = event.out_of_memory_retry_s

    def _hold(self, delta: Delta) -> None:
        """Deliver a delta once what was used is noted."""
        self._held.append(delta)
        self._function.deliveries.hold(self._invocation.request.id, self)

    @property
    def mark(self) -> Mark:
        """What the invocation has used."""
        return self._progress.mark(self._invocation.num_prompt_tokens)

    def deliver(self) -> None:
        """Pass on what is noted, unless something else could not be metered.

        For the case that the whole machine crashes, a checkpoint is written at the first token and now and then after
        it, one at a time.
        """
        deltas, self._held = self._held, []
        if self._invocation.unmetered is not None:
            return
        for delta in deltas:
            self._invocation.push(delta)
        if self._progress.checkpoint_is_due(self._function.ledger.checkpoint_tokens):
            self._progress.checkpoint = asyncio.create_task(self._checkpoint())

    async def _checkpoint(self) -> None:
        """Record what a crash of the machine would lose. The stream doesn't wait for it, but ends when it fails."""
        invocation = self._invocation
        try:
            await self._function.ledger.checkpoint(invocation.request.id, self._progress.usage(invocation))
        except LedgerUnavailable as error:
            self.end_unmetered(error)

    def end_unmetered(self, error: LedgerUnavailable) -> None:
        """End what can no longer be metered, within a step."""
        logger.error("invocation %s ends because %s", self._invocation.request.id, error.message)
        self._invocation.unmetered = error
        self._invocation.cancel()

    async def _finish(self, record: UsageRecord) -> None:
        """Write the record. While that fails, the client is told, and it is tried again until the function is closed.

        Raises:
            LedgerUnavailable: the function is closed; the admission stays open, and the next start closes it.
        """
        function = self._function
        for delay_s in itertools.chain(RETRY_DELAYS_S, itertools.repeat(RETRY_DELAYS_S[-1])):
            try:
                return await function.ledger.finish(record)
            except LedgerUnavailable as error:
                if function.draining:
                    raise
                self._invocation.push(error)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(function.drain_began.wait(), delay_s)

    async def _reject(self, admission: Admission, cause: PilotlightError) -> None:
        """End what was admitted and then found no place: free of charge, and its reservation is released.

        While the record cannot be written, its client does not wait for it.
        """
        record = final_record(admission, Usage(), self._progress.timings(), FinishReason.REJECTED, cause.message)
        with contextlib.suppress(LedgerUnavailable):
            try:
                await self._function.ledger.finish(record)
            except LedgerUnavailable:
                self._invocation.admitted.set_exception(cause)
                await self._finish(record)
            else:
                self._invocation.admitted.set_exception(cause)
            self._function.observer.finished(record)

    async def _discard(self, submitted: Items[TokenStream]) -> None:
        """End what was submitted of the sequences, the first ones of them."""
        for sequence, _ in zip(self._sequences, submitted, strict=False):
            self._function.backend.abort(sequence.id)
        for events in submitted:
            async for _ in events:
                pass

    def _admission(self) -> Admission:
        function, request, first = self._function, self._invocation.request, self._sequences[0]
        prompt_tokens = request.num_new_prompt_tokens(first.prompt_ids)
        max_new_tokens = sum(one.max_new_tokens - len(one.emitted_ids) for one in self._sequences)
        max_busy_ms = round(function.max_duration_s * 1000)
        started_at_utc = utc_text(datetime.now(UTC))
        prices = function.prices.at(started_at_utc)
        return Admission(
            request_id=request.id,
            function=function.name,
            artifact_digest=function.artifact.digest,
            precision=function.artifact.manifest.precision,
            provider=function.provider,
            replica_id=function.replica_id,
            started_at_utc=started_at_utc,
            prices=prices,
            capacity=function.capacity,
            tee=function.tee,
            model=function.artifact.manifest.source.model,
            tenant=request.tenant,
            key_id=request.key_id,
            idempotency_key=None if request.claim is None else request.claim.idempotency_key,
            reserved_tokens=prompt_tokens + max_new_tokens,
            reserved_micros=prices.most_micros(prompt_tokens, max_new_tokens, max_busy_ms),
            resumes=None if request.continues is None else request.continues.first_id,
            resumed_tokens=request.num_known_tokens(first.prompt_ids) - prompt_tokens,
        )


def _refusal(invocation: Invocation, progress: Progress) -> CapacityError | None:
    """Return what kept an invocation from its first token, if it was want of time or of a replica: it is free.

    An answer that can be continued elsewhere is one, even before its first token.
    """
    if progress.num_completion_tokens:
        return None
    if progress.finish is FinishReason.DEADLINE and (invocation.cut is Cut.TIMEOUT or invocation.request.seal is None):
        return Draining() if invocation.cut is Cut.SHUTDOWN else DeadlineExceeded()
    if progress.finish is FinishReason.ERROR and progress.retry_after_s is not None:
        return StartFailed(progress.stop_detail or "", progress.retry_after_s)
    return None


def _caused_by(error: Exception) -> EngineError:
    """Return what a client learns of a defect of ours; the admission stays open, and is closed as crashed."""
    failure = EngineError("an internal error occurred")
    failure.__cause__ = error
    return failure


def _cancelled() -> TokenStream:
    """Return the end of a sequence that was cancelled before it was submitted."""
    stream = TokenStream()
    stream.put(TokenEvent(None, time.monotonic(), FinishReason.CANCELLED))
    return stream
