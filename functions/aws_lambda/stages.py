"""How long each stage of a start took."""

from __future__ import annotations

import time


class Stages:
    """Durations in milliseconds by name, each from the end of the one before it."""

    def __init__(self) -> None:
        self._last_at = time.monotonic()
        self.durations_ms: dict[str, float] = {}

    def end(self, name: str) -> None:
        """Note that a stage has ended now."""
        now = time.monotonic()
        self.durations_ms[f"{name}_ms"] = round((now - self._last_at) * 1000, 1)
        self._last_at = now
