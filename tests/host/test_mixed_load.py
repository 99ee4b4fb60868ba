"""What serving adds is read off a mixture of requests."""

from __future__ import annotations

import random

import pytest

from pilotlight.host.mixed_load import BUSY_SHARE, Answer, MixFindings, Speeds, level, mixed_load
from planning import STEPS

SPEEDS = Speeds(STEPS, STEPS)
CONTEXT = 512


def answer(
    at_s: float, num_prompt: int, num_new: int, *, prefill_factor: float, host_ms: float, slower_ms: float = 0.0
) -> Answer:
    """Return what a server would have said that is so much slower than its session."""
    prefill_ms = prefill_factor * SPEEDS.prompt_ms(num_prompt)
    step_ms = SPEEDS.step_ms(1, num_prompt + num_new / 2) + slower_ms
    first_ms, decode_ms = host_ms + prefill_ms, (num_new - 1) * step_ms
    record = {"prefill_ms": prefill_ms, "decode_ms": decode_ms}
    return Answer(num_prompt, num_new, at_s, first_ms, at_s + (first_ms + decode_ms) / 1000, record)


def test_a_load_keeps_a_replica_busy_for_its_share() -> None:
    load = mixed_load(SPEEDS, CONTEXT, random.Random(0))
    work_s = sum(
        SPEEDS.prompt_ms(one.num_prompt_tokens) + one.num_new_tokens * SPEEDS.step_ms(1) for one in load
    ) / 1000  # fmt: skip
    assert work_s / load[-1].at_s == pytest.approx(BUSY_SHARE, rel=0.5)
    assert all(one.num_prompt_tokens + one.num_new_tokens <= CONTEXT for one in load)
    assert [one.at_s for one in load] == sorted(one.at_s for one in load)


def test_lone_requests_say_what_the_host_adds() -> None:
    rng = random.Random(1)
    answers = [
        answer(10.0 * number, size := rng.randint(8, 256), rng.randint(2, 32), prefill_factor=1.3,
               host_ms=4.0 + 0.02 * size, slower_ms=0.25)
        for number in range(40)
    ]  # fmt: skip
    found = MixFindings.of(answers, SPEEDS)
    assert found.idle_prefill_factor == pytest.approx(1.3)
    assert found.step_ms == pytest.approx(0.25)
    assert found.request_ms == pytest.approx(4.0, rel=0.2)
    assert found.prompt_token_ms == pytest.approx(0.02, rel=0.2)


def test_who_comes_while_another_one_runs_is_told_apart() -> None:
    pairs = [
        (answer(10.0 * number, 200, 20, prefill_factor=1.5, host_ms=4.0),
         answer(10.0 * number + 0.001, 100, 5, prefill_factor=1.1, host_ms=400.0, slower_ms=70.0))
        for number in range(20)
    ]  # fmt: skip
    alone = [answer(1000.0 + 10.0 * number, 50, 9, prefill_factor=1.5, host_ms=4.0) for number in range(5)]
    found = MixFindings.of([*(one for both in pairs for one in both), *alone], SPEEDS)
    assert (found.idle_prefill_factor, found.prefill_factor) == pytest.approx((1.5, 1.1))
    assert found.request_ms == pytest.approx(4.0)
    assert found.step_ms == pytest.approx(0.0, abs=1e-9)


def test_answers_of_one_token_have_no_steps() -> None:
    found = MixFindings.of([answer(0.0, 64, 1, prefill_factor=1.0, host_ms=4.0)], SPEEDS)
    assert (found.step_ms, found.prefill_factor) == pytest.approx((0.0, 1.0))


def test_a_hiccup_says_nothing_about_many() -> None:
    assert level([1.0] * 19 + [1000.0]) == 1.0
    assert level([]) == 0.0
