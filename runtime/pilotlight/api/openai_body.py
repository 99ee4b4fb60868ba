"""Request bodies of the OpenAI endpoints: what both have in common, and how a bad one is refused.

A parameter that would change the answer and is not supported is refused by name; one that cannot is ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from pilotlight.errors import InvalidRequest

MAX_STOP_STRINGS = 16

HARMLESS = frozenset(
    "metadata parallel_tool_calls prompt_cache_key prompt_cache_retention reasoning_effort safety_identifier "
    "service_tier store user verbosity".split()
)

SAMPLING = (
    "temperature top_k top_p min_p repetition_penalty frequency_penalty presence_penalty logit_bias seed"
).split()

# Not supported yet, unless they are left at a value which asks for nothing.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "prediction": (),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "web_search_options": (),
}

Text = Annotated[str, Meta(min_length=1)]
T = TypeVar("T", bound="GenerationBody")


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool = False
    include_obfuscation: bool = False


class GenerationBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The parameters that chat and text completions share; ``top_k`` and what follows it are extensions."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    logit_bias: dict[Annotated[int, Meta(ge=0)], Annotated[float, Meta(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Text | Annotated[list[Text], Meta(max_length=MAX_STOP_STRINGS)] | None = None
    top_k: Annotated[int, Meta(ge=0)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    ignore_eos: bool = False
    return_token_ids: bool = False

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def sampling(self) -> dict[str, Any]:
        """The sampling parameters that the client gave."""
        return {name: getattr(self, name) for name in SAMPLING if getattr(self, name) is not None}


def parse(raw: bytes, kind: type[T]) -> T:
    """Decode and check a request body.

    Raises:
        InvalidRequest: not JSON, or a parameter is missing, malformed, out of range or not supported.
    """
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(None, f"the body is not valid JSON: {error}", "invalid_json") from error
    if not isinstance(body, dict):
        raise InvalidRequest(None, "the body must be a JSON object", "invalid_json")
    known = {field.name for field in msgspec.structs.fields(kind)}
    given = {key: value for key, value in body.items() if key in known or not _ignored(key, value)}
    try:
        return msgspec.convert(given, kind, str_keys=True)
    except msgspec.ValidationError as error:
        raise _invalid(error) from error


def _ignored(key: str, value: object) -> bool:
    if key in HARMLESS:
        return True
    if key not in NEUTRAL:
        raise InvalidRequest(key, f"unknown parameter: {key}", "unknown_parameter")
    if value is not None and value not in NEUTRAL[key]:
        raise InvalidRequest(key, f"{key} is not supported here", "unsupported_parameter")
    return True


def _invalid(error: msgspec.ValidationError) -> InvalidRequest:
    """Turn msgspec's message ("Expected … - at `$.a.b`") into one that begins with the parameter."""
    expectation, _, place = str(error).replace("`", "").partition(" - at ")
    param = place.rpartition("$")[2].removeprefix(".").removesuffix("[...]") or None
    for marker in ("missing required field ", "contains unknown field "):
        _, found, name = expectation.partition(marker)
        if found:
            param = f"{param}.{name}" if param else name
            expectation = "is required" if "missing" in marker else "is not a known parameter"
    return InvalidRequest(param, f"{param}: {expectation[:1].lower()}{expectation[1:]}" if param else expectation)
