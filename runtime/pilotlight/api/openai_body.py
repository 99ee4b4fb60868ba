"""What the bodies of chat and text completions have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

import msgspec
from msgspec import Meta

from pilotlight.api.openai_format import ResponseFormat
from pilotlight.api.wire import ResumableBody

MAX_STOP_STRINGS = 16
MAX_CHOICES = 16

Text = Annotated[str, Meta(min_length=1)]


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool = False
    include_obfuscation: bool = False


class GenerationBody(ResumableBody, frozen=True, kw_only=True):
    """The parameters that chat and text completions share; ``return_token_ids`` is an extension."""

    ignored: ClassVar[frozenset[str]] = frozenset(
        "metadata parallel_tool_calls prompt_cache_retention reasoning_effort safety_identifier "
        "service_tier store user verbosity".split()
    )
    neutral: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "audio": (),
        "best_of": (1,),
        "echo": (False,),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "modalities": (["text"],),
        "prediction": (),
        "suffix": ("",),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "top_logprobs": (0,),
        "web_search_options": (),
    }

    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    stop: Text | Annotated[list[Text], Meta(max_length=MAX_STOP_STRINGS)] | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    response_format: ResponseFormat | None = None
    prompt_cache_key: str | None = None
    return_token_ids: bool = False

    @property
    def resumable(self) -> bool:
        return self.n in (None, 1)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
