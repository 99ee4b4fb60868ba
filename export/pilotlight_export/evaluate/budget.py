"""The verdict: of the artifacts that meet a user's limits, the smallest; why deploy more than a job needs?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pilotlight_export.evaluate.figures import Row, Spread


@dataclass(frozen=True)
class Limit:
    """A bound on one figure of a row; of a repeated measurement the median counts."""

    figure: str
    bound: float
    kind: Literal["at most", "at least"]

    def is_met_by(self, row: Row) -> bool:
        """Tell whether a row keeps within the bound."""
        value = self._value(row)
        return value <= self.bound if self.kind == "at most" else value >= self.bound

    def complaint(self, row: Row) -> str:
        """Say what a row that does not keep within the bound has."""
        return f"{self.figure} is {self._value(row):g}, not {self.kind} {self.bound:g}"

    def _value(self, row: Row) -> float:
        value = getattr(row, self.figure)
        return value.median if isinstance(value, Spread) else float(value)


FIGURES = {
    "max_size_mb": "size_mb",
    "max_memory_mb": "memory_mb",
    "max_bits_per_byte": "bits_per_byte",
    "max_kl": "mean_kl",
    "min_top1": "top1_agreement",
    "min_prefill_tps": "prefill_tps",
    "min_decode_tps": "decode_tps",
}
"""What each option of the command line bounds."""


@dataclass(frozen=True)
class Verdict:
    """The smallest artifact that meets all limits, if any does, and what speaks against each of the others."""

    chosen: str | None
    complaints: dict[str, list[str]]


def limits_of(bounds: Mapping[str, float | None]) -> list[Limit]:
    """Return the limits that were given as options."""
    return [
        Limit(FIGURES[option], bound, "at most" if option.startswith("max") else "at least")
        for option, bound in bounds.items()
        if bound is not None
    ]


def judge(rows: Sequence[Row], limits: Sequence[Limit]) -> Verdict:
    """Choose the smallest row that meets all limits."""
    complaints = {row.name: [limit.complaint(row) for limit in limits if not limit.is_met_by(row)] for row in rows}
    fitting = [row for row in rows if not complaints[row.name]]
    chosen = min(fitting, key=lambda row: row.size_mb).name if fitting else None
    return Verdict(chosen, complaints)
