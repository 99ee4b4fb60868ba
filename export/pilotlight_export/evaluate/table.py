"""An evaluation as lines for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from pilotlight_export.evaluate.budget import Verdict
from pilotlight_export.evaluate.figures import Row, Spread

HEAD = ("artifact", "MB", "memory MB", "prefill tok/s", "decode tok/s", "bits/byte", "perplexity", "top-1", "mean KL")


def table(rows: Sequence[Row]) -> str:
    """Lay rows out in columns; a range in brackets is the least and the most of the measurements."""
    lines = [HEAD, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEAD))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def verdict_lines(verdict: Verdict) -> str:
    """Name the choice, or what speaks against each artifact."""
    if verdict.chosen is not None:
        return f"{verdict.chosen} is the smallest artifact that meets every limit"
    lines = [f"  {name}: {'; '.join(complaints)}" for name, complaints in verdict.complaints.items()]
    return "\n".join(["no artifact meets every limit:", *lines])


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        f"{row.size_mb:,.1f}",
        f"{row.memory_mb:,.0f}",
        _spread(row.prefill_tps),
        _spread(row.decode_tps),
        f"{row.bits_per_byte:.4f}",
        f"{row.perplexity:,.3f}",
        f"{row.top1_agreement:.4f}",
        f"{row.mean_kl:.5f}",
    )


def _spread(spread: Spread) -> str:
    return f"{spread.median:,.0f} ({spread.least:,.0f}–{spread.most:,.0f})"
