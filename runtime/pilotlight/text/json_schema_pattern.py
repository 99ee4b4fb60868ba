"""Regular expressions of JSON Schema, so that the grammar engine and every validator mean the same by them.

ECMAScript's ``\\d``, ``\\w`` and ``\\s`` are about ASCII (the last one almost); elsewhere they are about Unicode.
"""

from __future__ import annotations

import re
from typing import Any

CLASSES = {r"\d": "0-9", r"\w": "A-Za-z0-9_", r"\s": r" \t\n\r\f\v"}
PIECE = re.compile(r"\\.|\[|\]|.", re.S)


class UnsupportedPattern(Exception):
    """A pattern means different things to different engines."""


def portable(pattern: Any) -> str:
    """Return a pattern with its classes written out.

    Raises:
        UnsupportedPattern: it has Unicode properties, which engines read differently, or is no string.
    """
    if not isinstance(pattern, str):
        raise UnsupportedPattern("expected a string")
    written, in_class = [], False
    for found in PIECE.finditer(pattern):
        piece = found[0]
        if piece in (r"\p", r"\P"):
            raise UnsupportedPattern("Unicode properties are not supported in patterns")
        if piece in CLASSES:
            piece = CLASSES[piece] if in_class else f"[{CLASSES[piece]}]"
        elif piece == "[":
            in_class = True
        elif piece == "]":
            in_class = False
        written.append(piece)
    return "".join(written)
