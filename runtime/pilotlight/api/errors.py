"""The one place where errors become HTTP: the client's envelope, its status and its headers."""

from __future__ import annotations

import logging
import math

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from pilotlight.api import anthropic_errors
from pilotlight.api.objects import ErrorEnvelope, ErrorObject
from pilotlight.errors import (
    CapacityError,
    EngineError,
    IdempotencyConflict,
    InvalidKey,
    LimitExceeded,
    PilotlightError,
    RequestIdInUse,
)

logger = logging.getLogger("pilotlight.api")

MAX_RETRY_S = 60
"""The SDKs retry 429 by themselves; whoever has to wait for longer than that should be told at once."""


def error_body(error: PilotlightError) -> bytes:
    """Return ``{"error": {message, type, param, code}}``."""
    return msgspec.json.encode(ErrorEnvelope(ErrorObject(error.message, error.type, error.param, error.code)))


def error_response(error: PilotlightError, scope: Scope) -> Response:
    """Return the response to a request that failed, in the words of the API that the client called."""
    headers = {}
    if isinstance(error, CapacityError | LimitExceeded):
        headers["retry-after"] = str(math.ceil(error.retry_after_s))
    if isinstance(error, LimitExceeded):
        headers |= error.headers
        if error.retry_after_s > MAX_RETRY_S:
            headers["x-should-retry"] = "false"
    if isinstance(error, InvalidKey):
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, EngineError | RequestIdInUse | IdempotencyConflict):
        # The SDKs retry 409 and 500 by themselves; these were billed, or would fail the same way.
        headers["x-should-retry"] = "false"
    body = error_body(error)
    if scope["path"].startswith(anthropic_errors.PATHS):
        body = msgspec.json.encode(anthropic_errors.error_event(error, scope.get("state", {}).get("request_id")))
    return Response(body, error.status, headers, "application/json")


async def on_pilotlight_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, PilotlightError)
    return error_response(error, request.scope)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Answer for routes and methods that don't exist."""
    assert isinstance(error, HTTPException)
    hint = "; /docs lists the endpoints" if error.status_code == 404 else ""
    answer = PilotlightError(f"{request.method} {request.url.path}: {error.detail.lower()}{hint}")
    answer.status, answer.type, answer.code = error.status_code, "invalid_request_error", "not_found"
    if error.status_code == 405:
        answer.code = "method_not_allowed"
    response = error_response(answer, request.scope)
    response.headers.update(error.headers or {})
    return response


async def on_unexpected_error(request: Request, error: Exception) -> Response:
    """Log a defect of ours with its traceback; the client learns only that there was one."""
    logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    response = error_response(EngineError("an internal error occurred"), request.scope)
    response.headers.update(request.scope.get("state", {}).get("headers", {}))  # what would add them is passed by
    return response
