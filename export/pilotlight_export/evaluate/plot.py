"""An evaluation as a picture: what each megabyte buys in quality, speed and memory. Plain SVG, no library."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import cycle

from pilotlight_export.evaluate.figures import Row, Spread

PANEL_WIDTH, PANEL_HEIGHT = 360, 300
LEFT, TOP, GAP, RIGHT, BOTTOM = 70, 56, 90, 40, 56
COLOURS = ("#2563a8", "#b4541a", "#2c7d4f", "#8a3d8f", "#6b6b1f", "#9c2f3f")
NUM_TICKS = 5

Value = Callable[[Row], Spread]


@dataclass(frozen=True)
class _Axis:
    """A range of values along so many pixels, padded, with round ticks."""

    low: float
    high: float
    step: float

    def place(self, value: float, length: float) -> float:
        return (value - self.low) / (self.high - self.low) * length

    @property
    def ticks(self) -> list[float]:
        count = round((self.high - self.low) / self.step)
        return [self.low + index * self.step for index in range(count + 1)]


def plot(rows: Sequence[Row]) -> str:
    """Draw quality, decode speed and memory over size."""
    titles: list[tuple[str, Value]] = [
        _quality(rows),
        ("Decoded tokens per second (more is better)", lambda row: row.decode_tps),
        ("Memory of a process, MB (less is better)", lambda row: _exact(row.memory_mb)),
    ]
    width = LEFT + len(titles) * PANEL_WIDTH + (len(titles) - 1) * GAP + RIGHT
    height = TOP + PANEL_HEIGHT + BOTTOM
    colours = dict(zip(dict.fromkeys(row.model for row in rows), cycle(COLOURS), strict=False))
    panels = [
        _panel(rows, colours, LEFT + index * (PANEL_WIDTH + GAP), title, value)
        for index, (title, value) in enumerate(titles)
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="12">\n'
        f'<rect width="{width}" height="{height}" fill="white"/>\n' + "\n".join(panels) + "\n</svg>\n"
    )


def _quality(rows: Sequence[Row]) -> tuple[str, Value]:
    """Choose what can be compared: divergence within a model, bits per byte between models."""
    if len({row.model for row in rows}) == 1:
        return f"Mean KL from {rows[0].compared_with}, nats (less is better)", lambda row: _exact(row.mean_kl)
    return "Bits per byte of text (less is better)", lambda row: _exact(row.bits_per_byte)


def _exact(value: float) -> Spread:
    return Spread(value, value, value)


def _panel(rows: Sequence[Row], colours: dict[str, str], left: float, title: str, value: Value) -> str:
    x_axis = _axis([0.0, *(row.size_mb for row in rows)])
    y_axis = _axis([number for row in rows for number in (value(row).least, value(row).most)])
    parts = [f'<text x="{left}" y="{TOP - 24}" font-size="14" font-weight="600">{escape(title)}</text>']
    parts += [_column(left + x_axis.place(tick, PANEL_WIDTH), tick) for tick in x_axis.ticks]
    parts += [_line(left, _height(y_axis, tick), tick) for tick in y_axis.ticks]
    parts.append(_text(left + PANEL_WIDTH / 2, TOP + PANEL_HEIGHT + 42, "Size of the artifact, MB", "middle"))
    for row in sorted(rows, key=lambda row: row.size_mb):
        x = left + x_axis.place(row.size_mb, PANEL_WIDTH)
        parts.append(_point(x, y_axis, value(row), colours[row.model], row.name, left + PANEL_WIDTH))
    return "\n".join(parts)


def _point(x: float, y_axis: _Axis, spread: Spread, colour: str, name: str, edge: float) -> str:
    y, top, bottom = (_height(y_axis, number) for number in (spread.median, spread.most, spread.least))
    is_near_edge = x > edge - 100
    label = _text(x - 9 if is_near_edge else x + 9, y - 7, name, "end" if is_near_edge else "start")
    return (
        f'<line x1="{x:.1f}" y1="{top:.1f}" x2="{x:.1f}" y2="{bottom:.1f}" stroke="{colour}" stroke-width="2"/>'
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>{label}'
    )


def _column(x: float, tick: float) -> str:
    bottom = TOP + PANEL_HEIGHT
    line = f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom}" stroke="#e8e8e8"/>'
    return line + _text(x, bottom + 20, f"{tick:,.6g}", "middle")


def _line(left: float, y: float, tick: float) -> str:
    line = f'<line x1="{left}" y1="{y:.1f}" x2="{left + PANEL_WIDTH}" y2="{y:.1f}" stroke="#e8e8e8"/>'
    return line + _text(left - 8, y + 4, f"{tick:,.6g}", "end")


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#333">{escape(text)}</text>'


def _height(axis: _Axis, value: float) -> float:
    return TOP + PANEL_HEIGHT - axis.place(value, PANEL_HEIGHT)


def _axis(values: Sequence[float]) -> _Axis:
    """Choose ticks at 1, 2 or 5 times a power of ten that enclose all values."""
    span = max(values) - min(values) or abs(values[0]) or 1.0
    power = 10.0 ** math.floor(math.log10(span / NUM_TICKS))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power * NUM_TICKS >= span)
    low = math.floor(min(values) / step) * step
    high = math.ceil(max(values) / step) * step
    return _Axis(low, high if high > low else low + step, step)
