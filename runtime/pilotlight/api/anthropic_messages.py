"""``POST /v1/messages`` and its ``count_tokens``: the Anthropic API, to and from the one request and answer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from pilotlight.answer import Delta
from pilotlight.api.anthropic_errors import error_event
from pilotlight.api.anthropic_types import (
    AnyChoice,
    AutoChoice,
    BlockDelta,
    BlockStart,
    BlockStop,
    CountHeaders,
    CountTokensBody,
    Event,
    Headers,
    InputJsonDelta,
    MessageDelta,
    MessageObject,
    MessagesBody,
    MessageStart,
    MessageStop,
    MessageUsage,
    NoChoice,
    OutputConfig,
    Ping,
    StopDelta,
    StopReason,
    Text,
    TextBlock,
    TextBlockDelta,
    TokenCount,
    ToolNamed,
    ToolResultBlock,
    ToolUseBlock,
    Turn,
)
from pilotlight.api.auth import caller_of
from pilotlight.api.endpoint import GENERATION, Endpoint
from pilotlight.api.intake import Intake, completed, json_response, request_id_of
from pilotlight.api.objects import metered
from pilotlight.api.openai_tools import checked_use
from pilotlight.api.sse import event_frame
from pilotlight.api.wire import parse, parse_text
from pilotlight.errors import InvalidRequest, PilotlightError
from pilotlight.function import Invocation
from pilotlight.function import Request as FunctionRequest
from pilotlight.metering.record import UsageRecord
from pilotlight.request import FinishReason
from pilotlight.text.grammar import json_schema_grammar
from pilotlight.text.tool_syntax import Tool, ToolUse

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
        tools=_tool_use(body),
        grammar=_grammar(body.output_config),
        grammar_param="output_config.format",
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
    return FunctionRequest(id=request_id, messages=messages, prefill=prefill, tools=_tool_use(body))


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
            for event in blocks.push(delta):
                yield event_frame(event)
        record = completed(invocation)
    except PilotlightError as error:
        yield event_frame(error_event(error, invocation.request.id))
        return
    for event in blocks.end():
        yield event_frame(event)
    reason, sequence = _stop(record, body, invocation, calls_tools=blocks.num_calls > 0)
    yield event_frame(MessageDelta(StopDelta(reason, sequence), _usage(record, invocation)))
    yield event_frame(MessageStop())


async def whole(invocation: Invocation, body: MessagesBody) -> MessageObject:
    """Return the message, once its usage record is durable.

    Raises:
        EngineError: the model run failed.
        RequestCancelled: the invocation was cancelled.
        LedgerUnavailable: the usage record could not be written.
    """
    (choice,) = await invocation.choices()
    record = completed(invocation)
    reason, sequence = _stop(record, body, invocation, calls_tools=bool(choice.tool_calls))
    content: list[TextBlock | ToolUseBlock] = [TextBlock(choice.text)] if choice.text else []
    content += [ToolUseBlock(call.id, call.name, _input(call.arguments)) for call in choice.tool_calls]
    return MessageObject(_message_id(invocation), body.model, content, _usage(record, invocation), reason, sequence)


class _Blocks:
    """The content blocks of a streamed message, one after the other; a block begins with its first character."""

    def __init__(self) -> None:
        self.num_calls = 0
        self._num_ended = 0
        self._open: TextBlock | ToolUseBlock | None = None

    def push(self, delta: Delta) -> list[Event]:
        events: list[Event] = []
        if delta.text:
            if not isinstance(self._open, TextBlock):
                events += self._begin(TextBlock(""))
            events.append(BlockDelta(self._num_ended, TextBlockDelta(delta.text)))
        for part in delta.tool_calls:
            if part.name is not None:
                self.num_calls += 1
                events += self._begin(ToolUseBlock(part.id or "", part.name, {}))
            if part.arguments:
                events.append(BlockDelta(self._num_ended, InputJsonDelta(part.arguments)))
        return events

    def end(self) -> list[Event]:
        if self._open is None:
            return []
        self._open = None
        self._num_ended += 1
        return [BlockStop(self._num_ended - 1)]

    def _begin(self, block: TextBlock | ToolUseBlock) -> list[Event]:
        events = self.end()
        self._open = block
        return [*events, BlockStart(self._num_ended, block)]


def _tool_use(body: MessagesBody | CountTokensBody) -> ToolUse | None:
    tools = [
        Tool(tool.name, tool.description, tool.input_schema, f"tools[{index}]")
        for index, tool in enumerate(body.tools or ())
    ]
    match body.tool_choice:
        case None:
            return checked_use(tools, "auto", None, parallel=True)
        case NoChoice():
            return checked_use(tools, "none", None, parallel=True)
        case ToolNamed(name=name):
            return checked_use(tools, "required", name, parallel=False)
        case AutoChoice(disable_parallel_tool_use=alone):
            return checked_use(tools, "auto", None, parallel=not alone)
        case AnyChoice(disable_parallel_tool_use=alone):
            return checked_use(tools, "required", None, parallel=not alone)


def _grammar(config: OutputConfig | None) -> str | None:
    if config is None or config.format is None:
        return None
    return json_schema_grammar(config.format.schema, "output_config.format.schema")


def _input(arguments: str) -> dict[str, Any]:
    """Return a call's arguments; those of a call that was cut off are no object, and then there are none."""
    try:
        return msgspec.json.decode(arguments, type=dict[str, Any])
    except msgspec.DecodeError:
        return {}


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
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": block.input}}


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


def _usage(record: UsageRecord, invocation: Invocation) -> MessageUsage:
    num_new_tokens = record.prompt_tokens - record.cached_tokens
    extension = metered(record, invocation.resume_token)
    return MessageUsage(num_new_tokens, record.completion_tokens, record.cached_tokens, 0, extension)


def _stop(
    record: UsageRecord, body: MessagesBody, invocation: Invocation, *, calls_tools: bool
) -> tuple[StopReason, str | None]:
    """Return why a message ended, as clients know it: a deadline is one more limit on the length."""
    if record.finish_reason is FinishReason.STOP:
        if calls_tools and record.stop_detail is None:
            return "tool_use", None
        return ("stop_sequence", record.stop_detail) if record.stop_detail is not None else ("end_turn", None)
    allowed = min(body.max_tokens, invocation.function.max_answer_tokens or body.max_tokens)
    if record.finish_reason is FinishReason.LENGTH and len(invocation.streams[0].token_ids) < allowed:
        return "model_context_window_exceeded", None
    return "max_tokens", None
