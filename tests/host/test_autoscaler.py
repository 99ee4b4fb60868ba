"""How many replicas there should be: by example, and what holds for any load."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotlight.host.autoscaler import (
    Load,
    Policy,
    Sleep,
    needed_replicas,
    predicted_wait_s,
    sleep_of,
    wanted_replicas,
)

POLICY = Policy(num_slots=4, max_replicas=5)

policies = st.builds(
    lambda low, extra, slots, idle, after, wait: Policy(slots, low, low + extra, idle, after, wait),
    st.integers(0, 3),
    st.integers(0, 5),
    st.integers(1, 16),
    st.floats(0, 1000),
    st.floats(0, 100),
    st.floats(0.1, 10),
).filter(lambda policy: policy.max_replicas > 0)
amounts = st.floats(0, 10_000, allow_nan=False)
loads = st.builds(
    Load,
    num_replicas=st.integers(0, 8),
    num_waiting=st.integers(0, 200),
    num_running=st.integers(0, 64),
    backlog_tokens=st.integers(0, 200_000),
    prefill_tokens_per_s=amounts,
    service_s=st.floats(0, 100),
    arrivals_per_s=st.floats(0, 100),
    oldest_wait_s=st.floats(0, 100),
    kv_used_ratio=st.floats(0, 1),
    start_s=st.floats(0.01, 30),
    idle_s=amounts,
    surplus_s=amounts,
)


def test_nothing_asked_nothing_started() -> None:
    assert wanted_replicas(Load(), POLICY) == 0
    assert wanted_replicas(Load(), Policy(4, min_replicas=2, max_replicas=2)) == 2


def test_one_request_wakes_one_replica() -> None:
    assert wanted_replicas(Load(num_waiting=1), POLICY) == 1


def test_prompt_tokens_scale_and_not_requests() -> None:
    few_long = Load(1, num_waiting=4, backlog_tokens=32_000, prefill_tokens_per_s=4_000)
    many_short = Load(1, num_waiting=4, backlog_tokens=400, prefill_tokens_per_s=4_000)
    assert wanted_replicas(few_long, POLICY) == 4
    assert wanted_replicas(many_short, POLICY) == 1


def test_a_start_that_would_help_too_late_is_not_made() -> None:
    load = Load(1, num_waiting=4, backlog_tokens=12_000, prefill_tokens_per_s=4_000)
    assert wanted_replicas(load, POLICY) == 2
    assert wanted_replicas(dataclasses.replace(load, start_s=5.0), POLICY) == 1


def test_taken_slots_scale() -> None:
    load = Load(1, num_waiting=8, num_running=4, service_s=4.0)
    assert predicted_wait_s(load, POLICY, 1) == 8.0
    assert wanted_replicas(load, POLICY) == 2


def test_a_full_cache_with_a_queue_behind_it_needs_one_more() -> None:
    load = Load(1, num_waiting=1, num_running=4)
    assert wanted_replicas(load, POLICY) == 1
    assert wanted_replicas(dataclasses.replace(load, kv_used_ratio=0.95), POLICY) == 2
    assert wanted_replicas(dataclasses.replace(load, oldest_wait_s=9.0), POLICY) == 2


def test_scaling_in_waits() -> None:
    load = Load(3, num_running=1)
    assert wanted_replicas(load, POLICY) == 3
    assert wanted_replicas(dataclasses.replace(load, surplus_s=60.0), POLICY) == 1


def test_steady_arrivals_keep_what_they_need() -> None:
    load = Load(3, num_running=1, arrivals_per_s=2.0, service_s=4.0, surplus_s=1000.0)
    assert wanted_replicas(load, POLICY) == 3, "ten run in the mean, headroom included"


def test_sleep() -> None:
    policy = Policy(4, idle_timeout_s=10, light_timeout_s=100)
    assert sleep_of(policy, 1, 1000) is Sleep.AWAKE
    assert sleep_of(policy, 0, 10) is Sleep.LIGHT
    assert sleep_of(policy, 0, 109) is Sleep.LIGHT
    assert sleep_of(policy, 0, 110) is Sleep.DEEP
    assert sleep_of(dataclasses.replace(policy, sleep=Sleep.DEEP), 0, 0) is Sleep.DEEP


@given(loads, policies)
def test_the_limits_hold(load: Load, policy: Policy) -> None:
    needed = needed_replicas(load, policy)
    assert policy.min_replicas <= needed <= policy.max_replicas
    wanted = wanted_replicas(load, policy)
    assert min(load.num_replicas, policy.min_replicas) <= wanted <= max(load.num_replicas, policy.max_replicas)


@given(loads, policies)
def test_work_is_never_left_without_a_replica(load: Load, policy: Policy) -> None:
    if load.num_waiting + load.num_running:
        assert wanted_replicas(load, policy) >= 1


@given(loads, policies)
def test_nothing_leaves_before_its_time(load: Load, policy: Policy) -> None:
    patient = dataclasses.replace(load, idle_s=0.0, surplus_s=0.0)
    if policy.idle_timeout_s > 0 and policy.scale_in_after_s > 0:
        assert wanted_replicas(patient, policy) >= load.num_replicas


@given(loads, policies, st.integers(0, 100_000))
def test_more_work_never_needs_less(load: Load, policy: Policy, more_tokens: int) -> None:
    heavier = dataclasses.replace(load, backlog_tokens=load.backlog_tokens + more_tokens)
    assert needed_replicas(heavier, policy) >= needed_replicas(load, policy)


@given(loads, policies)
def test_idle_functions_end(load: Load, policy: Policy) -> None:
    idle = dataclasses.replace(load, num_waiting=0, num_running=0, idle_s=policy.idle_timeout_s)
    assert wanted_replicas(idle, policy) == policy.min_replicas


@pytest.mark.parametrize("num_replicas", [1, 2, 5])
def test_more_replicas_mean_less_waiting(num_replicas: int) -> None:
    load = Load(num_waiting=50, num_running=4, backlog_tokens=9000, prefill_tokens_per_s=1000, service_s=3)
    assert predicted_wait_s(load, POLICY, num_replicas + 1) < predicted_wait_s(load, POLICY, num_replicas)
