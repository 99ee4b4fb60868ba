"""Every error that Pilotlight raises on purpose.

    PilotlightError
    ├── StartupError                 the process ends with one line
    │   ├── ConfigError              pilotlight.toml, PILOTLIGHT_* or an option
    │   └── ArtifactError            missing, truncated, altered, or from a newer format
    ├── RequestError                 the client can mend it: 4xx
    │   ├── InvalidRequest           400, names the parameter
    │   ├── ContextLengthExceeded    400
    │   ├── SwapFailed               409
    │   ├── InvalidKey               401
    │   ├── NotPermitted             403
    │   ├── FunctionNotFound         404
    │   ├── RequestNotFound          404
    │   ├── ResponseNotFound         404
    │   ├── RequestIdInUse           409
    │   ├── IdempotencyConflict      409
    │   ├── RequestCancelled         499
    │   ├── BodyTooLarge             413
    │   └── LimitExceeded            429, of a key; with Retry-After
    ├── CapacityError                try again later: 503, with Retry-After
    │   ├── QueueFull
    │   ├── StartFailed
    │   ├── DeadlineExceeded         504
    │   ├── LedgerUnavailable
    │   ├── ResponseStoreUnavailable
    │   ├── EvidenceUnavailable
    │   ├── OutOfMemory
    │   └── Draining
    └── EngineError                  500, raised from its cause

``api/errors.py`` is the only place which turns them into HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


class PilotlightError(Exception):
    """Base of all: ``message`` is one line for people, the class attributes are for programs."""

    status = 500
    code: str | None = None
    type = "server_error"
    retryable = False
    param: str | None = None

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class StartupError(PilotlightError):
    """Nothing can be served: the process says why in one line and exits with status 1."""


class ConfigError(StartupError):
    """A setting is unknown, malformed or out of range."""

    code = "config_invalid"


class ArtifactError(StartupError):
    """An artifact cannot be trusted or read; the line names the file and what is wrong with it."""

    code = "artifact_invalid"

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path
        self.problem = problem


class RequestError(PilotlightError):
    """The request is at fault; sending it again unchanged will fail again."""

    status = 400
    type = "invalid_request_error"


class InvalidRequest(RequestError):
    """A parameter is missing, malformed, out of range or not supported."""

    code = "invalid_value"

    def __init__(self, param: str | None, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        if code is not None:
            self.code = code


class ContextLengthExceeded(RequestError):
    """The prompt leaves no room for a single new token."""

    code = "context_length_exceeded"

    def __init__(self, num_prompt_tokens: int, max_context_tokens: int, param: str) -> None:
        super().__init__(
            f"the prompt has {num_prompt_tokens} tokens; this model's maximum context length is {max_context_tokens}, "
            f"of which at least one is left for the answer"
        )
        self.param = param


class FunctionNotFound(RequestError):
    """No function of that name is served here."""

    status = 404
    code = "model_not_found"
    param = "model"

    def __init__(self, name: str, available: list[str]) -> None:
        super().__init__(f"there is no function {name!r} here; available: {', '.join(sorted(available))}")


class RequestNotFound(RequestError):
    """No usage record, or no running request, has that id."""

    status = 404
    code = "request_not_found"


class ResponseNotFound(RequestError):
    """No response of that id is kept for this caller, or not any longer."""

    status = 404
    code = "response_not_found"

    def __init__(self, response_id: str) -> None:
        super().__init__(f"there is no response {response_id!r}, or it is kept no longer")


class RequestIdInUse(RequestError):
    """The client's x-request-id names an invocation that the ledger already holds."""

    status = 409
    code = "request_id_in_use"

    def __init__(self, request_id: str) -> None:
        super().__init__(f"an invocation with the request id {request_id!r} exists already; send a fresh x-request-id")


class IdempotencyConflict(RequestError):
    """The request was sent before, and the answer that it had cannot be given to this one."""

    status = 409
    code = "idempotency_conflict"


class RequestCancelled(RequestError):
    """The generation was ended on request before it was complete; what was generated is metered."""

    status = 499
    code = "request_cancelled"

    def __init__(self) -> None:
        super().__init__("the request was cancelled; what was generated until then is metered")


class BodyTooLarge(RequestError):
    """The request body is larger than the host accepts."""

    status = 413
    code = "body_too_large"

    def __init__(self, max_bytes: int) -> None:
        super().__init__(f"the request body is larger than {max_bytes:,} bytes")


class SwapFailed(RequestError):
    """Another artifact could not take over; the function goes on as it was."""

    status = 409
    code = "swap_failed"


class InvalidKey(RequestError):
    """There is no API key in the request, or none that is valid."""

    status = 401
    code = "invalid_api_key"

    def __init__(self) -> None:
        super().__init__("a valid API key is needed, as in: Authorization: Bearer pl_…")


class NotPermitted(RequestError):
    """The key is valid, but not for this."""

    status = 403
    code = "permission_denied"


class LimitExceeded(RequestError):
    """A limit of the request's key is reached, until ``retry_after_s`` from now. ``headers`` say how the key stands."""

    status = 429
    code = "rate_limit_exceeded"

    def __init__(self, message: str, type: str, retry_after_s: float, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.type = type
        self.code = "insufficient_quota" if type == "insufficient_quota" else "rate_limit_exceeded"
        self.retry_after_s = retry_after_s
        self.headers = headers or {}


class CapacityError(PilotlightError):
    """There is no room now; the same request may succeed after ``retry_after_s`` seconds."""

    status = 503
    code = "overloaded"
    retryable = True

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFull(CapacityError):
    """The function's queue holds as many requests, or prompt tokens, as it may."""

    def __init__(self, limit: int, retry_after_s: float = 1.0, of: str = "requests") -> None:
        super().__init__(f"{limit} {of} are waiting already, which is the limit", retry_after_s)


class StartFailed(CapacityError):
    """No replica of the function could be started; the message says why."""

    code = "start_failed"

    def __init__(self, cause: str, retry_after_s: float = 1.0) -> None:
        super().__init__(f"the function cannot be started at present: {cause}", retry_after_s)


class DeadlineExceeded(CapacityError):
    """The request ran out of time before its first token; it costs nothing."""

    status = 504
    code = "deadline_exceeded"

    def __init__(self) -> None:
        super().__init__("the request ran out of time before its first token")


class LedgerUnavailable(CapacityError):
    """The usage ledger cannot be written, and nothing is served unmetered."""

    code = "ledger_unavailable"


class ResponseStoreUnavailable(CapacityError):
    """The responses that were kept cannot be read or written."""

    code = "response_store_unavailable"

    def __init__(self) -> None:
        super().__init__("the responses that were kept cannot be reached")


class EvidenceUnavailable(CapacityError):
    """The hardware that attests, or what stands before it, gave no evidence."""

    code = "evidence_unavailable"


class OutOfMemory(CapacityError):
    """A device had no memory left for a run, though nothing ran beside it."""

    code = "out_of_memory"

    def __init__(self, retry_after_s: float = 5.0) -> None:
        super().__init__("there is not enough memory on the device at present", retry_after_s)


class Draining(CapacityError):
    """The server is shutting down and takes no new requests."""

    code = "shutting_down"

    def __init__(self) -> None:
        super().__init__("the server is shutting down")


class EngineError(PilotlightError):
    """The model run failed; its cause is chained."""

    code = "engine_error"
