"""``POST /v1/chat/completions``: body in, chunks or one completion out."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from pilotlight.api.openai_body import GenerationBody
from pilotlight.api.openai_completion import Shape
from pilotlight.errors import InvalidRequest
from pilotlight.function import Request


class TextPart(msgspec.Struct, frozen=True, tag="text"):
    text: str


class OtherPart(msgspec.Struct, frozen=True):
    type: str


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


def chat_request(body: ChatBody, request_id: str) -> Request:
    """Return the request that a body asks for.

    Raises:
        InvalidRequest: a message has no content, or content other than text.
    """
    return Request(
        id=request_id,
        messages=[_template_message(message, f"messages[{i}]") for i, message in enumerate(body.messages)],
        max_new_tokens=body.max_completion_tokens or body.max_tokens,
        stop_strings=body.stop_strings,
        ignore_eos=body.ignore_eos,
        sampling=body.sampling,
    )


def _template_message(message: Message, param: str) -> dict[str, Any]:
    """Return a message as chat templates know it: text content, and no role that most have never heard of."""
    role = "system" if message.role == "developer" else message.role
    fields: dict[str, Any] = {"role": role, "content": _text(message, f"{param}.content")}
    for name in ("name", "tool_calls", "tool_call_id"):
        if (value := getattr(message, name)) is not None:
            fields[name] = value
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


CHAT = Shape(
    object="chat.completion",
    chunk_object="chat.completion.chunk",
    opening={"delta": {"role": "assistant", "content": ""}},
    piece=lambda text: {"delta": {"content": text}},
    closing={"delta": {}},
    whole=lambda text: {"message": {"role": "assistant", "content": text, "refusal": None}},
)
