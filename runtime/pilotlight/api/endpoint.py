"""An endpoint, declared once: its route and its entry in ``/openapi.json`` are both made from this."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pilotlight.api.wire import Body
from pilotlight.errors import (
    BodyTooLarge,
    CapacityError,
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineError,
    FunctionNotFound,
    IdempotencyConflict,
    InvalidKey,
    InvalidRequest,
    LimitExceeded,
    NotPermitted,
    PilotlightError,
    RequestCancelled,
    RequestIdInUse,
    RequestNotFound,
)

Handler = Callable[[Request], Awaitable[Response]]

ANY = (InvalidRequest, InvalidKey, EngineError)
"""A malformed ``x-request-id``, a missing API key, and a defect of ours, are possible everywhere."""

GENERATION = (
    InvalidRequest,
    ContextLengthExceeded,
    InvalidKey,
    NotPermitted,
    FunctionNotFound,
    RequestIdInUse,
    IdempotencyConflict,
    RequestNotFound,
    RequestCancelled,
    BodyTooLarge,
    LimitExceeded,
    CapacityError,
    DeadlineExceeded,
    EngineError,
)
"""What an endpoint that generates can answer instead."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One operation. ``answer`` is the type of its JSON body, or a media type; ``event`` that of a stream's frames.

    A stream with a ``terminator`` ends with that, which is no JSON, or else with an error.
    ``also`` are media types that an Accept header may ask for instead. ``query`` and ``headers`` are structs whose
    fields are the parameters there.
    """

    method: str
    path: str
    handler: Handler
    summary: str
    answer: Any
    body: type[Body] | None = None
    event: Any = None
    terminator: str | None = None
    also: tuple[str, ...] = ()
    query: type[msgspec.Struct] | None = None
    headers: type[msgspec.Struct] | None = None
    refusals: tuple[type[PilotlightError], ...] = ANY

    @property
    def name(self) -> str:
        """The handler's name, behind that of its surface where it has one: ``models``, ``messages_create``."""
        return self.handler.__qualname__.removeprefix("Api.").replace(".", "_").lower()


def routes(endpoints: Iterable[Endpoint]) -> list[Route]:
    """Return the routes of these endpoints: one for each path, so that a refused method is told all that it takes."""
    by_path: dict[str, dict[str, Handler]] = {}
    for endpoint in endpoints:
        by_path.setdefault(endpoint.path, {})[endpoint.method] = endpoint.handler
    return [Route(path, _by_method(handlers), methods=list(handlers)) for path, handlers in by_path.items()]


def _by_method(handlers: dict[str, Handler]) -> Handler:
    async def handle(request: Request) -> Response:
        return await handlers["GET" if request.method == "HEAD" else request.method](request)

    return handle
