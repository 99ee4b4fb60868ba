"""The small objects that endpoints answer with, as wire types."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from pilotlight.function import Function
from pilotlight.metering.record import UsageRecord

REQUEST_ID = r"^[A-Za-z0-9._:-]{1,128}$"


class ModelObject(msgspec.Struct, frozen=True):
    """A function, as clients of the OpenAI API list models; what follows ``owned_by`` is ours."""

    id: str
    created: int
    max_context_tokens: int
    artifact: str
    precision: str
    object: Literal["model"] = "model"
    owned_by: Literal["pilotlight"] = "pilotlight"


class ModelList(msgspec.Struct, frozen=True):
    data: list[ModelObject]
    object: Literal["list"] = "list"


class CancelledRequest(msgspec.Struct, frozen=True):
    id: str
    object: Literal["request"] = "request"
    status: Literal["cancelling"] = "cancelling"


class Alive(msgspec.Struct, frozen=True):
    status: Literal["ok"] = "ok"


class Ready(msgspec.Struct, frozen=True):
    functions: list[str]
    status: Literal["ok"] = "ok"


def model_object(function: Function) -> ModelObject:
    """Return what clients may know of a function."""
    return ModelObject(
        id=function.name,
        created=int(function.created_at_utc.timestamp()),
        max_context_tokens=function.max_context_tokens,
        artifact=function.artifact.digest,
        precision=function.artifact.manifest.precision,
    )


class Metered(msgspec.Struct, frozen=True):
    """What a usage record says and no vendor's ``usage`` has a word for; it travels there under ``pilotlight``.

    With a ``resume_token``, the answer was cut off and can be continued. ``resumed_tokens`` were paid for before.
    """

    request_id: str
    ttft_ms: float | None
    cold_start_ms: float
    total_ms: float
    cost_micros: int
    currency: str
    resumed_tokens: int = 0
    resume_token: str | None = None


def metered(record: UsageRecord, resume_token: str | None = None) -> Metered:
    """Return the extension of a finished invocation's usage."""
    return Metered(
        request_id=record.request_id,
        ttft_ms=record.ttft_ms,
        cold_start_ms=record.cold_start_ms,
        total_ms=record.total_ms,
        cost_micros=record.cost_micros,
        currency=record.currency,
        resumed_tokens=record.resumed_tokens,
        resume_token=resume_token,
    )


class RequestHeaders(msgspec.Struct, frozen=True, rename="kebab"):
    """What every request may carry."""

    x_request_id: Annotated[str, Meta(pattern=REQUEST_ID)] | None = None


class GenerationHeaders(msgspec.Struct, frozen=True, rename="kebab"):
    """What a request that generates may carry: under one key there is one answer, and one bill."""

    idempotency_key: Annotated[str, Meta(pattern=r"^[\x21-\x7e]{1,255}$")] | None = None
    last_event_id: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._:-]{1,128}:[0-9]{1,9}$")] | None = None


class ErrorObject(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(msgspec.Struct, frozen=True):
    """An error, as clients of the OpenAI API read it."""

    error: ErrorObject
