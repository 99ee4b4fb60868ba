"""The small objects that endpoints answer with, as wire types."""

from __future__ import annotations

from typing import Literal

import msgspec

from pilotlight.function import Function


class ModelObject(msgspec.Struct, frozen=True):
    """A function, as clients of the OpenAI API list models; what follows ``owned_by`` is ours."""

    id: str
    created: int
    max_context_tokens: int
    artifact: str
    precision: str
    object: Literal["model"] = "model"
    owned_by: Literal["pilotlight"] = "pilotlight"


class ModelList(msgspec.Struct, frozen=True):
    data: list[ModelObject]
    object: Literal["list"] = "list"


class CancelledRequest(msgspec.Struct, frozen=True):
    id: str
    object: Literal["request"] = "request"
    status: Literal["cancelling"] = "cancelling"


class Alive(msgspec.Struct, frozen=True):
    status: Literal["ok"] = "ok"


class Ready(msgspec.Struct, frozen=True):
    functions: list[str]
    status: Literal["ok"] = "ok"


def model_object(function: Function) -> ModelObject:
    """Return what clients may know of a function."""
    return ModelObject(
        id=function.name,
        created=int(function.created_at_utc.timestamp()),
        max_context_tokens=function.max_context_tokens,
        artifact=function.artifact.digest,
        precision=function.artifact.manifest.precision,
    )
