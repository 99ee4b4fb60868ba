"""From an HTTP request to an invocation and back: what every surface that generates has in common."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import partial

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from pilotlight.api.auth import Caller, caller_of
from pilotlight.api.catalogue import catalogue_of
from pilotlight.api.idempotency import KeptAnswers, Making, Repeatable
from pilotlight.api.resumption import Resumption
from pilotlight.api.sse import COMMENT, EventStream, cancelled_on_disconnect
from pilotlight.api.wire import SamplingBody
from pilotlight.errors import BodyTooLarge, FunctionNotFound, InvalidRequest, NotPermitted, RequestCancelled
from pilotlight.function import Function, Invocation
from pilotlight.function import Request as FunctionRequest
from pilotlight.metering.record import UsageRecord
from pilotlight.request import FinishReason

TIMEOUT_HEADER = "x-request-timeout-ms"
MAX_TIMEOUT_MS = 86_400_000


class Intake:
    """Reads bodies up to their limit, finds functions by name, and ties an invocation to its client's connection."""

    def __init__(
        self,
        functions: Mapping[str, Function],
        max_body_bytes: int,
        resumption: Resumption,
        kept_answers: KeptAnswers | None = None,
    ) -> None:
        self.functions = catalogue_of(functions)
        self._resumption = resumption
        self._kept_answers = kept_answers
        self._max_body_bytes = max_body_bytes

    def function(self, name: str, caller: Caller) -> Function:
        if name not in self.functions:
            raise FunctionNotFound(name, [other for other in self.functions if caller.may_call(other)])
        if not caller.may_call(name):
            raise NotPermitted(f"this API key may not call {name!r}")
        return self.functions[name]

    async def read_body(self, request: Request) -> bytes:
        """Read the body, and stop reading at the limit.

        Raises:
            BodyTooLarge: see above.
            InvalidRequest: the body is packed.
            RequestCancelled: the client left in the middle of it.
        """
        if (encoding := request.headers.get("content-encoding", "identity")) != "identity":
            message = f"content-encoding: {encoding} is not supported; send the body as it is"
            raise InvalidRequest("content-encoding", message, "unsupported_parameter")
        body = bytearray()
        try:
            async for chunk in request.stream():
                body += chunk
                if len(body) > self._max_body_bytes:
                    raise BodyTooLarge(self._max_body_bytes)
        except ClientDisconnect as left:
            raise RequestCancelled from left
        request.state.body = bytes(body)
        return bytes(body)

    async def answer(
        self,
        request: Request,
        body: SamplingBody,
        asked: FunctionRequest,
        stream: Callable[[Invocation], AsyncIterator[bytes]],
        whole: Callable[[Invocation], Awaitable[object]],
        ping: bytes = COMMENT,
    ) -> Response:
        """Run what a body asks for, and answer with its frames as they come or with one object when it is complete.

        What may be asked for twice is answered from what is kept, or made so that it is kept.
        """
        caller = caller_of(request)
        of_platform: float | None = getattr(request.state, "deadline_at", None)
        whose = dataclasses.replace(
            asked,
            deadline_at=of_platform,
            timeout_at=_timeout_at(request),
            tenant=caller.tenant,
            key_id=caller.key_id,
        )
        self.function(body.model, caller)
        function = self._resumption.version(body, self.functions) or await self.functions.choose(body.model)
        whose = await self._resumption.prepared(request, body, whose, function)
        if (repeatable := self._repeatable(request, body.stream)) is not None:
            answers, asked_again = repeatable
            claimed = dataclasses.replace(whose, claim=asked_again.claim)
            making = Making(partial(function.invoke, claimed), stream, whole, body.stream, ping, request.scope)
            return await answers.answer(asked_again, whose.id, making)
        invocation = await function.invoke(whose)
        response: Response
        if body.stream:
            response = EventStream(invocation, stream(invocation), ping)
        else:
            async with cancelled_on_disconnect(invocation, request.receive):
                response = json_response(await whole(invocation))
        if invocation.standing is not None:
            response.headers.update(invocation.standing.headers())
        return response

    def _repeatable(self, request: Request, is_stream: bool) -> tuple[KeptAnswers, Repeatable] | None:
        if self._kept_answers is None:
            if "idempotency-key" in request.headers:
                raise InvalidRequest(
                    "idempotency-key", "Idempotency-Key is not supported here", "unsupported_parameter"
                )
            return None
        found = self._kept_answers.asked(request, request.state.body, caller_of(request).key_id, is_stream)
        return None if found is None else (self._kept_answers, found)


def completed(invocation: Invocation) -> UsageRecord:
    """Return the record of an invocation that has ended.

    Raises:
        RequestCancelled: it was cancelled before its answer was complete.
    """
    assert invocation.record is not None
    if invocation.record.finish_reason is FinishReason.CANCELLED:
        raise RequestCancelled
    return invocation.record


def _timeout_at(request: Request) -> float | None:
    """Return when the client wants the answer to end, which it may say in ``x-request-timeout-ms``.

    Raises:
        InvalidRequest: the header is not a number of milliseconds.
    """
    given = request.headers.get(TIMEOUT_HEADER)
    if given is None:
        return None
    if not given.isdecimal() or not 0 < int(given) <= MAX_TIMEOUT_MS:
        raise InvalidRequest(TIMEOUT_HEADER, f"{TIMEOUT_HEADER}: expected milliseconds, from 1 to {MAX_TIMEOUT_MS}")
    return time.monotonic() + int(given) / 1000


def request_id_of(request: Request) -> str:
    request_id: str = request.state.request_id
    return request_id


def json_response(content: object) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")
