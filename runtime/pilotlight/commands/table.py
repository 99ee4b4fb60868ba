"""Rows on a terminal."""

from __future__ import annotations


def table(rows: list[dict[str, object]]) -> str:
    """Return rows as lines of aligned columns under a heading; None is left blank."""
    lines = [list(rows[0]), *(["" if value is None else str(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
