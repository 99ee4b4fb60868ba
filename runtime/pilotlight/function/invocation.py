"""One running request, as its client sees it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from collections.abc import Sequence as Items
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING

from pilotlight.answer import Choice, ChoiceStream, Delta
from pilotlight.errors import LedgerUnavailable, PilotlightError
from pilotlight.function.request import Request
from pilotlight.mailbox import Mailbox
from pilotlight.metering.limits import Standing
from pilotlight.metering.record import UsageRecord
from pilotlight.request import Continuation, FinishReason

if TYPE_CHECKING:
    from pilotlight.function.function import Function


class Cut(StrEnum):
    """Why an answer was ended that had more to say."""

    DEADLINE = "the time that the platform or the function allows"
    TIMEOUT = "the time that the client allows"
    SHUTDOWN = "the server shuts down"


class Invocation:
    """One running request on a function. Iterate over it for the answer; after that it has a ``record``."""

    def __init__(
        self, function: Function, request: Request, num_prompt_tokens: int, streams: Items[ChoiceStream]
    ) -> None:
        self.request = request
        self.submitted_at = time.monotonic()
        self.num_prompt_tokens = num_prompt_tokens
        self.num_delivered_tokens = 0
        self.record: UsageRecord | None = None
        self.failure: PilotlightError | None = None
        self.cut: Cut | None = None
        self.seed = 0
        self.cancelled = False
        self.submitted = False
        self.unmetered: LedgerUnavailable | None = None
        self.standing: Standing | None = None
        self.task: asyncio.Task[None]
        self.admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.function = function
        self.streams = streams
        self._deltas: Mailbox[Delta | PilotlightError | None] = Mailbox()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        """Yield the answer as it is generated; ends when the usage record is durable.

        Raises:
            EngineError: the model run failed; what was generated is metered.
            LedgerUnavailable: the usage record could not be written.
        """
        while True:
            item = await self._deltas.get()
            if item is None:
                return
            if isinstance(item, PilotlightError):
                self.failure = item
                raise item
            self.num_delivered_tokens += len(item.token_ids)
            yield item

    async def choices(self) -> list[Choice]:
        """Return the whole answer, once its usage record is durable; raises what iterating over it raises."""
        deltas = [delta async for delta in self]
        choices = [Choice(stream.index, self.finish(stream.index)) for stream in self.streams]
        for choice, stream in zip(choices, self.streams, strict=True):
            choice.tool_calls = list(stream.begun_calls)
        for delta in deltas:
            choices[delta.choice].add(delta)
        return choices

    def finish(self, choice: int) -> FinishReason:
        """Return why a choice of a finished invocation ended."""
        finish = self.streams[choice].finish
        assert finish is not None
        return finish

    def cancel(self) -> None:
        """End the generation within a step; what was generated is metered. Harmless when it has ended."""
        self.function.cancel(self.request.id)

    def end_early(self, cut: Cut) -> None:
        """End the generation within a step, as if its length were reached."""
        self.cut = self.cut or cut
        self.cancel()

    @property
    def continuation(self) -> Continuation | None:
        """What another invocation needs to go on with this answer, if it was cut off.

        One that its client wished to end is no longer paid for, or its prompt could be read for nothing any number of
        times.
        """
        if self.cut is None or self.streams[0].finish is not FinishReason.DEADLINE:
            return None
        emitted_ids = tuple(self.streams[0].token_ids)
        before = self.request.continues
        paid = bool(emitted_ids) and self.cut is not Cut.TIMEOUT
        return Continuation(self.request.id if before is None else before.first_id, emitted_ids, self.seed, paid)

    @cached_property
    def resume_token(self) -> str | None:
        """The token that continues this answer, where it was cut off and there are such tokens."""
        continuation = self.continuation
        if self.request.seal is None or continuation is None:
            return None
        return self.request.seal(continuation)

    def push(self, item: Delta | PilotlightError | None) -> None:
        self._deltas.put(item)


@contextlib.contextmanager
def deadline(invocation: Invocation, latest_at: float) -> Iterator[None]:
    """Have the invocation end early at its first deadline, ``latest_at`` at last, if the block is not left before."""
    request = invocation.request
    ends = [(latest_at, Cut.DEADLINE), (request.deadline_at, Cut.DEADLINE), (request.timeout_at, Cut.TIMEOUT)]
    first_at, cut = min((at, cut) for at, cut in ends if at is not None)
    left_s = max(0.0, first_at - time.monotonic())
    timer = asyncio.get_running_loop().call_later(left_s, invocation.end_early, cut)
    try:
        yield
    finally:
        timer.cancel()
