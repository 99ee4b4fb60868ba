"""What chat and text completions answer, as wire types."""

from __future__ import annotations

from typing import Literal

import msgspec

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
    tool_calls: list[ToolCallObject] = []


class ChatChoice(msgspec.Struct, frozen=True):
    """``token_ids`` is an extension."""

    index: int
    message: ChatMessage
    finish_reason: FinishReason
    logprobs: ChatLogprobs | None
    token_ids: list[int] = []


class Head(msgspec.Struct, frozen=True):
    id: str
    created: int
    model: str
    system_fingerprint: str


class ChatCompletion(Head, frozen=True):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: CompletionUsage


class CalledFunctionChunk(msgspec.Struct, frozen=True):
    arguments: str
    name: str | None = None


class ToolCallChunk(msgspec.Struct, frozen=True):
    index: int
    function: CalledFunctionChunk
    id: str | None = None
    type: Literal["function"] | None = None


class ChatDelta(msgspec.Struct, frozen=True):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallChunk] = []


class ChatChunkChoice(msgspec.Struct, frozen=True):
    index: int
    delta: ChatDelta
    finish_reason: FinishReason | None
    logprobs: ChatLogprobs | None = None
    token_ids: list[int] = []


class ChatChunk(Head, frozen=True):
    """With ``stream_options.include_usage`` the last one has no choices, and the usage."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: CompletionUsage | None = None


class TextLogprobs(msgspec.Struct, frozen=True):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(msgspec.Struct, frozen=True):
    index: int
    text: str
    finish_reason: FinishReason
    logprobs: TextLogprobs | None
    token_ids: list[int] = []


class TextCompletion(Head, frozen=True):
    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: CompletionUsage


class TextChunkChoice(msgspec.Struct, frozen=True):
    index: int
    text: str
    finish_reason: FinishReason | None
    logprobs: TextLogprobs | None
    token_ids: list[int] = []


class TextChunk(Head, frozen=True):
    object: Literal["text_completion"]
    choices: list[TextChunkChoice]
    usage: CompletionUsage | None = None
