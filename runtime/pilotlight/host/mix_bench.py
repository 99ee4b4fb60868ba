"""What a mix of prompts and answers takes more than its parts, measured one by one, would take together."""

from __future__ import annotations

import random
import threading
from typing import Any, cast

from pilotlight.engine.engine import Engine, Event
from pilotlight.engine.pace import DecodeGraph
from pilotlight.engine.policy import Policy
from pilotlight.engine.session import OnnxSession, Session
from pilotlight.host.rates import StepRates
from pilotlight.host.step_times import StepTimes
from pilotlight.request import SamplingParams, Sequence

NUM_SEQUENCES = 48
MAX_NEW_TOKENS = 40
VOCABULARY = range(3, 400)


class _Tallied:
    """A session which notes how long its runs took, and how long they were to take."""

    def __init__(self, session: OnnxSession, times: StepTimes) -> None:
        self._session, self._times = session, times
        self.found_s = self.expected_s = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def prefill(self, slot: int, token_ids: Any, past_tokens: int) -> Any:
        logits = self._session.prefill(slot, token_ids, past_tokens)
        self._note(self._times.prefill_s(len(token_ids), past_tokens))
        return logits

    def decode(self, token_ids: Any, past_tokens: Any, graph: DecodeGraph = DecodeGraph.MAIN) -> Any:
        logits = self._session.decode(token_ids, past_tokens, graph)
        self._note(self._times.decode_s(graph, len(token_ids), float(past_tokens.mean())))
        return logits

    def _note(self, expected_s: float) -> None:
        self.found_s += self._session.run_s
        self.expected_s += expected_s


def mix_factor(session: OnnxSession, rates: StepRates, max_context_tokens: int) -> float:
    """Return how many times as long as expected the runs of a busy engine take, prompts and answers of all lengths."""
    tallied = _Tallied(session, StepTimes(rates))
    ended = threading.Semaphore(0)

    def emit(events: list[Event]) -> None:
        for _ in (event for _, event in events if event.finish is not None):
            ended.release()

    engine = Engine(cast(Session, tallied), emit, Policy())
    engine.start()
    try:
        for sequence in _mix(max_context_tokens):
            engine.submit(sequence)
        for _ in range(NUM_SEQUENCES):
            ended.acquire()
    finally:
        engine.close()
    return tallied.found_s / tallied.expected_s


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
