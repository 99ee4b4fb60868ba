"""An invocation's answer on the OpenAI wire, streamed or whole. Chat and text differ in a ``Shape`` only."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any, ClassVar, Protocol

import msgspec

from pilotlight.answer import Choice, Delta
from pilotlight.api.intake import completed
from pilotlight.api.objects import metered
from pilotlight.api.openai_body import GenerationBody
from pilotlight.api.sse import DONE, error_frame, frame
from pilotlight.errors import PilotlightError
from pilotlight.function import Invocation
from pilotlight.metering.record import UsageRecord
from pilotlight.request import FinishReason

Fields = dict[str, Any]
_encode = msgspec.json.Encoder().encode


class Shape(Protocol):
    """How an endpoint names its objects and wraps its choices. One is made for each answer, since it may count."""

    object: ClassVar[str]
    chunk_object: ClassVar[str]
    opening: ClassVar[Fields | None]
    closing: ClassVar[Fields]

    def piece(self, delta: Delta) -> Fields | None:
        """Return what a delta adds to a choice; None when that is nothing to show."""

    def whole(self, choice: Choice) -> Fields:
        """Return a whole choice, without its index and its finish reason."""


async def stream(invocation: Invocation, body: GenerationBody, shape: Shape) -> AsyncIterator[bytes]:
    """Yield SSE frames. The finish reasons and the usage come when the usage record is durable.

    An error after the first frame becomes one error frame, and the stream ends without its terminator.
    """
    head = _head(invocation, body, shape.chunk_object)
    opening = _encode(head)[:-1]  # the same in every frame, so encoded once
    choices = range(len(invocation.streams))
    called = {of.index for of in invocation.streams if of.begun_calls}

    def chunk(choice: int, fields: Fields) -> bytes:
        delta = _encode(fields)[1:-1]
        return b'data: %b,"choices":[{"index":%d,%b,"finish_reason":null}]}\n\n' % (opening, choice, delta)

    if shape.opening is not None:
        for choice in choices:
            yield chunk(choice, shape.opening)
    try:
        async for delta in invocation:
            if delta.tool_calls:
                called.add(delta.choice)
            piece = shape.piece(delta)
            if body.return_token_ids:
                piece = {**(piece or shape.closing), "token_ids": delta.token_ids}
            if piece is not None:
                yield chunk(delta.choice, piece)
        record = completed(invocation)
    except PilotlightError as error:
        yield error_frame(error)
        return
    usage = usage_object(record, invocation.resume_token)
    # A client that did not ask for the usage learns of the token, too, and needs no chunk that it does not expect.
    with_token = {"usage": usage} if invocation.resume_token is not None and not body.include_usage else {}
    for choice in choices:
        reason = finish_reason(invocation.finish(choice), choice in called)
        closing = {"index": choice, **shape.closing, "finish_reason": reason}
        yield frame({**head, "choices": [closing], **with_token})
    if body.include_usage:
        yield frame({**head, "choices": [], "usage": usage})
    yield DONE


async def whole(invocation: Invocation, body: GenerationBody, shape: Shape) -> Fields:
    """Return the completion object, once the usage record is durable.

    Raises:
        EngineError: the model run failed.
        RequestCancelled: the invocation was cancelled.
        LedgerUnavailable: the usage record could not be written.
    """
    choices = await invocation.choices()
    record = completed(invocation)
    objects = [_choice_object(choice, body, shape) for choice in choices]
    usage = usage_object(record, invocation.resume_token)
    return {**_head(invocation, body, shape.object), "choices": objects, "usage": usage}


def usage_object(record: UsageRecord, resume_token: str | None) -> Fields:
    """Return the ``usage`` of a completion; what OpenAI has no word for travels under ``pilotlight``."""
    return {
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.completion_tokens,
        "total_tokens": record.prompt_tokens + record.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": record.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": 0},
        "pilotlight": metered(record, resume_token),
    }


def finish_reason(finish: FinishReason, calls_tools: bool) -> str:
    """Return a choice's reason as clients know it: a deadline is one more limit on the length."""
    if finish is FinishReason.DEADLINE:
        return FinishReason.LENGTH
    return "tool_calls" if calls_tools and finish is FinishReason.STOP else finish


def _choice_object(choice: Choice, body: GenerationBody, shape: Shape) -> Fields:
    reason = finish_reason(choice.finish, bool(choice.tool_calls))
    extension = {"token_ids": choice.token_ids} if body.return_token_ids else {}
    return {"index": choice.index, **shape.whole(choice), "finish_reason": reason, **extension}


def _head(invocation: Invocation, body: GenerationBody, name: str) -> Fields:
    return {
        "id": invocation.request.id,
        "object": name,
        "created": int(time.time()),
        "model": body.model,
        "system_fingerprint": invocation.function.artifact.digest[7:19],
    }
