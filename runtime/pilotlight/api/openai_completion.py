"""An invocation's answer on the OpenAI wire, streamed or whole. Chat and text differ in a ``Shape`` only."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from pilotlight.api.openai_body import GenerationBody
from pilotlight.api.sse import DONE, error_frame, frame
from pilotlight.errors import PilotlightError, RequestCancelled
from pilotlight.function import Invocation
from pilotlight.metering.record import UsageRecord
from pilotlight.request import FinishReason

Choice = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Shape:
    """How an endpoint names its objects and wraps its text."""

    object: str
    chunk_object: str
    opening: Choice | None
    piece: Callable[[str], Choice]
    closing: Choice
    whole: Callable[[str], Choice]


async def stream(invocation: Invocation, body: GenerationBody, shape: Shape) -> AsyncIterator[bytes]:
    """Yield SSE frames. The finish reason and the usage come when the usage record is durable.

    An error after the first frame becomes one error frame, and the stream ends without its terminator.
    """
    head = _head(invocation, body, shape.chunk_object)

    def chunk(choice: Choice, finish_reason: str | None = None) -> bytes:
        return frame({**head, "choices": [{"index": 0, **choice, "finish_reason": finish_reason}]})

    if shape.opening is not None:
        yield chunk(shape.opening)
    try:
        async for delta in invocation:
            extension = {"token_ids": delta.token_ids} if body.return_token_ids else {}
            if delta.text or extension:
                yield chunk({**shape.piece(delta.text), **extension})
        record = _completed(invocation)
    except PilotlightError as error:
        yield error_frame(error)
        return
    yield chunk(shape.closing, _finish_reason(record))
    if body.include_usage:
        yield frame({**head, "choices": [], "usage": usage_object(record)})
    yield DONE


async def whole(invocation: Invocation, body: GenerationBody, shape: Shape) -> dict[str, Any]:
    """Return the completion object, once the usage record is durable.

    Raises:
        EngineError: the model run failed.
        RequestCancelled: the invocation was cancelled.
        LedgerUnavailable: the usage record could not be written.
    """
    deltas = [delta async for delta in invocation]
    record = _completed(invocation)
    text = "".join(delta.text for delta in deltas)
    choice = {"index": 0, **shape.whole(text), "finish_reason": _finish_reason(record)}
    if body.return_token_ids:
        choice["token_ids"] = [token_id for delta in deltas for token_id in delta.token_ids]
    return {**_head(invocation, body, shape.object), "choices": [choice], "usage": usage_object(record)}


def usage_object(record: UsageRecord) -> dict[str, Any]:
    """Return the ``usage`` of a completion; what OpenAI has no word for travels under ``pilotlight``."""
    return {
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.completion_tokens,
        "total_tokens": record.prompt_tokens + record.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": record.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": 0},
        "pilotlight": {
            "request_id": record.request_id,
            "ttft_ms": record.ttft_ms,
            "cold_start_ms": record.cold_start_ms,
            "total_ms": record.total_ms,
            "cost_micros": record.cost_micros,
            "currency": record.currency,
        },
    }


def _head(invocation: Invocation, body: GenerationBody, name: str) -> dict[str, Any]:
    return {
        "id": invocation.request.id,
        "object": name,
        "created": int(time.time()),
        "model": body.model,
        "system_fingerprint": invocation.function.artifact.digest[7:19],
    }


def _finish_reason(record: UsageRecord) -> FinishReason:
    """Return the reason as clients know it: a deadline is one more limit on the length."""
    return FinishReason.LENGTH if record.finish_reason is FinishReason.DEADLINE else record.finish_reason


def _completed(invocation: Invocation) -> UsageRecord:
    assert invocation.record is not None
    if invocation.record.finish_reason is FinishReason.CANCELLED:
        raise RequestCancelled
    return invocation.record
