"""What is invalid under a JSON Schema, as a schema; as far as that can be said.

The result is on the safe side: whatever is valid under it is invalid under the original, but it may be too narrow, down
to ``False``, under which nothing is valid.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

Schema = dict[str, Any] | bool
Resolve = Callable[[Any], Any]

MAX_DEPTH = 16
TYPES = frozenset(("array", "boolean", "integer", "null", "number", "object", "string"))
OPPOSITES = {
    "minimum": ("number", "exclusiveMaximum", 0),
    "maximum": ("number", "exclusiveMinimum", 0),
    "exclusiveMinimum": ("number", "maximum", 0),
    "exclusiveMaximum": ("number", "minimum", 0),
    "minLength": ("string", "maxLength", -1),
    "maxLength": ("string", "minLength", 1),
    "minItems": ("array", "maxItems", -1),
    "maxItems": ("array", "minItems", 1),
    "minProperties": ("object", "maxProperties", -1),
    "maxProperties": ("object", "minProperties", 1),
}


def negated(schema: object, resolve: Resolve, depth: int = 0) -> Schema:
    """Return a schema under which only what is invalid under ``schema`` is valid; ``resolve`` follows references."""
    if isinstance(schema, bool):
        return not schema
    if not isinstance(schema, dict) or depth > MAX_DEPTH:
        return False
    ways: list[Schema] = []
    for key, value in schema.items():
        ways += [way for way in _ways(key, value, schema, resolve, depth + 1) if way is not False]
    if True in ways:
        return True
    if not ways:
        return False
    return ways[0] if len(ways) == 1 else {"anyOf": ways}


def _ways(key: str, value: Any, schema: dict[str, Any], resolve: Resolve, depth: int) -> Iterator[Schema]:
    """Yield ways to break one keyword."""

    def without(part: object) -> Schema:
        return negated(part, resolve, depth)

    if key in OPPOSITES and isinstance(value, int | float):
        kind, opposite, step = OPPOSITES[key]
        if value + step >= 0 or kind == "number":
            yield {"type": kind, opposite: value + step}
    elif key == "type":
        yield from _other_types({value} if isinstance(value, str) else set(value))
    elif key in ("const", "enum"):
        yield from _other_values([value] if key == "const" else value)
    elif key == "required":
        yield from ({"type": "object", "properties": {name: False}} for name in value)
    elif key == "properties":
        for name, part in value.items():
            if (other := without(part)) is not False:
                yield {"type": "object", "properties": {name: other}, "required": [name]}
    elif key in ("items", "prefixItems"):
        first = len(schema.get("prefixItems", [])) if key == "items" else 0
        for place, part in enumerate([value] if key == "items" else value, first):
            if (other := without(part)) is not False:
                yield {"type": "array", "prefixItems": [*[True] * place, other], "minItems": place + 1}
    elif key in ("anyOf", "oneOf"):
        others = [without(part) for part in value]
        yield False if False in others else {"allOf": others}
    elif key == "allOf":
        yield from map(without, value)
    elif key == "not":
        yield value
    elif key == "$ref" and (found := resolve(value)) is not None:
        yield without(found)


def _other_types(types: set[str]) -> Iterator[Schema]:
    if types & {"integer", "number"}:
        types = types | {"integer", "number"}  # numbers with a fraction would be left of ``integer``; none is missed
    if others := TYPES - types:
        yield {"type": sorted(others)}


def _other_values(values: list[Any]) -> Iterator[Schema]:
    yield from _other_types({_type_of(value) for value in values})
    booleans = [value for value in values if isinstance(value, bool)]
    if len(set(booleans)) == 1:
        yield {"const": not booleans[0]}
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if numbers:
        yield {"type": "number", "exclusiveMinimum": max(numbers)}
        yield {"type": "number", "exclusiveMaximum": min(numbers)}
    strings = {value for value in values if isinstance(value, str)}
    if strings:
        yield {"type": "string", "pattern": f"^({_all_but(strings)})$"}


def _type_of(value: object) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    if isinstance(value, int | float):
        return "number"
    return "string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"


def _all_but(words: set[str]) -> str:
    """Return a regular expression of all texts except for these, without looking around."""
    heads = sorted({word[0] for word in words if word})
    other = rf"[^{''.join(map(re.escape, heads))}][\s\S]*" if heads else r"[\s\S]+"
    ends = [] if "" in words else [""]
    tails = [f"{re.escape(head)}({_all_but({word[1:] for word in words if word[:1] == head})})" for head in heads]
    return "|".join([*ends, other, *tails])
