"""Simulated time: what is to happen, in order. What is due at the same instant happens in the order it was noted."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from typing import Any


class Agenda:
    """``now`` is the simulated instant in seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self.num_done = 0
        self._due: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._due)

    def clock(self) -> float:
        return self.now

    def at(self, instant_s: float, callback: Callable[..., object], *arguments: Any) -> None:
        """Have something happen then; what is due in the past happens now."""
        heappush(self._due, (instant_s, next(self._numbers), callback, arguments))

    def soon(self, callback: Callable[[], object]) -> None:
        """Have something happen at this instant, behind what is noted for it already."""
        self.at(self.now, callback)

    def stop(self) -> None:
        """Let nothing more happen."""
        self._due.clear()

    def run(self) -> None:
        """Let everything happen until nothing is left."""
        due = self._due
        while due:
            instant_s, _, callback, arguments = heappop(due)
            if instant_s > self.now:
                self.now = instant_s
            self.num_done += 1
            callback(*arguments)
