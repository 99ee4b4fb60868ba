"""Requests that may be sent twice: under one ``Idempotency-Key`` there is one invocation, one answer and one bill.

The first request makes the answer; the same request again joins it while it runs, or gets it from the ledger. A stream
made so carries event ids, and ``Last-Event-ID`` goes on after the event that was the last to arrive.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from pilotlight.api.errors import error_response
from pilotlight.api.kept_answer import Head, KeptAnswer, KeptResponse
from pilotlight.errors import (
    EngineError,
    IdempotencyConflict,
    InvalidRequest,
    LedgerUnavailable,
    PilotlightError,
    RequestNotFound,
)
from pilotlight.function import Invocation
from pilotlight.metering.idempotency import RETRIED, Claim, Claimed, conflict_of

logger = logging.getLogger("pilotlight.api")

IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")
EVENT_ID = re.compile(r"([A-Za-z0-9._:-]{1,128}):([0-9]{1,9})", re.ASCII)
STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}
REPLAYED = {"idempotent-replayed": "true"}


class AnswerLedger(Protocol):
    """Where answers are kept beside their invocations."""

    def claimed(self, claim: Claim) -> Claimed | None:
        """Return the claim that holds, if there is one; may block."""

    async def keep_answer(self, request_id: str, answer: bytes) -> None:
        """Keep a complete answer beside its claim."""


@dataclass(frozen=True, slots=True)
class Repeatable:
    """What a request says about being repeated."""

    claim: Claim | None
    resume: tuple[str, int] | None
    fingerprint: str
    key_id: str | None


@dataclass(frozen=True, slots=True)
class Making:
    """How an answer is made: its invocation, and then its frames or its one body, for the endpoint of ``scope``."""

    invoke: Callable[[], Awaitable[Invocation]]
    stream: Callable[[Invocation], AsyncIterator[bytes]]
    whole: Callable[[Invocation], Awaitable[object]]
    is_stream: bool
    ping: bytes
    scope: Scope


class KeptAnswers:
    """The answers of this process that somebody may ask for again."""

    def __init__(
        self,
        ledger: AnswerLedger,
        resume_window_s: float,
        ttl_s: float,
        max_bytes: int,
        *,
        resumes_all_streams: bool = False,
    ) -> None:
        self._ledger = ledger
        self._resume_window_s = resume_window_s
        self._ttl_s = ttl_s
        self._max_bytes = max_bytes
        self._resumes_all_streams = resumes_all_streams
        self._by_request: dict[str, KeptAnswer] = {}
        self._by_claim: dict[tuple[str, str], KeptAnswer] = {}
        self._opening: dict[KeptAnswer, asyncio.Future[Invocation]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_bytes = 0

    def asked(self, request: Request, body: bytes, key_id: str | None, is_stream: bool) -> Repeatable | None:
        """Read the headers of a request; None when nobody will ask for its answer again. ``body`` is JSON.

        Raises:
            InvalidRequest: a header is malformed.
        """
        key = request.headers.get("idempotency-key")
        resume = _event_id(request.headers.get("last-event-id"))
        if key is None and resume is None and not (self._resumes_all_streams and is_stream):
            return None
        if key is not None and IDEMPOTENCY_KEY.fullmatch(key) is None:
            raise InvalidRequest("idempotency-key", "Idempotency-Key: expected 1 to 255 printable characters")
        fingerprint = _fingerprint(request.scope["path"], body)
        now = time.time()
        claim = None if key is None else Claim(key_id or "", key, fingerprint, now, now + self._ttl_s)
        return Repeatable(claim, resume, fingerprint, key_id)

    async def answer(self, asked: Repeatable, request_id: str, making: Making) -> Response:
        """Return the answer that there is already, or make it.

        Raises:
            IdempotencyConflict: the key was used for another request, or the answer is not kept any more.
            RequestNotFound: there is no such stream to go on with.
            PilotlightError: what invoking raises.
        """
        held = await self._held(asked)
        after = 0 if asked.resume is None else asked.resume[1]
        if held is not None:
            await self._opened(held)
            held.check(after)
            return KeptResponse(held, after, REPLAYED)
        if asked.resume is not None:
            raise RequestNotFound(f"the stream of {asked.resume[0]!r} is not kept here (any more)")
        made = self._make(asked, request_id, making)
        invocation = await self._opened(made)
        assert invocation is not None
        headers = {} if invocation.standing is None else invocation.standing.headers()
        return KeptResponse(made, 0, headers)

    async def close(self) -> None:
        """Wait until what was generated is kept; the functions must have ended."""
        await asyncio.gather(*self._tasks)

    async def _held(self, asked: Repeatable) -> KeptAnswer | None:
        """Return the answer in memory or in the ledger, if there is one, for the same caller and the same request."""
        held = self._remembered(asked)
        if held is None and asked.claim is not None:
            claimed = await asyncio.to_thread(self._ledger.claimed, asked.claim)
            if claimed is not None and claimed.answer is None and self._remembered(asked) is None:
                claimed = await asyncio.to_thread(self._ledger.claimed, asked.claim)  # it may just have been kept
            held = self._remembered(asked)  # another request may have come meanwhile
            if held is None and claimed is not None and not claimed.may_be_retried:
                if claimed.answer is None or claimed.fingerprint != asked.fingerprint:
                    raise conflict_of(claimed, asked.claim) or AssertionError
                held = KeptAnswer.decoded(claimed.request_id, claimed.fingerprint, asked.key_id, claimed.answer)
        if held is None:
            return None
        if held.fingerprint != asked.fingerprint:
            raise IdempotencyConflict("this was asked with another body or at another endpoint; send the same request")
        if asked.resume is not None and asked.resume[0] != held.request_id:
            raise IdempotencyConflict(f"the Last-Event-ID is not one of the request {held.request_id!r}")
        return held

    def _remembered(self, asked: Repeatable) -> KeptAnswer | None:
        if asked.claim is not None:
            return self._by_claim.get((asked.claim.caller, asked.claim.idempotency_key))
        if asked.resume is None:
            return None
        held = self._by_request.get(asked.resume[0])
        return held if held is not None and held.key_id == asked.key_id else None

    async def _opened(self, answer: KeptAnswer) -> Invocation | None:
        """Wait until the answer has begun; raises what kept it from beginning."""
        opening = self._opening.get(answer)
        return None if opening is None else await asyncio.shield(opening)

    def _make(self, asked: Repeatable, request_id: str, making: Making) -> KeptAnswer:
        answer = KeptAnswer(request_id, asked.fingerprint, asked.key_id)
        self._by_request[request_id] = answer
        if asked.claim is not None:
            self._by_claim[asked.claim.caller, asked.claim.idempotency_key] = answer
        self._opening[answer] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(self._run(answer, asked.claim, making), name=f"answer {request_id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return answer

    async def _run(self, answer: KeptAnswer, claim: Claim | None, making: Making) -> None:
        opening = self._opening[answer]
        try:
            invocation = await making.invoke()
        except Exception as error:  # noqa: BLE001 - every client that waits for this answer gets it
            self._forget(answer, claim)
            opening.set_exception(error)
            opening.exception()  # retrieved: its client may have left
            return
        opening.set_result(invocation)
        watching = asyncio.create_task(self._cancel_abandoned(answer, invocation))
        await self._write(answer, invocation, making)
        watching.cancel()
        if invocation.record is not None and invocation.record.finish_reason in RETRIED:
            self._forget(answer, claim)  # whoever asks again asks anew
            return
        content = answer.encoded()
        if claim is not None and invocation.record is not None and content is not None:
            with contextlib.suppress(LedgerUnavailable):
                await self._ledger.keep_answer(answer.request_id, content)
        if claim is None:
            asyncio.get_running_loop().call_later(self._resume_window_s, self._forget, answer, claim)
        else:
            self._forget(answer, claim)

    async def _write(self, answer: KeptAnswer, invocation: Invocation, making: Making) -> None:
        """Write the answer to its end; a stream has begun at once, and anything else when its status is known."""
        try:
            if making.is_stream:
                answer.begin(Head(200, STREAM_HEADERS, is_stream=True, ping=making.ping))
                async for piece in making.stream(invocation):
                    self._add(answer, piece)
            else:
                content = msgspec.json.encode(await making.whole(invocation))
                answer.begin(Head(200, {"content-type": "application/json"}, is_stream=False))
                self._add(answer, content)
        except Exception as error:
            if not isinstance(error, PilotlightError):
                logger.exception("the answer of %s failed", answer.request_id)
            if not answer.is_stream:
                known = error if isinstance(error, PilotlightError) else EngineError("an internal error occurred")
                refusal = error_response(known, making.scope)
                headers = {name: value for name, value in refusal.headers.items() if name != "content-length"}
                answer.begin(Head(refusal.status_code, headers, is_stream=False))
                self._add(answer, bytes(refusal.body))
        finally:
            answer.end()

    async def _cancel_abandoned(self, answer: KeptAnswer, invocation: Invocation) -> None:
        """Cancel what nobody has read for as long as a lost client may take to come back."""
        idle_since: float | None = None
        while True:
            await asyncio.sleep(min(1.0, self._resume_window_s / 4))
            now = time.monotonic()
            idle_since = None if answer.num_readers else idle_since or now
            if idle_since is not None and now - idle_since >= self._resume_window_s:
                invocation.cancel()
                return

    def _add(self, answer: KeptAnswer, piece: bytes) -> None:
        """Add a piece within the memory: what has ended goes first, then what the readers of this one have."""
        answer.add(piece)
        self._num_bytes += len(piece)
        if self._num_bytes > self._max_bytes:
            for kept in [kept for kept in self._by_request.values() if kept.ended]:
                if self._num_bytes > self._max_bytes:
                    self._forget(kept, None)
        if self._num_bytes > self._max_bytes:
            self._num_bytes -= answer.drop_read()

    def _forget(self, answer: KeptAnswer, claim: Claim | None) -> None:
        self._opening.pop(answer, None)
        if self._by_request.get(answer.request_id) is answer:
            del self._by_request[answer.request_id]
            self._num_bytes -= answer.num_bytes
        if claim is not None and self._by_claim.get((claim.caller, claim.idempotency_key)) is answer:
            del self._by_claim[claim.caller, claim.idempotency_key]


def _fingerprint(path: str, body: bytes) -> str:
    """Return what is the same for the same request, however a client's library writes its JSON."""
    canonical = msgspec.json.encode(msgspec.json.decode(body), order="sorted")
    return hashlib.sha256(path.encode() + b"\n" + canonical).hexdigest()


def _event_id(header: str | None) -> tuple[str, int] | None:
    if header is None:
        return None
    match = EVENT_ID.fullmatch(header)
    if match is None:
        raise InvalidRequest("last-event-id", "Last-Event-ID: expected the id of an event of ours")
    return match[1], int(match[2])
