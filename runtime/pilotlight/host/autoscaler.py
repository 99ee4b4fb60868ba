"""How many replicas a function should have. Pure: a load and a policy in, a number out; no clock, no I/O.

Scaling is on tokens and time, not on requests: what counts is how long the next request would wait, against how long
it takes until another replica could help.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from pilotlight.config import FunctionSettings

HEADROOM = 1.2
"""Arrivals come in bursts: keep a fifth more than their mean needs."""

FULL_KV_RATIO = 0.9


class Sleep(StrEnum):
    """How far a function is asleep. ``LIGHT`` keeps a template to fork from, ``DEEP`` keeps nothing."""

    AWAKE = "awake"
    LIGHT = "light"
    DEEP = "deep"


@dataclass(frozen=True, slots=True)
class Policy:
    """What the configuration asks for."""

    num_slots: int
    min_replicas: int = 0
    max_replicas: int = 1
    idle_timeout_s: float = 300.0
    scale_in_after_s: float = 60.0
    target_wait_s: float = 2.0
    sleep: Sleep = Sleep.LIGHT
    light_timeout_s: float = 3600.0

    @classmethod
    def from_settings(cls, settings: FunctionSettings, num_slots: int) -> Policy:
        """Return what a function's settings ask, for replicas of so many slots."""
        return cls(
            num_slots=num_slots,
            min_replicas=settings.min_replicas,
            max_replicas=max(settings.max_replicas, settings.min_replicas),
            idle_timeout_s=settings.idle_timeout_s,
            sleep=Sleep(settings.sleep),
            light_timeout_s=settings.light_timeout_s,
        )


@dataclass(frozen=True, slots=True)
class Load:
    """A function's load at one instant.

    ``num_replicas`` counts those that are ready or starting. ``backlog_tokens`` are prompt tokens which wait to be
    computed. ``idle_s`` is the time since the last sequence ended, 0 while there is one; ``surplus_s`` the time since
    fewer replicas would have done. Rates and durations are measured; 0 where nothing was measured yet.
    """

    num_replicas: int = 0
    num_waiting: int = 0
    num_running: int = 0
    backlog_tokens: int = 0
    prefill_tokens_per_s: float = 0.0
    service_s: float = 0.0
    arrivals_per_s: float = 0.0
    oldest_wait_s: float = 0.0
    kv_used_ratio: float = 0.0
    start_s: float = 1.0
    idle_s: float = 0.0
    surplus_s: float = 0.0


def wanted_replicas(load: Load, policy: Policy) -> int:
    """Return how many replicas there should be now."""
    needed = needed_replicas(load, policy)
    if needed >= load.num_replicas:
        return needed
    if load.num_waiting + load.num_running == 0:
        return policy.min_replicas if load.idle_s >= policy.idle_timeout_s else load.num_replicas
    return needed if load.surplus_s >= policy.scale_in_after_s else load.num_replicas


def needed_replicas(load: Load, policy: Policy) -> int:
    """Return how many replicas this load needs, however many there are."""
    if load.num_waiting + load.num_running == 0:
        return _within(policy, 0)
    bearable_s = max(policy.target_wait_s, load.start_s)
    needed = max(1, _for_arrivals(load, policy))
    while needed < policy.max_replicas and predicted_wait_s(load, policy, needed) > bearable_s:
        needed += 1
    if load.num_waiting and needed == load.num_replicas:
        crowded = load.kv_used_ratio >= FULL_KV_RATIO or load.oldest_wait_s > 2 * bearable_s
        needed += crowded
    return _within(policy, needed)


def predicted_wait_s(load: Load, policy: Policy, num_replicas: int) -> float:
    """Return how long a request that comes now would wait for its first token's turn."""
    prefill_s = _quotient(load.backlog_tokens, load.prefill_tokens_per_s * num_replicas)
    num_slots = policy.num_slots * num_replicas
    num_queued = load.num_waiting + load.num_running - num_slots
    slots_s = max(0, num_queued) * load.service_s / num_slots
    return prefill_s + slots_s


def sleep_of(policy: Policy, num_replicas: int, idle_s: float) -> Sleep:
    """Return how far a function with so many replicas, idle for so long, should be asleep."""
    if num_replicas:
        return Sleep.AWAKE
    if policy.sleep is Sleep.DEEP or idle_s >= policy.idle_timeout_s + policy.light_timeout_s:
        return Sleep.DEEP
    return Sleep.LIGHT


def _for_arrivals(load: Load, policy: Policy) -> int:
    """Return how many replicas the mean arrivals keep busy (Little's law), but at most those there are."""
    mean_running = load.arrivals_per_s * load.service_s * HEADROOM
    return min(math.ceil(mean_running / policy.num_slots), max(1, load.num_replicas))


def _within(policy: Policy, number: int) -> int:
    return max(policy.min_replicas, min(number, policy.max_replicas))


def _quotient(tokens: float, tokens_per_s: float) -> float:
    return tokens / tokens_per_s if tokens_per_s > 0 else 0.0
