"""``POST /v1/messages`` and its ``count_tokens``: the Anthropic API, to and from the one request and answer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from pilotlight.api.anthropic_errors import error_event
from pilotlight.api.anthropic_types import (
    BlockDelta,
    BlockStart,
    BlockStop,
    CountHeaders,
    CountTokensBody,
    Event,
    Headers,
    MessageDelta,
    MessageObject,
    MessagesBody,
    MessageStart,
    MessageStop,
    MessageUsage,
    Ping,
    StopDelta,
    StopReason,
    Text,
    TextBlock,
    TextBlockDelta,
    TokenCount,
    ToolResultBlock,
    ToolUseBlock,
    Turn,
)
from pilotlight.api.auth import caller_of
from pilotlight.api.endpoint import GENERATION, Endpoint
from pilotlight.api.intake import Intake, completed, json_response, request_id_of
from pilotlight.api.objects import metered
from pilotlight.api.sse import event_frame
from pilotlight.api.wire import parse, parse_text
from pilotlight.errors import InvalidRequest, PilotlightError
from pilotlight.function import Invocation
from pilotlight.function import Request as FunctionRequest
from pilotlight.metering.record import UsageRecord
from pilotlight.request import FinishReason

PING = event_frame(Ping())


class Messages:
    """The endpoints of the Anthropic API."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake

    def endpoints(self) -> list[Endpoint]:
        return [
            Endpoint(
                "POST",
                "/v1/messages",
                self.create,
                "Answer a conversation, as the Anthropic API does",
                answer=MessageObject,
                body=MessagesBody,
                event=Event,
                headers=Headers,
                refusals=GENERATION,
            ),
            Endpoint(
                "POST",
                "/v1/messages/count_tokens",
                self.count_tokens,
                "Count the tokens of a conversation",
                answer=TokenCount,
                body=CountTokensBody,
                headers=CountHeaders,
                refusals=GENERATION,
            ),
        ]

    async def create(self, request: Request) -> Response:
        parse_text(request.headers, Headers)
        body = parse(await self._intake.read_body(request), MessagesBody)
        return await self._intake.answer(
            request,
            body,
            messages_request(body, request_id_of(request)),
            partial(stream, body=body),
            partial(whole, body=body),
            PING,
        )

    async def count_tokens(self, request: Request) -> Response:
        parse_text(request.headers, CountHeaders)
        body = parse(await self._intake.read_body(request), CountTokensBody)
        asked = counted_request(body, request_id_of(request))
        num_tokens = await self._intake.function(body.model, caller_of(request)).count_prompt_tokens(asked)
        return json_response(TokenCount(num_tokens))


def messages_request(body: MessagesBody, request_id: str) -> FunctionRequest:
    """Return the request that a body asks for.

    Raises:
        InvalidRequest: a block stands where it makes no sense.
    """
    messages, prefill = _conversation(body.system, body.messages)
    return FunctionRequest(
        id=request_id,
        messages=messages,
        prefill=prefill,
        max_new_tokens=body.max_tokens,
        stop_strings=tuple(body.stop_sequences or ()),
        ignore_eos=body.ignore_eos,
        sampling=body.sampling,
    )


def counted_request(body: CountTokensBody, request_id: str) -> FunctionRequest:
    """Return a request with the prompt that a body describes.

    Raises:
        InvalidRequest: as ``messages_request``.
    """
    messages, prefill = _conversation(body.system, body.messages)
    return FunctionRequest(id=request_id, messages=messages, prefill=prefill)


async def stream(invocation: Invocation, body: MessagesBody) -> AsyncIterator[bytes]:
    """Yield SSE frames. The stop reason and the usage come when the usage record is durable.

    An error after the first frame becomes an error event, which ends the stream.
    """
    usage = MessageUsage(invocation.num_prompt_tokens, 0, 0, 0)
    yield event_frame(MessageStart(MessageObject(_message_id(invocation), body.model, [], usage)))
    yield PING
    blocks = _Blocks()
    try:
        async for delta in invocation:
            for event in blocks.push(delta.text):
                yield event_frame(event)
        record = completed(invocation)
    except PilotlightError as error:
        yield event_frame(error_event(error, invocation.request.id))
        return
    for event in blocks.end():
        yield event_frame(event)
    reason, sequence = _stop(record, body)
    yield event_frame(MessageDelta(StopDelta(reason, sequence), _usage(record)))
    yield event_frame(MessageStop())


