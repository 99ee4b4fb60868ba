"""An invocation's answer on the OpenAI wire, streamed or whole. Chat and text differ in a ``Shape`` only."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any, Protocol, TypeVar

import msgspec
from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from pilotlight.answer import Choice, Delta
from pilotlight.api.intake import completed
from pilotlight.api.objects import metered
from pilotlight.api.openai_body import GenerationBody
from pilotlight.api.openai_types import CompletionTokensDetails, CompletionUsage, FinishReason, PromptTokensDetails
from pilotlight.api.sse import DONE, error_frame, frame
from pilotlight.errors import PilotlightError
from pilotlight.function import Invocation
from pilotlight.metering.record import UsageRecord
from pilotlight.request import FinishReason as Finish

Part = TypeVar("Part", bound=msgspec.Struct)
Whole = TypeVar("Whole", bound=msgspec.Struct)
Head = dict[str, Any]
"""The fields that all objects of an answer begin with."""

_encode = msgspec.json.Encoder().encode


class Shape(Protocol[Part, Whole]):
    """Makes an endpoint's wire types: ``Part`` is a choice in a chunk, ``Whole`` one in a completion.

    One is made for each answer, since it may count.
    """

    def opening(self, choice: int) -> Part | None:
        """Return what a choice begins with, before its first token."""

    def piece(self, delta: Delta) -> Part | None:
        """Return what a delta adds to a choice; None when that is nothing to show."""

    def closing(self, choice: int, reason: FinishReason | None) -> Part:
        """Return a part that adds nothing to a choice, or only the reason of its end."""

    def chunk(self, head: Head, choices: list[Part], usage: CompletionUsage | UnsetType = UNSET) -> msgspec.Struct:
        """Return one frame's object."""

    def choice(self, choice: Choice, reason: FinishReason) -> Whole:
        """Return a whole choice."""

    def completion(self, head: Head, choices: list[Whole], usage: CompletionUsage) -> msgspec.Struct:
        """Return the answer's one object, where it is not streamed."""


async def stream(invocation: Invocation, body: GenerationBody, shape: Shape[Part, Whole]) -> AsyncIterator[bytes]:
    """Yield SSE frames. The finish reasons and the usage come when the usage record is durable.

    An error after the first frame becomes one error frame, and the stream ends without its terminator.
    """
    head = _head(invocation, body)
    begun = _encode(shape.chunk(head, []))[: -len("]}")]  # the same in every frame, so encoded once
    choices = range(len(invocation.streams))
    called = {of.index for of in invocation.streams if of.begun_calls}

    def part_frame(part: Part) -> bytes:
        return b"data: %b%b]}\n\n" % (begun, _encode(part))

    for choice in choices:
        if (opening := shape.opening(choice)) is not None:
            yield part_frame(opening)
    try:
        async for delta in invocation:
            if delta.tool_calls:
                called.add(delta.choice)
            piece = shape.piece(delta)
            if body.return_token_ids:
                piece = replace(piece or shape.closing(delta.choice, None), token_ids=delta.token_ids)
            if piece is not None:
                yield part_frame(piece)
        record = completed(invocation)
    except PilotlightError as error:
        yield error_frame(error)
        return
    usage = completion_usage(record, invocation.resume_token)
    # A client that did not ask for the usage learns of the token, too, and needs no chunk that it does not expect.
    with_token = usage if invocation.resume_token is not None and not body.include_usage else UNSET
    for choice in choices:
        reason = finish_reason(invocation.finish(choice), choice in called)
        yield frame(shape.chunk(head, [shape.closing(choice, reason)], with_token))
    if body.include_usage:
        yield frame(shape.chunk(head, [], usage))
    yield DONE


async def whole(invocation: Invocation, body: GenerationBody, shape: Shape[Part, Whole]) -> msgspec.Struct:
    """Return the completion object, once the usage record is durable.

    Raises:
        EngineError: the model run failed.
        RequestCancelled: the invocation was cancelled.
        LedgerUnavailable: the usage record could not be written.
    """
    answer = await invocation.choices()
    record = completed(invocation)
    choices = [shape.choice(each, finish_reason(each.finish, bool(each.tool_calls))) for each in answer]
    if body.return_token_ids:
        choices = [replace(choice, token_ids=each.token_ids) for choice, each in zip(choices, answer, strict=True)]
    return shape.completion(_head(invocation, body), choices, completion_usage(record, invocation.resume_token))


def completion_usage(record: UsageRecord, resume_token: str | None) -> CompletionUsage:
    """Return the ``usage`` of a completion; what OpenAI has no word for travels under ``pilotlight``."""
    return CompletionUsage(
        prompt_tokens=record.prompt_tokens,
        completion_tokens=record.completion_tokens,
        total_tokens=record.prompt_tokens + record.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(record.cached_tokens),
        completion_tokens_details=CompletionTokensDetails(record.reasoning_tokens),
        pilotlight=metered(record, resume_token),
    )


def finish_reason(finish: Finish, calls_tools: bool) -> FinishReason:
    """Return a choice's reason as clients know it: a deadline is one more limit on the length."""
    if finish is not Finish.STOP:
        return "length"
    return "tool_calls" if calls_tools else "stop"


def _head(invocation: Invocation, body: GenerationBody) -> Head:
    return {
        "id": invocation.request.id,
        "created": int(time.time()),
        "model": body.model,
        "system_fingerprint": invocation.function.artifact.digest[7:19],
    }
