"""Errors as the Anthropic API words them."""

from __future__ import annotations

from pilotlight.api.anthropic_types import ErrorEvent, ErrorType, MessageError
from pilotlight.errors import PilotlightError

PATHS = "/v1/messages"
"""Where the clients of this API call."""

TYPES: dict[int, ErrorType] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def error_event(error: PilotlightError, request_id: str | None) -> ErrorEvent:
    """Return the object that stands for an error, in a body or in a stream."""
    kind = TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    return ErrorEvent(MessageError(kind, error.message), request_id)
