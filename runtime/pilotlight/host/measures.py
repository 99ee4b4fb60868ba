"""What a function's past says about its next requests: rates and durations, each an exponential mean."""

from __future__ import annotations

WEIGHT = 0.2
ARRIVAL_MEMORY_S = 30.0


class Measures:
    """Fed by the pool as things happen; 0 means not measured yet. Instants are monotonic seconds."""

    def __init__(self, start_s: float = 1.0) -> None:
        self.prefill_tokens_per_s = 0.0
        self.service_s = 0.0
        self.start_s = start_s
        self._arrivals = 0.0
        self._arrived_at = 0.0

    def arrived(self, now: float) -> None:
        self._arrivals = self._decayed(now) + 1.0
        self._arrived_at = now

    def arrivals_per_s(self, now: float) -> float:
        return self._decayed(now) / ARRIVAL_MEMORY_S

    def prefilled(self, num_tokens: int, duration_s: float) -> None:
        if duration_s > 0:
            self.prefill_tokens_per_s = _mean(self.prefill_tokens_per_s, num_tokens / duration_s)

    def served(self, duration_s: float) -> None:
        self.service_s = _mean(self.service_s, duration_s)

    def started(self, duration_s: float) -> None:
        self.start_s = _mean(self.start_s, duration_s)

    def _decayed(self, now: float) -> float:
        return float(self._arrivals * 2.0 ** (-(now - self._arrived_at) / ARRIVAL_MEMORY_S * 1.4427))


def _mean(mean: float, value: float) -> float:
    return value if mean == 0.0 else mean + WEIGHT * (value - mean)
