"""JSON Schema as far as answers can be held to it."""

from __future__ import annotations

from typing import Any


class UnsupportedSchema(Exception):
    """A schema cannot be guaranteed; ``path`` leads to what is in the way."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


def supported(schema: object) -> dict[str, Any]:
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise UnsupportedSchema("", "expected an object")
    return dict(schema)
