"""What chat and text completions answer, as wire types. A field that is ``UNSET`` does not go over the wire."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from pilotlight.api.objects import Metered

FinishReason = Literal["stop", "length", "tool_calls"]


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct, frozen=True):
    reasoning_tokens: int


class CompletionUsage(msgspec.Struct, frozen=True):
    """``pilotlight`` is an extension."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails
    pilotlight: Metered


class TokenScore(msgspec.Struct, frozen=True):
    """A token, its bytes and its log probability."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprobs(TokenScore, frozen=True):
    top_logprobs: list[TokenScore]


class ChatLogprobs(msgspec.Struct, frozen=True):
    content: list[TokenLogprobs] | None
    refusal: None = None


class CalledFunction(msgspec.Struct, frozen=True):
    name: str
    arguments: str


class ToolCallObject(msgspec.Struct, frozen=True):
    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(msgspec.Struct, frozen=True):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCallObject] | UnsetType = UNSET


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    """``token_ids`` is an extension."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    token_ids: list[int] | UnsetType = UNSET


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """How every answer begins; which object it is, each says for itself."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str


class ChatCompletion(Head, frozen=True, kw_only=True):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: CompletionUsage


class CalledFunctionChunk(msgspec.Struct, frozen=True, kw_only=True):
    name: str | UnsetType = UNSET
    arguments: str


class ToolCallChunk(msgspec.Struct, frozen=True, kw_only=True):
    """The first of a call has its id and the function's name, the others go on with the arguments."""

    index: int
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: CalledFunctionChunk


class ChatDelta(msgspec.Struct, frozen=True, kw_only=True):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    tool_calls: list[ToolCallChunk] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    finish_reason: FinishReason | None


class ChatChunk(Head, frozen=True, kw_only=True):
    """With ``stream_options.include_usage`` the last one has no choices, and the usage."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: CompletionUsage | UnsetType = UNSET


class TextLogprobs(msgspec.Struct, frozen=True):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason
    token_ids: list[int] | UnsetType = UNSET


class TextCompletion(Head, frozen=True, kw_only=True):
    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: CompletionUsage


class TextChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    text: str
    logprobs: TextLogprobs | None
    token_ids: list[int] | UnsetType = UNSET
    finish_reason: FinishReason | None


class TextChunk(Head, frozen=True, kw_only=True):
    object: Literal["text_completion"]
    choices: list[TextChunkChoice]
    usage: CompletionUsage | UnsetType = UNSET
