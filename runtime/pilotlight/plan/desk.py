"""The host's event loop as a queue: it takes requests in and hands tokens out, one thing after another.

Work is a fluid. Tokens that stream are work at a rate, requests and first tokens are work at once, and whoever comes
waits for what is in front. With a large model the loop is idle nearly all the time; with a small one it may be full.
"""

from __future__ import annotations

from pilotlight.host.rates import HostRates
from pilotlight.plan.agenda import Agenda

INTAKE_SHARE = 0.5
"""Of the work for a request, what comes before its replica hears of it; the rest is its record, at the end."""


class Desk:
    """One host's event loop."""

    def __init__(self, rates: HostRates, agenda: Agenda, factor: float = 1.0) -> None:
        self._agenda = agenda
        self._rates = rates
        self._token_s = rates.token_busy_ms / 1000 / factor
        self._request_s = rates.request_busy_ms / 1000 / factor
        self._factor = factor
        self._backlog_s = 0.0
        self._at = 0.0
        self._tokens_per_s = 0.0
        self._worked_s = 0.0

    @property
    def worked_s(self) -> float:
        """Return for how long the loop has worked, or is about to, since the beginning."""
        self._advance()
        return self._worked_s

    @property
    def crowding(self) -> float:
        """How many seconds longer a replica takes for each second in which the loop works."""
        return max(0.0, self._rates.crowded_factor - 1.0)

    def take_in(self, num_prompt_tokens: int) -> float:
        """Return after how many seconds a request that comes now is with the pool."""
        wait_s = self._wait_s()
        self._add(self._request_s * INTAKE_SHARE)
        own_ms = self._rates.request_ms + self._rates.prompt_token_ms * num_prompt_tokens
        return wait_s + own_ms / 1000 / self._factor

    def hand_out(self, num_events: int, num_ended: int) -> float:
        """Return after how many seconds events that come now are with the pool and the clients."""
        if not self._token_s:
            return 0.0
        wait_s = self._wait_s()
        self._add(num_events * self._token_s + num_ended * self._request_s * (1 - INTAKE_SHARE))
        return wait_s

    def stream(self, tokens_per_s: float) -> None:
        """Have so many more tokens a second stream from now on, or fewer."""
        self._advance()
        self._tokens_per_s += tokens_per_s

    def _wait_s(self) -> float:
        self._advance()
        return self._backlog_s

    def _add(self, work_s: float) -> None:
        self._backlog_s += work_s
        self._worked_s += work_s

    def _advance(self) -> None:
        passed_s, self._at = self._agenda.now - self._at, self._agenda.now
        streaming = self._tokens_per_s * self._token_s
        self._worked_s += streaming * passed_s
        self._backlog_s = max(0.0, self._backlog_s + (streaming - 1.0) * passed_s)
