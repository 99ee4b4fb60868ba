"""Where the time of an engine's steps goes: one stage at a time, so that the stages add up to all of it."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Protocol


class Timeline(Protocol):
    """Told by the engine's thread what it does from now on."""

    def enter(self, stage: str) -> None:
        """End the stage before, and begin this one."""

    def attribute(self, stage: str, seconds: float) -> None:
        """Count part of the present stage as another's."""


class NoTimeline:
    """For engines whose time nobody asks about."""

    def enter(self, stage: str) -> None:
        pass

    def attribute(self, stage: str, seconds: float) -> None:
        pass


class StageTimes:
    """Seconds by stage, between ``start`` and ``stop``."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.wall_s = 0.0
        self._running = False
        self._stage = ""
        self._since = self._started_at = 0.0

    def start(self) -> None:
        self._running = True
        self._since = self._started_at = time.perf_counter()

    def stop(self) -> None:
        self.enter("")
        self.wall_s = self._since - self._started_at
        self._running = False

    def enter(self, stage: str) -> None:
        now = time.perf_counter()
        if self._running:
            self.seconds[self._stage] += now - self._since
        self._stage, self._since = stage, now

    def attribute(self, stage: str, seconds: float) -> None:
        if self._running:
            self.seconds[stage] += seconds
            self.seconds[self._stage] -= seconds


NO_TIMELINE = NoTimeline()
