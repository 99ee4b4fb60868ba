"""What became of each request, and what the fleet looked like over time."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from math import ceil, nan
from typing import NamedTuple

from pilotlight.plan.agenda import Agenda
from pilotlight.plan.engine import Event
from pilotlight.request import TokenEvent

NUM_SAMPLES = 300
STAGES = ("host", "wait", "prefill", "decode")
"""The host's share of the time to a first token, the wait for a replica and in its queue, the prompt, the rest."""


class Sample(NamedTuple):
    """A fleet at one instant."""

    at_s: float
    num_replicas: int
    num_starting: int
    num_queued: int
    num_running: int
    num_slots: int
    memory_bytes: int
    kv_used_bytes: int


@dataclass(slots=True)
class Outcomes:
    """By request, in the trace's order: when it came, its first token, its end; NaN where there was none."""

    agenda: Agenda
    came_at: array[float] = field(default_factory=lambda: array("d"))
    first_at: array[float] = field(default_factory=lambda: array("d"))
    ended_at: array[float] = field(default_factory=lambda: array("d"))
    entered_at: array[float] = field(default_factory=lambda: array("d"))
    stages_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    num_refused: int = 0
    num_failed: int = 0
    num_waited_for_start: int = 0
    num_open: int = 0
    samples: list[Sample] = field(default_factory=list)

    def came(self, at_s: float) -> None:
        self.came_at.append(at_s)
        self.first_at.append(nan)
        self.ended_at.append(nan)
        self.entered_at.append(at_s)
        self.num_open += 1

    def entered(self, number: int) -> None:
        """Note that a request is with the pool, or with what stands for one."""
        self.entered_at[number] = self.agenda.now

    def refused(self) -> None:
        self.num_refused += 1
        self.num_open -= 1

    def failed(self) -> None:
        self.num_failed += 1
        self.num_open -= 1

    def observe(self, events: list[Event]) -> None:
        """Note first tokens and ends."""
        now = self.agenda.now
        for name, event in events:
            number = int(name)
            if self.first_at[number] != self.first_at[number]:
                self.first_at[number] = now
                self._note_first(number, event)
            if event.finish is not None:
                self.ended_at[number] = now
                self.stages_s["decode"] += now - self.first_at[number]
                self.num_open -= 1

    def ttft_s(self) -> list[float]:
        """Return the times to first token of those that were served, the shortest first."""
        waits = (first - came for came, first in zip(self.came_at, self.first_at, strict=True))
        return sorted(wait for wait in waits if wait == wait)

    def mean_stages_s(self) -> dict[str, float]:
        """Return how long a served request was in each stage."""
        return {name: seconds / max(1, self.num_served) for name, seconds in self.stages_s.items()}

    def _note_first(self, number: int, event: TokenEvent) -> None:
        entered_at, stages = self.entered_at[number], self.stages_s
        began_at = entered_at if event.prefill_started_at is None else event.prefill_started_at
        stages["wait"] += began_at - entered_at
        stages["prefill"] += event.at - began_at
        stages["host"] += self.agenda.now - self.came_at[number] - (event.at - entered_at)

    @property
    def num_served(self) -> int:
        return sum(1 for ended in self.ended_at if ended == ended)


def percentile(ordered: list[float], share: float) -> float:
    """Return the smallest value that so large a share of the ordered ones does not exceed; NaN of none."""
    return ordered[max(0, ceil(share * len(ordered)) - 1)] if ordered else nan
