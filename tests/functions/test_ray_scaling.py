"""Ray Serve's autoscaling by our autoscaler, without Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from ray_scaling import SIGNALS, TokenAwarePolicy, load_of


@dataclass
class Observed:
    """What Serve says of a deployment."""

    target_num_replicas: int = 0
    total_num_requests: float = 0.0
    total_queued_requests: float = 0.0
    aggregated_metrics: Mapping[str, Mapping[Any, float]] | None = None
    policy_state: dict[str, Any] = field(default_factory=dict)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def policy(clock: Clock) -> TokenAwarePolicy:
    return TokenAwarePolicy(clock=clock, num_slots=4, max_replicas=5, idle_timeout_s=60.0, scale_in_after_s=30.0)


def decide(policy: TokenAwarePolicy, observed: Observed) -> int:
    """Ask as Serve does: what it is told to remember, it brings the next time."""
    wanted, observed.policy_state = policy(observed)
    return wanted


def test_nothing_is_kept_for_nobody_and_the_first_request_wakes_one(policy: TokenAwarePolicy) -> None:
    assert decide(policy, Observed()) == 0
    assert decide(policy, Observed(total_num_requests=1, total_queued_requests=1)) == 1


def test_an_idle_function_sleeps_after_its_time_and_not_before(policy: TokenAwarePolicy, clock: Clock) -> None:
    observed = Observed(target_num_replicas=2, total_num_requests=3)
    assert decide(policy, observed) == 2
    observed.total_num_requests = 0
    assert decide(policy, observed) == 2
    clock.now += 59
    assert decide(policy, observed) == 2
    clock.now += 1
    assert decide(policy, observed) == 0


def test_work_in_between_starts_the_idle_time_again(policy: TokenAwarePolicy, clock: Clock) -> None:
    observed = Observed(target_num_replicas=1)
    decide(policy, observed)
    clock.now += 50
    observed.total_num_requests = 1
    decide(policy, observed)
    observed.total_num_requests = 0
    clock.now += 50
    assert decide(policy, observed) == 1


def test_prompt_tokens_count_and_not_requests(policy: TokenAwarePolicy) -> None:
    """Two long prompts need more replicas than two short ones."""
    rates = {"prefill_tokens_per_s": {"a": 1000.0}, "start_s": {"a": 1.0}}
    short = Observed(1, 2, 0, {**rates, "backlog_tokens": {"a": 200.0}})
    long = Observed(1, 2, 0, {**rates, "backlog_tokens": {"a": 8000.0}})
    assert decide(policy, short) == 1
    assert decide(policy, long) == 4


def test_a_queue_before_full_slots_calls_for_more_and_a_surplus_leaves_later(
    policy: TokenAwarePolicy, clock: Clock
) -> None:
    busy = Observed(1, 20, 16, {"service_s": {"a": 4.0}, "start_s": {"a": 1.0}})
    wanted = decide(policy, busy)
    assert wanted > 1
    calm = Observed(wanted, 2, 0, busy.aggregated_metrics, busy.policy_state)
    assert decide(policy, calm) == wanted
    clock.now += 30
    assert decide(policy, calm) == 1


def test_signals_of_replicas_are_added_or_averaged() -> None:
    reported = {
        "backlog_tokens": {"a": 100.0, "b": 50.0},
        "prefill_tokens_per_s": {"a": 0.0, "b": 400.0},
        "service_s": {"a": 1.0, "b": 3.0},
        "kv_used_ratio": {"a": 0.2, "b": 0.9},
    }
    assert reported.keys() <= set(SIGNALS)
    load = load_of(Observed(2, 9.4, 3.2, reported), idle_s=0.0, surplus_s=0.0)
    assert (load.num_replicas, load.num_waiting, load.num_running, load.backlog_tokens) == (2, 3, 6, 150)
    assert (load.prefill_tokens_per_s, load.service_s, load.kv_used_ratio) == (400.0, 2.0, 0.9)
