"""How many replicas of a function run on demand and how many on spot machines: one decision for two deployments.

Serve gives every deployment's policy its own context only, and takes the policy's module by value. Both policies of a
function, which live in Serve's controller, therefore meet here: each says what it sees, and gets its share of what the
function needs. Knows nothing of Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from pilotlight.host.mix import MixPolicy, mix

ON_DEMAND, SPOT = "on_demand", "spot"


class Context(Protocol):
    """What is read of ``ray.serve.config.AutoscalingContext``."""

    @property
    def target_num_replicas(self) -> int:
        """How many replicas there should be by the last decision."""

    @property
    def current_num_replicas(self) -> int:
        """How many serve."""

    @property
    def total_num_requests(self) -> float:
        """Requests that run or wait."""

    @property
    def total_queued_requests(self) -> float:
        """Requests that wait before the replicas."""

    @property
    def aggregated_metrics(self) -> Mapping[str, Mapping[Any, float]] | None:
        """What the replicas reported, by signal and replica."""


@dataclass(frozen=True)
class Seen:
    """A context at one instant, of one deployment or of two together."""

    target_num_replicas: int
    current_num_replicas: int
    total_num_requests: float
    total_queued_requests: float
    aggregated_metrics: Mapping[str, Mapping[Any, float]]
    policy_state: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, context: Context) -> Seen:
        return cls(
            context.target_num_replicas,
            context.current_num_replicas,
            context.total_num_requests,
            context.total_queued_requests,
            context.aggregated_metrics or {},
        )

    @property
    def num_staying(self) -> int:
        """How many replicas serve and are not about to leave."""
        return max(0, self.current_num_replicas - round(sum(self.aggregated_metrics.get("leaving", {}).values())))


def together(seen: Iterable[Seen], num_wanted: int | None, state: dict[str, Any]) -> Seen:
    """Return what a policy for both would see, which wanted so many replicas the last time."""
    parts = list(seen)
    metrics: dict[str, dict[Any, float]] = {}
    for part in parts:
        for name, by_replica in part.aggregated_metrics.items():
            metrics.setdefault(name, {}).update(by_replica)
    return Seen(
        sum(part.target_num_replicas for part in parts) if num_wanted is None else num_wanted,
        sum(part.current_num_replicas for part in parts),
        sum(part.total_num_requests for part in parts),
        sum(part.total_queued_requests for part in parts),
        metrics,
        state,
    )


Decide = Callable[[Any], tuple[int, dict[str, Any]]]


class MixedFunction:
    """One function, or pool, with two deployments."""

    def __init__(self, decide: Decide, policy: MixPolicy) -> None:
        """``decide`` is the autoscaler's policy for both together."""
        self._decide = decide
        self._policy = policy
        self._seen: dict[str, Seen] = {}
        self._num_wanted: int | None = None
        self._state: dict[str, Any] = {}

    def share(self, kind: str, context: Context) -> int:
        """Return how many replicas the deployment of this kind should have, now that it sees this."""
        self._seen[kind] = Seen.of(context)
        seen = together(self._seen.values(), self._num_wanted, self._state)
        self._num_wanted, self._state = self._decide(seen)
        spot = self._seen.get(SPOT)
        found = mix(self._num_wanted, 0 if spot is None else spot.num_staying, self._policy)
        return found.spot if kind == SPOT else found.on_demand


_functions: dict[tuple[Any, ...], MixedFunction] = {}


def mixed_function(key: tuple[Any, ...], decide: Decide, policy: MixPolicy) -> MixedFunction:
    """Return the function of this process with this key, which is made once: the first deployment's policy decides."""
    return _functions.setdefault((*key, policy), MixedFunction(decide, policy))
