"""From an HTTP request to an invocation and back: what every surface that generates has in common."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from pilotlight.api.sse import EventStream, cancelled_on_disconnect
from pilotlight.api.wire import SamplingBody
from pilotlight.errors import BodyTooLarge, FunctionNotFound
from pilotlight.function import Function, Invocation
from pilotlight.function import Request as FunctionRequest


class Intake:
    """Reads bodies up to their limit, finds functions by name, and ties an invocation to its client's connection."""

    def __init__(self, functions: Mapping[str, Function], max_body_bytes: int) -> None:
        self.functions = functions
        self._max_body_bytes = max_body_bytes

    def function(self, name: str) -> Function:
        if name not in self.functions:
            raise FunctionNotFound(name, list(self.functions))
        return self.functions[name]

    async def read_body(self, request: Request) -> bytes:
        """Read the body, and stop reading at the limit."""
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self._max_body_bytes:
                raise BodyTooLarge(self._max_body_bytes)
        return bytes(body)

    async def answer(
        self,
        request: Request,
        body: SamplingBody,
        asked: FunctionRequest,
        stream: Callable[[Invocation], AsyncIterator[bytes]],
        whole: Callable[[Invocation], Awaitable[object]],
    ) -> Response:
        """Run what a body asks for, and answer with its frames as they come or with one object when it is complete."""
        timed = dataclasses.replace(asked, deadline_at=getattr(request.state, "deadline_at", None))
        invocation = await self.function(body.model).invoke(timed)
        if body.stream:
            return EventStream(invocation, stream(invocation))
        async with cancelled_on_disconnect(invocation, request.receive):
            return json_response(await whole(invocation))


def request_id_of(request: Request) -> str:
    request_id: str = request.state.request_id
    return request_id


def json_response(content: object) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")
