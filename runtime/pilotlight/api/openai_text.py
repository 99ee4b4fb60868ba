"""``POST /v1/completions``: a prompt as text or as token ids, continued as it stands."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from pilotlight.api.openai_body import GenerationBody
from pilotlight.api.openai_completion import Shape
from pilotlight.errors import InvalidRequest
from pilotlight.function import Request

DEFAULT_MAX_TOKENS = 16
"""What the OpenAI API takes where a text completion does not say."""


class TextBody(GenerationBody, frozen=True, kw_only=True):
    prompt: str | Annotated[list[int | str | list[int]], Meta(min_length=1)]


def text_request(body: TextBody, request_id: str) -> Request:
    """Return the request that a body asks for.

    Raises:
        InvalidRequest: the prompt is a batch of several prompts.
    """
    text, token_ids = _prompt(body.prompt)
    return Request(
        id=request_id,
        text=text,
        token_ids=token_ids,
        max_new_tokens=body.max_tokens or DEFAULT_MAX_TOKENS,
        stop_strings=body.stop_strings,
        ignore_eos=body.ignore_eos,
        sampling=body.sampling,
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


TEXT = Shape(
    object="text_completion",
    chunk_object="text_completion",
    opening=None,
    piece=lambda text: {"text": text, "logprobs": None},
    closing={"text": "", "logprobs": None},
    whole=lambda text: {"text": text, "logprobs": None},
)
