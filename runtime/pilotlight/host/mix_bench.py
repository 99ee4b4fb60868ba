"""How much longer a decode run takes behind a prompt's, in an engine that reads prompts between its answers' steps."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

from pilotlight.engine.engine import Engine, Event
from pilotlight.engine.pace import DecodeGraph
from pilotlight.engine.policy import Policy
from pilotlight.engine.session import OnnxSession, Session
from pilotlight.host.rates import StepRates
from pilotlight.host.step_times import StepTimes
from pilotlight.request import SamplingParams, Sequence

NUM_SEQUENCES = 48
NUM_LEAST, PROMPTS_S = 8, 10.0
"""Where the prompts would take longer than that, there are fewer, but so many at least."""

MAX_NEW_TOKENS = 40
VOCABULARY = range(3, 400)


@dataclass
class _Tally:
    """How long runs of one kind took, and how long they were to take."""

    found_s: float = 0.0
    expected_s: float = 0.0

    @property
    def factor(self) -> float:
        return self.found_s / self.expected_s if self.expected_s else 1.0


class _Tallied:
    """A session which notes how long its prompts took, and the decode runs right behind them."""

    def __init__(self, session: OnnxSession, times: StepTimes) -> None:
        self._session, self._times = session, times
        self._has_prefilled = False
        self.prompts, self.behind_prompts = _Tally(), _Tally()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def prefill(self, slot: int, token_ids: Any, past_tokens: int) -> Any:
        logits = self._session.prefill(slot, token_ids, past_tokens)
        self._note(self.prompts, self._times.prefill_s(len(token_ids), past_tokens))
        self._has_prefilled = True
        return logits

    def decode(self, token_ids: Any, past_tokens: Any, graph: DecodeGraph = DecodeGraph.MAIN) -> Any:
        logits = self._session.decode(token_ids, past_tokens, graph)
        if self._has_prefilled:
            self._note(self.behind_prompts, self._times.decode_s(graph, len(token_ids), float(past_tokens.mean())))
        self._has_prefilled = False
        return logits

    def _note(self, tally: _Tally, expected_s: float) -> None:
        tally.found_s += self._session.run_s
        tally.expected_s += expected_s


def after_prefill_factor(session: OnnxSession, rates: StepRates, max_context_tokens: int) -> float:
    """Return how many times as long decode runs behind a prompt's take.

    The prompts beside them say how quick the processor was meanwhile.
    """
    times = StepTimes(rates)
    tallied, mix = _Tallied(session, times), _within(PROMPTS_S, _mix(max_context_tokens), times)
    ended = threading.Semaphore(0)

    def emit(events: list[Event]) -> None:
        for _ in (event for _, event in events if event.finish is not None):
            ended.release()

    engine = Engine(cast(Session, tallied), emit, Policy())
    engine.start()
    try:
        for sequence in mix:
            engine.submit(sequence)
        for _ in mix:
            ended.acquire()
    finally:
        engine.close()
    return max(1.0, tallied.behind_prompts.factor / tallied.prompts.factor)


def _within(prompts_s: float, mix: list[Sequence], times: StepTimes) -> list[Sequence]:
    """Return as many of the first sequences as have their prompts read in so many seconds."""
    taken_s = accumulate(times.prefill_s(len(one.prompt_ids), 0) for one in mix)
    return mix[: max(NUM_LEAST, sum(seconds <= prompts_s for seconds in taken_s))]


def _mix(max_context_tokens: int) -> list[Sequence]:
    rng = random.Random(0)
    longest = max_context_tokens - MAX_NEW_TOKENS
    lengths = [(rng.randint(4, longest), rng.randint(1, MAX_NEW_TOKENS)) for _ in range(NUM_SEQUENCES)]
    return [
        Sequence(
            str(number), tuple(rng.choices(VOCABULARY, k=length)), num_new, sampling=SamplingParams(temperature=0.0)
        )
        for number, (length, num_new) in enumerate(lengths)
    ]
