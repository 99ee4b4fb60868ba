"""``response_format``: what an answer may look like. ``regex`` and ``grammar`` are extensions."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from pilotlight.text.grammar import json_object_grammar, json_schema_grammar, lark_grammar, regex_grammar

PARAM = "response_format"


class TextFormat(msgspec.Struct, frozen=True, tag="text"):
    """Anything."""


class JsonObjectFormat(msgspec.Struct, frozen=True, tag="json_object"):
    """Any JSON object."""


class NamedSchema(msgspec.Struct, frozen=True):
    schema: dict[str, Any] | bool
    name: str = "answer"
    description: str | None = None
    strict: bool | None = None


class JsonSchemaFormat(msgspec.Struct, frozen=True, tag="json_schema"):
    """JSON that is valid under a schema, whether ``strict`` is asked for or not."""

    json_schema: NamedSchema


class RegexFormat(msgspec.Struct, frozen=True, tag="regex"):
    """Text that a regular expression matches as a whole."""

    regex: str


class GrammarFormat(msgspec.Struct, frozen=True, tag="grammar"):
    """Text of a grammar: ``definition`` is in Lark's notation, or a regular expression."""

    definition: str
    syntax: Literal["lark", "regex"] = "lark"


ResponseFormat = TextFormat | JsonObjectFormat | JsonSchemaFormat | RegexFormat | GrammarFormat


def format_grammar(wanted: ResponseFormat | None) -> str | None:
    """Return the grammar of a format; None where anything may be said.

    Raises:
        InvalidRequest: the schema uses what cannot be guaranteed.
    """
    match wanted:
        case None | TextFormat():
            return None
        case JsonObjectFormat():
            return json_object_grammar()
        case JsonSchemaFormat(json_schema=named):
            return json_schema_grammar(named.schema, f"{PARAM}.json_schema.schema")
        case RegexFormat(regex=pattern) | GrammarFormat(definition=pattern, syntax="regex"):
            return regex_grammar(pattern)
        case GrammarFormat(definition=definition):
            return lark_grammar(definition)
