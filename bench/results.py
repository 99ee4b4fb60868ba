"""A run's result: one JSON file for each shape, written after every row, so that an end at any point loses little."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Values = list[float | None]
"""A peer's figure in each round; None where it failed."""


@dataclass
class PeerRecord:
    """What is known of a peer; ``state`` is "measured", "not installed: …" or "failed: …"."""

    state: str
    is_four_bit: bool
    is_server: bool
    versions: dict[str, str] = field(default_factory=dict)


@dataclass
class Result:
    """Figures by workload, title and peer."""

    shape: str
    recipe: str
    model_sha256: str
    machine: dict[str, Any]
    peers: dict[str, PeerRecord] = field(default_factory=dict)
    rows: dict[str, dict[str, dict[str, Values]]] = field(default_factory=dict)
    errors: dict[str, dict[str, str]] = field(default_factory=dict)
    bandwidth_gb_per_s: dict[str, list[float]] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write the file, complete or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")
        partial.replace(path)


def read(path: Path) -> Result:
    content = json.loads(path.read_text())
    content["peers"] = {name: PeerRecord(**record) for name, record in content["peers"].items()}
    return Result(**content)


def known(values: Values) -> list[float]:
    return [value for value in values if value is not None]


def median(values: Values) -> float | None:
    present = known(values)
    return statistics.median(present) if present else None


def paired_ratios(ours: Values, theirs: Values) -> list[float]:
    """Return our figure over theirs, round by round, where both have one."""
    return [a / b for a, b in zip(ours, theirs, strict=True) if a is not None and b]


def best_peer(values: dict[str, Values], candidates: list[str], better: str) -> str | None:
    """Return the candidate with the best median."""
    medians = {name: middle for name in candidates if (middle := median(values.get(name, []))) is not None}
    if not medians:
        return None
    return (min if better == "less" else max)(medians, key=lambda name: medians[name])
