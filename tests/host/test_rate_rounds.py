"""Rates are measured in rounds, of which there are fewer where runs take seconds."""

from __future__ import annotations

from itertools import count

import numpy as np
import pytest

from pilotlight.engine import profile
from pilotlight.host.mix_bench import NUM_LEAST, NUM_SEQUENCES, _mix, _within
from pilotlight.host.step_times import StepTimes
from planning import STEPS


class CountedSession:
    """Counts prompts, and takes no time."""

    has_batch_graph = False
    run_s = 0.001

    def __init__(self) -> None:
        self.num_prompts = 0

    def prefill(self, slot: int, token_ids: np.ndarray, past_tokens: int) -> None:
        self.num_prompts += 1


@pytest.mark.parametrize(("clock_step_s", "num_rounds"), [(0.0, 8), (100.0, 2)])
def test_slow_runs_are_measured_once_and_quick_ones_as_often_as_asked(
    monkeypatch: pytest.MonkeyPatch, clock_step_s: float, num_rounds: int
) -> None:
    ticks = count()
    monkeypatch.setattr(profile, "_now_s", lambda: next(ticks) * clock_step_s)
    session = CountedSession()
    assert profile.prefill_times(session, [(16, 0)], 7) == {(16, 0): 0.001}  # type: ignore[arg-type]
    assert session.num_prompts == num_rounds


def test_a_slow_model_reads_fewer_prompts_and_some_at_least() -> None:
    mix, times = _mix(512), StepTimes(STEPS)
    assert len(_within(1e9, mix, times)) == NUM_SEQUENCES
    assert len(_within(0.0, mix, times)) == NUM_LEAST
    some = _within(sum(times.prefill_s(len(one.prompt_ids), 0) for one in mix[:20]) + 1e-9, mix, times)
    assert some == mix[:20]
