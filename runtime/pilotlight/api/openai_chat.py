"""``POST /v1/chat/completions``: body in, chunks or one completion out."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from pilotlight.answer import Choice, Delta
from pilotlight.api.openai_body import GenerationBody
from pilotlight.api.openai_completion import Head
from pilotlight.api.openai_format import format_grammar
from pilotlight.api.openai_logprobs import chat_logprobs
from pilotlight.api.openai_tools import ToolChoice, Tools, template_calls, tool_use
from pilotlight.api.openai_types import (
    CalledFunction,
    CalledFunctionChunk,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    CompletionUsage,
    FinishReason,
    ToolCallChunk,
    ToolCallObject,
)
from pilotlight.errors import InvalidRequest
from pilotlight.function import Request
from pilotlight.text.tool_calls import ToolCallDelta


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """One message. Fields that clients send back from an earlier answer and that say nothing here are ignored."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class ChatBody(GenerationBody, frozen=True, kw_only=True):
    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    @property
    def num_top_logprobs(self) -> int | None:
        """How many of the likeliest tokens come with each token; None where no log probability was asked for."""
        return (self.top_logprobs or 0) if self.logprobs else None


def chat_request(body: ChatBody, request_id: str) -> Request:
    """Return the request that a body asks for.

    Raises:
        InvalidRequest: a message has no content, or content other than text; or parameters contradict each other.
    """
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("top_logprobs", "top_logprobs: requires logprobs to be true")
    return Request(
        id=request_id,
        num_choices=body.n or 1,
        num_top_logprobs=body.num_top_logprobs,
        tools=tool_use(body.tools, body.tool_choice, body.parallel_tool_calls),
        messages=[_template_message(message, f"messages[{i}]") for i, message in enumerate(body.messages)],
        max_new_tokens=body.max_completion_tokens or body.max_tokens,
        stop_strings=body.stop_strings,
        ignore_eos=body.ignore_eos,
        sampling=body.sampling,
        grammar=format_grammar(body.response_format),
        cache_key=body.prompt_cache_key,
    )


def _template_message(message: Message, param: str) -> dict[str, Any]:
    """Return a message as chat templates know it: text content, and no role that most have never heard of."""
    role = "system" if message.role == "developer" else message.role
    fields: dict[str, Any] = {"role": role, "content": _text(message, f"{param}.content")}
    for name in ("name", "tool_call_id"):
        if (value := getattr(message, name)) is not None:
            fields[name] = value
    if message.tool_calls:
        fields["tool_calls"] = template_calls(message.tool_calls, f"{param}.tool_calls")
    return fields


def _text(message: Message, param: str) -> str:
    if isinstance(message.content, str):
        return message.content
    if message.content is None:
        if message.role == "assistant" and message.tool_calls:
            return ""
        raise InvalidRequest(param, f"{param}: is required")
    return "".join(_part_text(part, f"{param}[{i}]") for i, part in enumerate(message.content))


def _part_text(part: dict[str, Any], param: str) -> str:
    if part.get("type") != "text":
        raise InvalidRequest(param, f"{param}: only text parts are supported, not {part.get('type')!r}")
    if not isinstance(part.get("text"), str):
        raise InvalidRequest(f"{param}.text", f"{param}.text: expected str")
    return str(part["text"])


class ChatShape:
    """The wire's ``chat.completion``."""

    def opening(self, choice: int) -> ChatChunkChoice | None:
        return ChatChunkChoice(index=choice, delta=ChatDelta(role="assistant", content=""), finish_reason=None)

    def piece(self, delta: Delta) -> ChatChunkChoice | None:
        if not (delta.text or delta.tool_calls or delta.logprobs):
            return None
        text = delta.text if delta.text or not delta.tool_calls else UNSET
        calls = [_call_chunk(call) for call in delta.tool_calls] if delta.tool_calls else UNSET
        logprobs = ChatLogprobs(chat_logprobs(delta.logprobs)) if delta.logprobs else UNSET
        added = ChatDelta(content=text, tool_calls=calls)
        return ChatChunkChoice(index=delta.choice, delta=added, logprobs=logprobs, finish_reason=None)

    def closing(self, choice: int, reason: FinishReason | None) -> ChatChunkChoice:
        return ChatChunkChoice(index=choice, delta=ChatDelta(), finish_reason=reason)

    def chunk(
        self, head: Head, choices: list[ChatChunkChoice], usage: CompletionUsage | UnsetType = UNSET
    ) -> ChatChunk:
        return ChatChunk(**head, object="chat.completion.chunk", choices=choices, usage=usage)

    def choice(self, choice: Choice, reason: FinishReason) -> ChatChoice:
        return ChatChoice(
            index=choice.index,
            message=_message(choice),
            logprobs=ChatLogprobs(chat_logprobs(choice.logprobs)) if choice.logprobs else None,
            finish_reason=reason,
        )

    def completion(self, head: Head, choices: list[ChatChoice], usage: CompletionUsage) -> ChatCompletion:
        return ChatCompletion(**head, object="chat.completion", choices=choices, usage=usage)


def _message(choice: Choice) -> ChatMessage:
    if not choice.tool_calls:
        return ChatMessage("assistant", choice.text, None)
    calls = [
        ToolCallObject(call.id, "function", CalledFunction(call.name, call.arguments)) for call in choice.tool_calls
    ]
    return ChatMessage("assistant", choice.text or None, None, calls)


def _call_chunk(call: ToolCallDelta) -> ToolCallChunk:
    if call.name is None:
        return ToolCallChunk(index=call.index, function=CalledFunctionChunk(arguments=call.arguments))
    function = CalledFunctionChunk(name=call.name, arguments=call.arguments)
    return ToolCallChunk(index=call.index, id=call.id or "", type="function", function=function)
