"""How long a replica's steps take: measured points, and lines between them. Pure.

A decode step takes ``a + b · context`` for each number of rows, where context is the rows' mean; a prompt's chunk takes
``p`` where it is the first, and ``p' + q · past`` behind others, for each size. Between measured numbers of rows and
sizes everything is linear, and beyond the last it goes on in proportion.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from statistics import fmean

from pilotlight.engine.pace import DecodeGraph
from pilotlight.host.rates import HostRates, StepRates

ALONE = HostRates()
Line = tuple[float, float]
"""Seconds at zero, and seconds more for each token behind it."""


@dataclass(frozen=True, slots=True)
class Lines:
    """One line for each measured number of rows or tokens, in order."""

    at: tuple[int, ...]
    lines: tuple[Line, ...]

    def line(self, number: int) -> Line:
        """Return the line for any number."""
        index = bisect_left(self.at, number)
        if index < len(self.at) and self.at[index] == number:
            return self.lines[index]
        if index == 0:
            return self.lines[0]
        if index == len(self.at):
            share = number / self.at[-1]
            return self.lines[-1][0] * share, self.lines[-1][1] * share
        low, high = self.at[index - 1], self.at[index]
        share = (number - low) / (high - low)
        (a, b), (c, d) = self.lines[index - 1], self.lines[index]
        return a + (c - a) * share, b + (d - b) * share


class StepTimes:
    """Seconds of steps, by what they compute."""

    def __init__(self, rates: StepRates, speed: float = 1.0, host: HostRates = ALONE) -> None:
        """``speed``: how many times as fast the machine is as the measured one. ``host``: what serving adds."""
        self._scale = 0.001 / speed
        self._after_prefill = max(0.0, rates.after_prefill_factor - 1)
        self.decode_lines = {
            graph: _lines([(one.rows, one.context_tokens, one.ms) for one in rates.decode if one.graph == graph])
            for graph in sorted({one.graph for one in rates.decode})
        }
        self._first = _lines([(one.tokens, 0, one.ms) for one in rates.prefill if one.past_tokens == 0])
        behind = [(one.tokens, one.past_tokens, one.ms) for one in rates.prefill if one.past_tokens > 0]
        self._behind = _lines(behind) if behind else self._first
        self._overhead = (rates.step_overhead_ms, rates.row_overhead_ms)
        self._host = host
        self.decode_line = cache(self._decode_line)
        self.first_line = cache(self._first.line)
        self.behind_line = cache(self._behind.line)

    def decode_s(self, graph: DecodeGraph, num_rows: int, context_tokens: float, num_steps: int = 1) -> float:
        """Return the seconds of so many decode steps in a row, the first at a mean context of so many tokens."""
        a, b = self.decode_line(graph, num_rows)
        a = max(a / 2, a + self._host.step_ms + self._host.row_ms * num_rows)
        return _steps(a, b, context_tokens, num_steps) * self._scale

    def after_prefill_s(self, graph: DecodeGraph, num_rows: int, context_tokens: float, num_steps: int = 1) -> float:
        """Return how many seconds longer as many decode steps take where each comes behind a prompt's run."""
        a, b = self.decode_line(graph, num_rows)
        return _steps(a, b, context_tokens, num_steps) * self._after_prefill * self._scale

    def prefill_s(self, chunk_tokens: int, past_tokens: int, num_steps: int = 1) -> float:
        """Return the seconds of so many chunks in a row, the first behind so many tokens."""
        seconds = 0.0
        if past_tokens == 0:
            seconds, past_tokens, num_steps = self.first_line(chunk_tokens)[0], chunk_tokens, num_steps - 1
        p, q = self.behind_line(chunk_tokens)
        seconds += num_steps * (p + q * past_tokens) + q * chunk_tokens * num_steps * (num_steps - 1) / 2
        return seconds * self._scale * self._host.prefill_factor

    @property
    def waking_up(self) -> float:
        """How many times as long a prompt takes a replica that was idle before."""
        return max(1.0, self._host.idle_prefill_factor / self._host.prefill_factor)

    def overhead_s(self, num_rows: int) -> float:
        """Return what a step takes outside the graphs, for so many rows of decode and prefill together."""
        return (self._overhead[0] + self._overhead[1] * num_rows) * self._scale

    def _decode_line(self, graph: DecodeGraph, num_rows: int) -> Line:
        lines = self.decode_lines.get(graph.value) or self.decode_lines[DecodeGraph.MAIN.value]
        return lines.line(num_rows)


def _steps(a: float, b: float, context_tokens: float, num_steps: int) -> float:
    """Return what so many steps in a row take, each of them ``a`` and ``b`` for each token of a context that grows."""
    return num_steps * (a + b * context_tokens) + b * num_steps * (num_steps - 1) / 2


def _lines(points: list[tuple[int, int, float]]) -> Lines:
    by_number: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for number, tokens, ms in points:
        by_number[number].append((tokens, ms))
    numbers = sorted(by_number)
    return Lines(tuple(numbers), tuple(_fit(by_number[number]) for number in numbers))


def _fit(points: Iterable[tuple[int, float]]) -> Line:
    """Return the least-squares line; one that would fall is level, since more tokens are never less work."""
    xs, ys = zip(*points, strict=True)
    x, y = fmean(xs), fmean(ys)
    spread = sum((one - x) ** 2 for one in xs)
    slope = sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / spread if spread else 0.0
    slope = max(0.0, min(slope, y / x if x else 0.0))
    return y - slope * x, slope
