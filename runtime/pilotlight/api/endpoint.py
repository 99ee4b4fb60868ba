"""An endpoint, declared once: its route and its entry in ``/openapi.json`` are both made from this."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pilotlight.api.wire import Body
from pilotlight.errors import (
    BodyTooLarge,
    CapacityError,
    ContextLengthExceeded,
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
    EngineError,
)
"""What an endpoint that generates can answer instead."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One operation. ``answer`` is the type of its JSON body, or a media type; ``event`` that of a stream's frames."""

    method: str
    path: str
    handler: Callable[[Request], Awaitable[Response]]
    summary: str
    answer: Any
    body: type[Body] | None = None
    event: Any = None
    refusals: tuple[type[PilotlightError], ...] = ANY


def routes(endpoints: Iterable[Endpoint]) -> list[Route]:
    """Return the routes of these endpoints."""
    return [Route(endpoint.path, endpoint.handler, methods=[endpoint.method]) for endpoint in endpoints]