async def whole(invocation: Invocation, body: MessagesBody) -> MessageObject:
    """Return the message, once its usage record is durable.

    Raises:
        EngineError: the model run failed.
        RequestCancelled: the invocation was cancelled.
        LedgerUnavailable: the usage record could not be written.
    """
    text = "".join([delta.text async for delta in invocation])
    record = completed(invocation)
    reason, sequence = _stop(record, body)
    content: list[TextBlock | ToolUseBlock] = [TextBlock(text)] if text else []
    return MessageObject(_message_id(invocation), body.model, content, _usage(record), reason, sequence)


class _Blocks:
    """The content blocks of a streamed message, one after the other; a block begins with its first character."""

    def __init__(self) -> None:
        self._num_ended = 0
        self._is_open = False

    def push(self, text: str) -> list[Event]:
        if not text:
            return []
        piece = BlockDelta(self._num_ended, TextBlockDelta(text))
        if self._is_open:
            return [piece]
        self._is_open = True
        return [BlockStart(self._num_ended, TextBlock("")), piece]

    def end(self) -> list[Event]:
        if not self._is_open:
            return []
        self._is_open = False
        self._num_ended += 1
        return [BlockStop(self._num_ended - 1)]


def _conversation(system: Text | None, messages: list[Turn]) -> tuple[list[dict[str, Any]], str]:
    """Return the messages as chat templates know them, and how the answer is to begin."""
    *before, last = messages
    prefill = ""
    if last.role == "assistant":
        prefill = _only_text(last, f"messages[{len(before)}].content")
    else:
        before.append(last)
    rendered = [{"role": "system", "content": _text(system)}] if system else []
    for index, message in enumerate(before):
        rendered += _template_messages(message, f"messages[{index}].content")
    return rendered, prefill


def _template_messages(message: Turn, param: str) -> list[dict[str, Any]]:
    """Return one message of the API as one or more of a template: tool results are messages of their own there."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    expected = {"assistant": ToolUseBlock, "user": ToolResultBlock}.get(message.role)
    for index, block in enumerate(message.content):
        if isinstance(block, ToolUseBlock | ToolResultBlock) and not isinstance(block, expected or ()):
            kind = block.__struct_config__.tag
            raise InvalidRequest(
                f"{param}[{index}]", f"{param}[{index}]: {kind} is no block of {message.role} messages"
            )
    results = [_tool_message(block) for block in message.content if isinstance(block, ToolResultBlock)]
    calls = [_tool_call(block) for block in message.content if isinstance(block, ToolUseBlock)]
    text = _text([block for block in message.content if isinstance(block, TextBlock)])
    if calls:
        return [{"role": "assistant", "content": text, "tool_calls": calls}]
    return results + ([{"role": message.role, "content": text}] if text or not results else [])


def _tool_message(block: ToolResultBlock) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": _text(block.content or "")}


def _tool_call(block: ToolUseBlock) -> dict[str, Any]:
    arguments = msgspec.json.encode(block.input).decode()
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": arguments}}


def _only_text(message: Turn, param: str) -> str:
    if isinstance(message.content, str):
        return message.content
    texts = []
    for index, block in enumerate(message.content):
        if not isinstance(block, TextBlock):
            place = f"{param}[{index}]"
            raise InvalidRequest(place, f"{place}: what the answer is to begin with can only be text")
        texts.append(block)
    return _text(texts)


def _text(text: Text | list[TextBlock]) -> str:
    return text if isinstance(text, str) else "".join(block.text for block in text)


def _message_id(invocation: Invocation) -> str:
    return f"msg_{invocation.request.id}"


def _usage(record: UsageRecord) -> MessageUsage:
    num_new_tokens = record.prompt_tokens - record.cached_tokens
    return MessageUsage(num_new_tokens, record.completion_tokens, record.cached_tokens, 0, metered(record))


def _stop(record: UsageRecord, body: MessagesBody) -> tuple[StopReason, str | None]:
    """Return why a message ended, as clients know it: a deadline is one more limit on the length."""
    if record.finish_reason is FinishReason.STOP:
        return ("stop_sequence", record.stop_detail) if record.stop_detail is not None else ("end_turn", None)
    if record.finish_reason is FinishReason.LENGTH and record.completion_tokens < body.max_tokens:
        return "model_context_window_exceeded", None
    return "max_tokens", None
