"""Which values a parameter may have, for the client that gave another one; msgspec only says which one that was."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

import msgspec

Schema = dict[str, Any]
_STEP = re.compile(r"([^.\[\]]+)|\[[^\]]*\]")


def allowed_values(kind: type[msgspec.Struct], param: str) -> list[str]:
    """Return the values that are listed for a parameter, such as ``messages[0].role``; none where it is free."""
    schema, definitions = _described(kind)
    found = list(_alternatives([schema], definitions))
    for step in _STEP.finditer(param):
        below = [each["properties"].get(step[1]) if step[1] else each["items"] for each in found if _has(each, step[1])]
        found = list(_alternatives([each for each in below if each], definitions))
    return sorted({str(value) for each in found for value in each.get("enum", ()) if value is not None})


def _has(schema: Schema, name: str | None) -> bool:
    return isinstance(schema.get("properties" if name else "items"), dict)


def _alternatives(schemas: Iterable[Schema], definitions: Schema) -> Iterator[Schema]:
    """Yield the schemas themselves, with references followed and alternatives one by one."""
    for schema in schemas:
        if "$ref" in schema:
            yield from _alternatives([definitions[schema["$ref"].rpartition("/")[2]]], definitions)
        elif "anyOf" in schema:
            yield from _alternatives(schema["anyOf"], definitions)
        else:
            yield schema


@lru_cache(maxsize=16)
def _described(kind: type[msgspec.Struct]) -> tuple[Schema, Schema]:
    schema = msgspec.json.schema(kind)
    return schema, schema.get("$defs", {})
