"""Plans as a picture: cost against time to first token, and the fleet over time. SVG, without any library."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

from pilotlight.plan.compare import Comparison
from pilotlight.plan.result import Result

WIDTH, HEIGHT, MARGIN = 860, 250, 64
SMALL_HEIGHT = 150
INK, GRID, PAPER = "#222", "#ddd", "#fff"
COLOURS = ("#1b6ca8", "#d1495b", "#66a182", "#edae49", "#7d5ba6", "#2e4057", "#8d6a4f", "#00798c", "#b56576", "#5c946e",
           "#c08497", "#3d5a80", "#ee6c4d")  # fmt: skip
PANELS = (
    ("num_queued", "queued", 1.0),
    ("num_running", "slots in use", 1.0),
    ("num_replicas", "replicas", 1.0),
    ("memory_bytes", "memory reserved, GB", 1e-9),
    ("kv_used_bytes", "KV cache in use, MB", 1e-6),
)


@dataclass(frozen=True, slots=True)
class Axis:
    """Values from ``low`` to ``high`` along so many pixels from ``start``."""

    low: float
    high: float
    start: float
    length: float

    def at(self, value: float) -> float:
        return self.start + self.length * (value - self.low) / ((self.high - self.low) or 1.0)

    def ticks(self) -> list[float]:
        """Return some round values within."""
        step = _round_step((self.high - self.low) or 1.0)
        first, last = ceil(self.low / step), floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


def draw(comparison: Comparison) -> str:
    """Return an SVG: all plans in one field, then the cheapest one's fleet over time."""
    shown = next((one for one in comparison.results if one.plan == comparison.cheapest), comparison.results[0])
    parts = [_field(comparison)]
    top = HEIGHT + 96
    for name, title, unit in PANELS:
        parts.append(_panel(shown, name, f"{title} ({shown.plan})", unit, top))
        top += SMALL_HEIGHT + 60
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" font-family="sans-serif" '
        'font-size="12">\n'
        f'<rect width="{WIDTH}" height="{top}" fill="{PAPER}"/>\n{body}\n</svg>\n'
    )


def _field(comparison: Comparison) -> str:
    """Draw cost against p95; plans that break a limit are hollow."""
    results = [one for one in comparison.results if one.ttft_p95_s is not None]
    costs, waits = [one.cost for one in results], [one.ttft_p95_s or 0.0 for one in results]
    x = Axis(0.0, max(costs, default=1.0) * 1.15, MARGIN, WIDTH - 2 * MARGIN)
    y = Axis(0.0, max(waits, default=1.0) * 1.1, HEIGHT + 30, -HEIGHT + 20)
    marks = []
    for number, (one, cost, wait) in enumerate(zip(results, costs, waits, strict=True)):
        colour = COLOURS[number % len(COLOURS)]
        fill = PAPER if comparison.broken[one.plan] else colour
        radius = 8 if one.plan == comparison.cheapest else 5
        marks.append(
            f'<circle cx="{x.at(cost):.1f}" cy="{y.at(wait):.1f}" r="{radius}" fill="{fill}" stroke="{colour}" '
            f'stroke-width="2"/>' + _text(x.at(cost) + 10, y.at(wait) + 4, one.plan)
        )
    title = "cost and p95 of the time to first token, s (hollow: breaks a limit; large: the cheapest that keeps all)"
    return "\n".join([_frame(x, y, title), *marks])


def _panel(result: Result, name: str, title: str, unit: float, top: float) -> str:
    """Draw one figure of a fleet over time."""
    times, values = result.series["at_s"], [value * unit for value in result.series[name]]
    x = Axis(times[0], times[-1], MARGIN, WIDTH - 2 * MARGIN)
    y = Axis(0.0, max(*values, 0.0) * 1.1 or 1.0, top + SMALL_HEIGHT, -SMALL_HEIGHT)
    return _frame(x, y, title + ", by seconds") + _steps(x, y, times, values)


def _steps(x: Axis, y: Axis, times: Items[float], values: Items[float]) -> str:
    points = [f"M{x.at(times[0]):.1f},{y.at(values[0]):.1f}"]
    for at, value in zip(times[1:], values[1:], strict=True):
        points.append(f"H{x.at(at):.1f}V{y.at(value):.1f}")
    return f'<path d="{"".join(points)}" fill="none" stroke="{COLOURS[0]}" stroke-width="1.5"/>'


def _frame(x: Axis, y: Axis, title: str) -> str:
    lines = [_text(x.start, y.start + y.length - 10, title)]
    for value in x.ticks():
        lines.append(_text(x.at(value), y.start + 16, f"{value:g}", "middle"))
    for value in y.ticks():
        at = y.at(value)
        lines.append(f'<path d="M{x.start:.1f},{at:.1f}h{x.length:.1f}" stroke="{GRID}"/>')
        lines.append(_text(x.start - 6, at + 4, f"{value:g}", "end"))
    return "\n".join(lines)


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{INK}">{escape(text)}</text>'


def _round_step(span: float) -> float:
    raw = span / 5
    power = 10.0 ** floor(log10(raw))
    return float(next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw - 1e-12))
