"""``POST /v1/completions``: a prompt as text or as token ids, continued as it stands."""

from __future__ import annotations

from typing import Annotated

from msgspec import UNSET, Meta, UnsetType

from pilotlight.answer import Choice, Delta
from pilotlight.api.openai_body import GenerationBody
from pilotlight.api.openai_completion import Head
from pilotlight.api.openai_format import format_grammar
from pilotlight.api.openai_logprobs import text_logprobs
from pilotlight.api.openai_types import (
    CompletionUsage,
    FinishReason,
    TextChoice,
    TextChunk,
    TextChunkChoice,
    TextCompletion,
    TextLogprobs,
)
from pilotlight.errors import InvalidRequest
from pilotlight.function import Request

DEFAULT_MAX_TOKENS = 16
"""What the OpenAI API takes where a text completion does not say."""


class TextBody(GenerationBody, frozen=True, kw_only=True):
    prompt: str | Annotated[list[int | str | list[int]], Meta(min_length=1)]
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None
    best_of: Annotated[int, Meta(ge=1)] | None = None


def text_request(body: TextBody, request_id: str) -> Request:
    """Return the request that a body asks for.

    Raises:
        InvalidRequest: the prompt is a batch of several prompts; or ``best_of`` asks for more than ``n``.
    """
    text, token_ids = _prompt(body.prompt)
    if body.best_of not in (None, body.n or 1):
        raise InvalidRequest("best_of", "best_of: only the value of n is supported", "unsupported_parameter")
    return Request(
        id=request_id,
        num_choices=body.n or 1,
        num_top_logprobs=body.logprobs,
        text=text,
        token_ids=token_ids,
        max_new_tokens=body.max_tokens or DEFAULT_MAX_TOKENS,
        stop_strings=body.stop_strings,
        ignore_eos=body.ignore_eos,
        sampling=body.sampling,
        grammar=format_grammar(body.response_format),
        cache_key=body.prompt_cache_key,
    )


def _prompt(prompt: str | list[int | str | list[int]]) -> tuple[str | None, tuple[int, ...] | None]:
    """Return the prompt as text or as ids; a list of one prompt is that prompt."""
    if isinstance(prompt, str):
        return prompt, None
    ids = tuple(item for item in prompt if isinstance(item, int))
    if len(ids) == len(prompt):
        return None, ids
    if len(prompt) > 1:
        raise InvalidRequest("prompt", "prompt: one prompt a request is supported; send the others as requests")
    only = prompt[0]
    return (only, None) if isinstance(only, str) else (None, tuple(only) if isinstance(only, list) else ids)


class TextShape:
    """The wire's ``text_completion``."""

    def __init__(self) -> None:
        self._offsets: dict[int, int] = {}

    def opening(self, choice: int) -> TextChunkChoice | None:
        return None

    def piece(self, delta: Delta) -> TextChunkChoice | None:
        if not delta.text and not delta.logprobs:
            return None
        logprobs = self._logprobs(delta) if delta.logprobs else None
        return TextChunkChoice(index=delta.choice, text=delta.text, logprobs=logprobs, finish_reason=None)

    def closing(self, choice: int, reason: FinishReason | None) -> TextChunkChoice:
        return TextChunkChoice(index=choice, text="", logprobs=None, finish_reason=reason)

    def chunk(
        self, head: Head, choices: list[TextChunkChoice], usage: CompletionUsage | UnsetType = UNSET
    ) -> TextChunk:
        return TextChunk(**head, object="text_completion", choices=choices, usage=usage)

    def choice(self, choice: Choice, reason: FinishReason) -> TextChoice:
        logprobs = text_logprobs(choice.logprobs) if choice.logprobs else None
        return TextChoice(index=choice.index, text=choice.text, logprobs=logprobs, finish_reason=reason)

    def completion(self, head: Head, choices: list[TextChoice], usage: CompletionUsage) -> TextCompletion:
        return TextCompletion(**head, object="text_completion", choices=choices, usage=usage)

    def _logprobs(self, delta: Delta) -> TextLogprobs:
        offset = self._offsets.get(delta.choice, 0)
        self._offsets[delta.choice] = offset + sum(len(logprobs.token.text) for logprobs in delta.logprobs)
        return text_logprobs(delta.logprobs, offset)
