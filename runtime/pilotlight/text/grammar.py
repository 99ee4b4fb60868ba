"""What an answer may look like, as a grammar that travels to the engine: llguidance's serialized form.

Building one takes no library. Checking one does, and loads it then.

Source: llguidance's docs/syntax.md, for Lark's dialect there, ``%json`` and ``x-guidance``.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any

from pilotlight.errors import InvalidRequest
from pilotlight.text.grammar_refusal import refused_schema, told
from pilotlight.text.json_schema import UnsupportedSchema, supported

MAX_GRAMMAR_CHARS = 256 * 1024
MAX_REASON_CHARS = 300

# One way to write a JSON text: what many models write by themselves, and no room for a weak one to get lost in spaces.
WRITTEN = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def json_schema_grammar(schema: object, param: str) -> str:
    """Return the grammar of the JSON texts that are valid under ``schema``, or of some of them.

    Raises:
        InvalidRequest: the schema uses what cannot be guaranteed; names its path, below ``param``.
    """
    return json.dumps({"grammars": [{"json_schema": compiled_schema(schema, param)}]})


def json_object_grammar() -> str:
    """Return the grammar of all JSON objects."""
    return json_schema_grammar({"type": "object"}, "")


def regex_grammar(pattern: str) -> str:
    """Return the grammar of the texts that ``pattern`` matches from their beginning to their end."""
    escaped = re.sub(r"\\.|/|\n", lambda found: {"/": r"\/", "\n": r"\n"}.get(found[0], found[0]), pattern, flags=re.S)
    return lark_grammar(f"start: /{escaped}/")


def lark_grammar(definition: str) -> str:
    """Return the grammar that a Lark definition describes, which begins with its rule ``start``."""
    return json.dumps({"grammars": [{"lark_grammar": definition}]})


def compiled_schema(schema: object, param: str) -> dict[str, Any]:
    """Return a schema as a grammar holds it, of only what can be guaranteed.

    Raises:
        InvalidRequest: the schema uses what cannot be guaranteed; names its path, below ``param``.
    """
    try:
        plain = supported(schema)
    except UnsupportedSchema as error:
        place = f"{param}{error.path}"
        raise InvalidRequest(place, f"{place}: {error.reason}", "unsupported_schema") from error
    return {**plain, "$comment": param, "x-guidance": WRITTEN}


@lru_cache(maxsize=256)
def check_grammar(grammar: str, param: str) -> None:
    """Compile a grammar for nothing but to see whether it can be; takes from a millisecond to a second.

    Raises:
        InvalidRequest: it cannot.
    """
    if len(grammar) > MAX_GRAMMAR_CHARS:
        raise InvalidRequest(param, f"{param}: longer than {MAX_GRAMMAR_CHARS:,} characters")
    from llguidance import LLMatcher

    def problem_of(schema: dict[str, Any]) -> str:
        return str(LLMatcher.validate_grammar(json.dumps({"grammars": [{"json_schema": schema}]})))

    if problem := LLMatcher.validate_grammar(grammar):
        refused = refused_schema(grammar, problem_of)
        place, reason = refused or (param, problem)
        code = "unsupported_grammar" if refused is None else "unsupported_schema"
        raise InvalidRequest(place, f"{place}: {told(reason)[:MAX_REASON_CHARS]}", code)
