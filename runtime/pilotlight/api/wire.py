"""Request bodies: one declaration gives the parsing, the refusal of a bad body, and the schema in ``/openapi.json``.

A parameter that would change the answer and is not supported is refused by name; one that cannot is ignored. Null means
not given, as the clients' types have it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

import msgspec
from msgspec import Meta

from pilotlight.api.allowed_values import allowed_values
from pilotlight.errors import InvalidRequest

SAMPLING = (
    "temperature top_k top_p min_p repetition_penalty frequency_penalty presence_penalty logit_bias seed"
).split()

MAX_DEPTH = 200
"""How deep values may be nested; much of what reads them does so recursively."""

JSON_TYPES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}
_QUOTED_TYPE = re.compile(r"\b(str|int|float|bool)\b(?=[^`]*`)")

T = TypeVar("T", bound="Body")
S = TypeVar("S", bound=msgspec.Struct)


class Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A body's fields are its parameters; ``ignored`` names what it takes beside them without any effect.

    ``neutral`` names what is not supported, with the values that ask for nothing and are therefore taken. ``untyped``
    are the tagged structs whose tag may be left out; ``normalized`` puts it where it is missing.
    """

    ignored: ClassVar[frozenset[str]] = frozenset()
    neutral: ClassVar[Mapping[str, tuple[object, ...]]] = {}
    untyped: ClassVar[tuple[type[msgspec.Struct], ...]] = ()

    @classmethod
    def normalized(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Return the parameters with what a client may leave out where the types need it."""
        return given


class SamplingBody(Body, frozen=True, kw_only=True):
    """What every endpoint that generates can be told; a surface narrows what its clients know otherwise."""

    model: str
    stream: bool = False
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    logit_bias: dict[Annotated[int, Meta(ge=0)], Annotated[float, Meta(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    top_k: Annotated[int, Meta(ge=0)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=10)] | None = None
    ignore_eos: bool = False

    @property
    def sampling(self) -> dict[str, Any]:
        """The sampling parameters that the client gave."""
        return {name: getattr(self, name) for name in SAMPLING if getattr(self, name) is not None}


class ResumableBody(SamplingBody, frozen=True, kw_only=True):
    """What an endpoint can be told whose answers go on where a platform cut them off."""

    resume_token: str | None = None

    @property
    def resumable(self) -> bool:
        """Whether the parts of this answer can be put together."""
        return True


def parse(raw: bytes, kind: type[T]) -> T:
    """Decode and check a request body.

    Raises:
        InvalidRequest: not JSON, or a parameter is missing, malformed, out of range or not supported.
    """
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    given = {}
    for key, value in _object(raw).items():
        if key not in fields:
            _check_other(key, value, kind)
        elif value is not None or fields[key].required:
            given[key] = value
    try:
        return msgspec.convert(kind.normalized(given), kind, str_keys=True)
    except msgspec.ValidationError as error:
        raise _invalid(error, kind) from error


def parse_text(given: Mapping[str, str], kind: type[S]) -> S:
    """Check what comes as text: a query, or headers, of which a struct names those that count.

    Raises:
        InvalidRequest: a parameter is missing, malformed or out of range.
    """
    try:
        return msgspec.convert(dict(given), kind, strict=False)
    except msgspec.ValidationError as error:
        raise _invalid(error, kind) from error


def _object(raw: bytes) -> dict[str, Any]:
    if not raw.strip():
        raise InvalidRequest(None, "the body is empty; expected a JSON object", "invalid_json")
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = str(error).partition(" - at ")[0]
        raise InvalidRequest(None, f"the body is not valid JSON: {reason}", "invalid_json") from error
    if not isinstance(body, dict):
        raise InvalidRequest(None, "the body must be a JSON object", "invalid_json")
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH and _is_deep(body):
        raise InvalidRequest(None, f"the body is nested deeper than {MAX_DEPTH} levels")
    return body


def _is_deep(body: dict[str, Any]) -> bool:
    level: list[Any] = [body]
    for _ in range(MAX_DEPTH):
        below = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list)]
        level = [value for values in below for value in values]
        if not level:
            return False
    return True


def _check_other(key: str, value: object, kind: type[Body]) -> None:
    if key in kind.ignored:
        return
    if key not in kind.neutral:
        raise InvalidRequest(key, f"unknown parameter: {key}", "unknown_parameter")
    if value is not None and not any(_is_same(value, taken) for taken in kind.neutral[key]):
        raise InvalidRequest(key, f"{key} is not supported here", "unsupported_parameter")


def _is_same(value: object, other: object) -> bool:
    """Compare as JSON does, where 0 is not false."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _invalid(error: msgspec.ValidationError, kind: type[msgspec.Struct]) -> InvalidRequest:
    """Turn msgspec's message ("Expected … - at `$.a.b`") into one that begins with the parameter."""
    expectation, _, place = str(error).partition(" - at ")
    if expectation.startswith("Expected"):
        expectation = _QUOTED_TYPE.sub(lambda quoted: JSON_TYPES.get(quoted[0], quoted[0]), expectation)
    expectation, place = expectation.replace("`", ""), place.replace("`", "")
    if place.startswith("key in"):
        expectation = f"its keys: {expectation[:1].lower()}{expectation[1:]}"
    param = place.rpartition("$")[2].removeprefix(".").removesuffix("[...]") or None
    for marker in ("missing required field ", "contains unknown field "):
        _, found, name = expectation.partition(marker)
        if found:
            param = f"{param}.{name}" if param else name
            expectation = "is required" if "missing" in marker else "is not a known parameter"
    if param and expectation.startswith("Invalid") and (allowed := allowed_values(kind, param)):
        expectation += f"; expected {'one of ' if len(allowed) > 1 else ''}{', '.join(allowed)}"
    return InvalidRequest(param, f"{param}: {expectation[:1].lower()}{expectation[1:]}" if param else expectation)
