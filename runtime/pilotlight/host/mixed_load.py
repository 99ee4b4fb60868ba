"""A load as functions have it, for measuring what serving adds: requests of all lengths, now and then. Pure.

A processor that computes without a pause is quicker than one that is asked now and then, by a third on some machines,
and changes its speed every few seconds. What a replica's work takes is therefore found where it will be done: in a
server, among pauses and other requests, over many seconds.
"""

from __future__ import annotations

import random
import statistics
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pilotlight.engine.pace import DecodeGraph, Pace
from pilotlight.engine.profile import PROMPT_TOKENS
from pilotlight.host.rates import HostRates, StepRates
from pilotlight.host.step_times import StepTimes

BUSY_SHARE = 0.3
"""What part of the time the replica is to work."""

LONGEST_PROMPT, LONGEST_ANSWER = 256, 32
DURATION_S = 8.0
NUM_LEAST, NUM_MOST = 12, 120
LEFT_OUT = 0.1
"""Of the smallest and of the largest values each, so that one hiccup says nothing about a hundred requests."""


@dataclass(frozen=True)
class Speeds:
    """The session's own speed, as a replica begins and as it goes on."""

    lean: StepRates
    whole: StepRates

    @cached_property
    def _lean_times(self) -> StepTimes:
        return StepTimes(self.lean)

    @cached_property
    def _times(self) -> StepTimes:
        return StepTimes(self.whole)

    def prompt_ms(self, num_tokens: int) -> float:
        """Return what the engine takes for a prompt, read in one chunk."""
        return 1000 * (self._times.prefill_s(num_tokens, 0) + self._times.overhead_s(1))

    def first_prompt_ms(self, num_tokens: int) -> float:
        """Return the same for a replica that has just begun, but for its being cold."""
        return 1000 * (self._lean_times.prefill_s(num_tokens, 0) + self._lean_times.overhead_s(1))

    def lean_step_ms(self, num_context_tokens: float, host: HostRates) -> float:
        """Return what a replica that has just begun takes in a host for a decode step of one stream behind so many
        tokens, if nothing is beside it.
        """
        times = StepTimes(self.lean, host=host)
        return 1000 * (times.decode_s(DecodeGraph.MAIN, 1, num_context_tokens) + times.overhead_s(1))

    def step_ms(self, num_rows: int, num_context_tokens: float = PROMPT_TOKENS) -> float:
        """Return what the engine takes for a decode step behind so many tokens."""
        graph = Pace(has_batch_graph="batch" in self._times.decode_lines).graph_for(num_rows)
        return 1000 * (self._times.decode_s(graph, num_rows, num_context_tokens) + self._times.overhead_s(num_rows))


@dataclass(frozen=True)
class Asked:
    """A request that is to come at an instant."""

    at_s: float
    num_prompt_tokens: int
    num_new_tokens: int


@dataclass(frozen=True)
class Answer:
    """One stream: how long, when it was asked for and had ended, milliseconds to its first piece, its usage record."""

    num_prompt_tokens: int
    num_new_tokens: int
    sent_at: float
    first_ms: float
    ended_at: float
    record: dict[str, Any]

    @property
    def beside_ms(self) -> float:
        """What of the time to the first token was not the prompt's."""
        return float(self.first_ms - self.record["prefill_ms"])


def mixed_load(speeds: Speeds, max_context_tokens: int, rng: random.Random) -> list[Asked]:
    """Return requests at random instants which keep a replica busy for ``BUSY_SHARE`` of the time."""
    longest = min(LONGEST_PROMPT, max_context_tokens - LONGEST_ANSWER)
    work_ms = speeds.prompt_ms(longest // 2) + LONGEST_ANSWER / 2 * speeds.step_ms(1)
    gap_s = work_ms / 1000 / BUSY_SHARE
    at_s, found = 0.0, []
    for _ in range(max(NUM_LEAST, min(NUM_MOST, round(DURATION_S / gap_s)))):
        at_s += rng.expovariate(1 / gap_s)
        found.append(Asked(at_s, rng.randint(8, longest), rng.randint(1, LONGEST_ANSWER)))
    return found


@dataclass(frozen=True)
class MixFindings:
    """What served requests took beside what the session alone would have."""

    prefill_factor: float
    idle_prefill_factor: float
    request_ms: float
    prompt_token_ms: float
    step_ms: float

    @classmethod
    def of(cls, answers: list[Answer], speeds: Speeds) -> MixFindings:
        """Compare answers with the session's own speed.

        A request came to an idle replica if every earlier one had ended, and ran alone if none came meanwhile.
        """
        idle = [one for one in answers if not any(_overlap(one, other) for other in _before(answers, one))]
        busy = [one for one in answers if one not in idle] or idle
        alone = [one for one in idle if not any(_overlap(one, other) for other in answers if other is not one)] or idle
        request_ms, prompt_token_ms = _line([(one.num_prompt_tokens, one.beside_ms) for one in idle])
        return cls(
            _prefill_factor(busy, speeds), _prefill_factor(idle, speeds), request_ms, prompt_token_ms,
            level([_slower_ms(one, speeds) for one in alone if one.num_new_tokens > 1]),
        )  # fmt: skip


def level(values: list[float]) -> float:
    """Return the mean of all but the extremes; 0 of none."""
    num_left_out = int(len(values) * LEFT_OUT)
    kept = sorted(values)[num_left_out : len(values) - num_left_out]
    return statistics.fmean(kept) if kept else 0.0


def _before(answers: list[Answer], one: Answer) -> list[Answer]:
    return [other for other in answers if other.sent_at < one.sent_at]


def _overlap(one: Answer, other: Answer) -> bool:
    return one.sent_at < other.ended_at and other.sent_at < one.ended_at


def _prefill_factor(answers: list[Answer], speeds: Speeds) -> float:
    return level([one.record["prefill_ms"] / speeds.prompt_ms(one.num_prompt_tokens) for one in answers]) or 1.0


def _slower_ms(one: Answer, speeds: Speeds) -> float:
    """Return how much longer an answer's mean step took than the session's own."""
    num_steps = one.num_new_tokens - 1
    return float(
        one.record["decode_ms"] / num_steps - speeds.step_ms(1, one.num_prompt_tokens + one.num_new_tokens / 2)
    )


def _line(points: list[tuple[int, float]]) -> tuple[float, float]:
    """Return milliseconds at no tokens and for each token, the second of them not below zero."""
    if len(points) < 2 or len({number for number, _ in points}) < 2:
        return level([value for _, value in points]), 0.0
    middle = statistics.median(number for number, _ in points)
    short, long = ([point for point in points if (point[0] > middle) is side] for side in (False, True))
    if not long:
        return level([value for _, value in points]), 0.0
    (x, y), (u, v) = (
        (statistics.fmean(number for number, _ in half), level([value for _, value in half])) for half in (short, long)
    )
    slope = max(0.0, (v - y) / (u - x))
    return max(0.0, (y + v) / 2 - slope * (x + u) / 2), slope
