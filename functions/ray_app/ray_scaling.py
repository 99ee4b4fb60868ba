"""Ray Serve's autoscaling by our own autoscaler: what Serve knows of a deployment, as a load. Knows nothing of Ray.

Serve calls an object of ``TokenAwarePolicy`` with its context every now and then and has as many replicas as it says.
The replicas report their signals through ``record_autoscaling_stats``; what waits before them, Serve knows itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import msgspec

import ray_mix
from pilotlight.host.autoscaler import Load, Policy, needed_replicas, wanted_replicas
from pilotlight.host.mix import MixPolicy


class ReplicaSignals(msgspec.Struct, frozen=True):
    """What one replica reports; 0 where nothing was measured yet."""

    num_running: float = 0.0
    backlog_tokens: float = 0.0
    prefill_tokens_per_s: float = 0.0
    service_s: float = 0.0
    kv_used_ratio: float = 0.0
    start_s: float = 0.0
    leaving: float = 0.0
    """1 once its machine is about to be taken away."""


SIGNALS = tuple(field.name for field in msgspec.structs.fields(ReplicaSignals))


class Context(Protocol):
    """What our policy reads of ``ray.serve.config.AutoscalingContext``."""

    @property
    def target_num_replicas(self) -> int:
        """How many replicas there should be by the last decision."""

    @property
    def policy_state(self) -> dict[str, Any]:
        """What the last call wanted remembered."""

    @property
    def total_num_requests(self) -> float:
        """Requests that run or wait."""

    @property
    def total_queued_requests(self) -> float:
        """Requests that wait before the replicas."""

    @property
    def aggregated_metrics(self) -> Mapping[str, Mapping[Any, float]] | None:
        """What the replicas reported, by signal and replica."""


class TokenAwarePolicy:
    """One deployment's autoscaler."""

    def __init__(self, *, clock: Callable[[], float] = time.time, **policy: Any) -> None:
        """Take the fields of ``host.autoscaler.Policy``."""
        self._policy = Policy(**policy)
        self._clock = clock

    def __call__(self, context: Context) -> tuple[int, dict[str, Any]]:
        """Return how many replicas there should be, and what to remember until the next call."""
        now = self._clock()
        state = context.policy_state
        busy = context.total_num_requests >= 0.5  # a mean over a moment, seldom a whole number
        idle_since = None if busy else state.get("idle_since") or now
        load = load_of(context, 0.0 if idle_since is None else now - idle_since, 0.0)
        surplus = needed_replicas(load, self._policy) < load.num_replicas
        surplus_since = (state.get("surplus_since") or now) if surplus else None
        load = load_of(context, load.idle_s, 0.0 if surplus_since is None else now - surplus_since)
        return wanted_replicas(load, self._policy), {"idle_since": idle_since, "surplus_since": surplus_since}


class MixedPolicy:
    """The policy of one of a function's two deployments, ``kind`` of machine: its share of what both need."""

    def __init__(
        self, *, pool: str, kind: str, mix: Mapping[str, Any], clock: Callable[[], float] = time.time, **policy: Any
    ) -> None:
        """Take the fields of ``host.mix.MixPolicy`` as ``mix``, and those of ``host.autoscaler.Policy``."""
        self._kind = kind
        both = TokenAwarePolicy(clock=clock, **policy)
        self._function = ray_mix.mixed_function((pool, Policy(**policy)), both, MixPolicy(**mix))

    def __call__(self, context: ray_mix.Context) -> tuple[int, dict[str, Any]]:
        """Return how many replicas this deployment should have; what is to be remembered, both remember together."""
        return self._function.share(self._kind, context), {}


def load_of(context: Context, idle_s: float, surplus_s: float) -> Load:
    """Return a deployment's load. Counts add up over replicas; rates and durations are their means."""
    reported = context.aggregated_metrics or {}
    values = {name: list(reported.get(name, {}).values()) for name in SIGNALS}
    num_waiting = round(context.total_queued_requests)
    return Load(
        num_replicas=context.target_num_replicas,
        num_waiting=num_waiting,
        num_running=max(0, round(context.total_num_requests) - num_waiting),
        backlog_tokens=round(sum(values["backlog_tokens"])),
        prefill_tokens_per_s=_mean(values["prefill_tokens_per_s"]),
        service_s=_mean(values["service_s"]),
        kv_used_ratio=max(values["kv_used_ratio"], default=0.0),
        start_s=_mean(values["start_s"]) or 1.0,
        idle_s=idle_s,
        surplus_s=surplus_s,
    )


def _mean(values: list[float]) -> float:
    """Return the mean of what was measured."""
    measured = [value for value in values if value > 0]
    return sum(measured) / len(measured) if measured else 0.0
