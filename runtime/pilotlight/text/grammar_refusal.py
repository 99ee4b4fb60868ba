"""Where in a client's schema the grammar engine found what it refuses. It says why, but not where."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

Problem = Callable[[dict[str, Any]], str]
"""Says what is wrong with a schema; nothing, where it can be compiled."""

MAX_TRIED = 256
NAMED = ("$defs", "definitions", "properties", "patternProperties")
LISTED = ("prefixItems", "anyOf")
SINGLE = ("items", "additionalProperties")
SHARED = ("$defs", "definitions", "x-guidance")
"""What a part of a schema may need from the whole."""


def refused_schema(grammar: str, problem: Problem) -> tuple[str, str] | None:
    """Return the parameter and the path of the smallest schema in a grammar that is refused by itself, and why.

    Schemas say in ``$comment`` which parameter they came with. None: it is not a schema that is refused.
    """
    for schema in _schemas(grammar):
        if reason := problem(schema):
            return f"{schema['$comment']}{_path(schema, schema, reason, problem)}", reason
    return None


def told(problem: str) -> str:
    """Return what the grammar engine says is wrong in one line, without the lines in which it draws where."""
    lines = [line for line in problem.splitlines() if line and not line[0].isspace()]
    of_pattern = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if not of_pattern:
        return " ".join(" ".join(lines).split())
    _, _, pattern = lines[0].partition(" (in regex)")[0].partition(": ")
    return f"{pattern or lines[0]}: {of_pattern[0]}"


def _schemas(grammar: str) -> Iterator[dict[str, Any]]:
    for part in json.loads(grammar)["grammars"]:
        if "json_schema" in part:
            yield part["json_schema"]
        pieces = part.get("lark_grammar", "").split("%json ")[1:]
        yield from (found for piece in pieces if "$comment" in (found := json.JSONDecoder().raw_decode(piece)[0]))


def _path(schema: dict[str, Any], root: dict[str, Any], reason: str, problem: Problem, left: int = MAX_TRIED) -> str:
    """Return the way from a refused schema to the deepest one that is refused for the same reason."""
    shared = {key: root[key] for key in SHARED if key in root}
    for step, part in _parts(schema):
        left -= 1
        if left > 0 and _cause(problem({**shared, **part})) == _cause(reason):
            return step + _path(part, root, reason, problem, left)
    return ""


def _cause(reason: str) -> str:
    """Return a reason without the references that led to it."""
    return " ".join(reason.split()).partition(" while processing")[0]


def _parts(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the schemas right below one, each with its step in a path."""
    found = [(f".{key}.{name}", part) for key in NAMED for name, part in schema.get(key, {}).items()]
    found += [(f".{key}[{index}]", part) for key in LISTED for index, part in enumerate(schema.get(key, []))]
    found += [(f".{key}", schema[key]) for key in SINGLE if key in schema]
    yield from ((step, part) for step, part in found if isinstance(part, dict))
