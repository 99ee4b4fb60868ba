"""When a start may be tried again after others that failed. Pure."""

from __future__ import annotations

MAX_KILLED_STARTS = 8
"""What dies so often in a row while it starts, does so by itself. Fewer can be bad luck: on a busy machine, starts take
longer, and whatever kills replicas hits more of them."""

MAX_BACK_OFF_S = 60.0


class BackOff:
    """The failed starts of a function since the last one that went well. Instants are monotonic seconds."""

    def __init__(self) -> None:
        self.cause = ""
        self._retry_at = 0.0
        self._num_failures = 0
        self._num_killed = 0

    def left_s(self, now: float) -> float:
        """Return how long no start may be tried yet."""
        return max(0.0, self._retry_at - now)

    def failed(self, cause: str, now: float) -> float:
        """Note that a start failed, and why; return for how long none may be tried."""
        back_off_s = min(MAX_BACK_OFF_S, 2.0**self._num_failures)
        self.cause, self._retry_at = cause, now + back_off_s
        self._num_failures += 1
        self._num_killed = 0
        return back_off_s

    def killed(self) -> str | None:
        """Note that a replica died while it started. That is tried again at once, until it is found to be the cause."""
        self._num_killed += 1
        too_often = self._num_killed >= MAX_KILLED_STARTS
        return f"{self._num_killed} replicas in a row died while they started" if too_often else None

    def succeeded(self) -> None:
        self.cause = ""
        self._num_failures = self._num_killed = 0
