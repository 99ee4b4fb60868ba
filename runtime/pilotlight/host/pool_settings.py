"""All that a pool has to know of its function."""

from __future__ import annotations

from dataclasses import dataclass

from pilotlight.host.autoscaler import Policy
from pilotlight.host.wire import ReplicaSpec


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """``spec`` is what the pool's replicas are made from. A tick is a second."""

    name: str
    spec: ReplicaSpec
    policy: Policy
    weights_bytes: int
    kv_bytes: int
    max_queued_requests: int = 64
    max_queued_tokens: int = 65536
    hang_ticks: int = 30
    start_ticks: int = 120
