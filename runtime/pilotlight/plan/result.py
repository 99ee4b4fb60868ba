"""The figures of one plan, and which plan is the cheapest that a user can live with."""

from __future__ import annotations

from collections.abc import Iterable
from math import isnan
from typing import Any

import msgspec

from pilotlight.plan.outcomes import Outcomes, percentile
from pilotlight.plan.plans import Plan
from pilotlight.plan.spot import saving


class SpotFigures(msgspec.Struct, frozen=True):
    """What the market did. The savings follow once the same plan is known without it."""

    discount: float
    num_interruptions: int
    availability: float
    over_provisioning: float | None = None
    saving: float | None = None
    saving_by_formula: float | None = None


class Result(msgspec.Struct, frozen=True):
    """What a plan costs and how it serves. Times to first token are of those that were served, None if nobody was.

    ``mean_stages_s`` says where a served request's time went: `plan.outcomes.STAGES`.
    """

    plan: str
    cost: float
    cost_per_hour: float
    cost_per_million_new_tokens: float
    duration_s: float
    num_requests: int
    num_served: int
    num_refused: int
    num_failed: int
    num_cold_starts: int
    num_waited_for_start: int
    ttft_p50_s: float | None
    ttft_p95_s: float | None
    ttft_p99_s: float | None
    mean_ttft_s: float | None
    mean_stages_s: dict[str, float]
    mean_queued: float
    max_queued: int
    mean_slots_used: float
    max_replicas: int
    replica_s: float
    max_memory_bytes: int
    spot: SpotFigures | None
    series: dict[str, list[float]]

    @classmethod
    def of(
        cls,
        plan: Plan,
        outcomes: Outcomes,
        ttft_s: list[float],
        *,
        duration_s: float,
        cost: float,
        num_cold_starts: int,
        replica_s: float,
        num_tokens: int,
        spot: SpotFigures | None,
    ) -> Result:
        """Add up a run."""
        samples = outcomes.samples
        return cls(
            plan=plan.name,
            cost=cost,
            cost_per_hour=cost / duration_s * 3600 if duration_s else 0.0,
            cost_per_million_new_tokens=cost / num_tokens * 1e6,
            duration_s=duration_s,
            num_requests=len(outcomes.came_at),
            num_served=outcomes.num_served,
            num_refused=outcomes.num_refused,
            num_failed=outcomes.num_failed,
            num_cold_starts=num_cold_starts,
            num_waited_for_start=outcomes.num_waited_for_start,
            ttft_p50_s=_or_none(percentile(ttft_s, 0.50)),
            ttft_p95_s=_or_none(percentile(ttft_s, 0.95)),
            ttft_p99_s=_or_none(percentile(ttft_s, 0.99)),
            mean_ttft_s=sum(ttft_s) / len(ttft_s) if ttft_s else None,
            mean_stages_s=outcomes.mean_stages_s(),
            mean_queued=sum(one.num_queued for one in samples) / len(samples),
            max_queued=max(one.num_queued for one in samples),
            mean_slots_used=sum(one.num_running for one in samples) / len(samples),
            max_replicas=max(one.num_replicas for one in samples),
            replica_s=replica_s,
            max_memory_bytes=max(one.memory_bytes for one in samples),
            spot=spot,
            series={name: [getattr(one, name) for one in samples] for name in samples[0]._fields},
        )


class Limits(msgspec.Struct, frozen=True):
    """What a user can live with; None: anything. ``max_unserved`` is the share of requests that get no answer."""

    max_ttft_p50_s: float | None = None
    max_ttft_p95_s: float | None = None
    max_ttft_p99_s: float | None = None
    max_cost: float | None = None
    max_cold_starts: int | None = None
    max_unserved: float = 0.01

    def broken_by(self, result: Result) -> list[str]:
        """Name the limits that a plan does not keep."""
        found = []
        for name in ("ttft_p50_s", "ttft_p95_s", "ttft_p99_s"):
            limit, value = getattr(self, f"max_{name}"), getattr(result, name)
            if limit is not None and (value is None or value > limit):
                found.append(f"max_{name}")
        if self.max_cost is not None and result.cost > self.max_cost:
            found.append("max_cost")
        if self.max_cold_starts is not None and result.num_cold_starts > self.max_cold_starts:
            found.append("max_cold_starts")
        if result.num_requests - result.num_served > self.max_unserved * result.num_requests:
            found.append("max_unserved")
        return found


def cheapest(results: Iterable[Result], limits: Limits) -> Result | None:
    """Return the cheapest plan that keeps the limits, the one with the shorter p95 of two that cost the same."""
    kept = [result for result in results if not limits.broken_by(result)]
    return min(kept, key=lambda one: (one.cost, one.ttft_p95_s or 0.0), default=None)


def with_savings(results: list[Result]) -> list[Result]:
    """Fill in what spot plans save against the same plan on demand."""
    on_demand = {result.plan: result for result in results if result.plan.startswith("machines-")}
    return [_with_saving(result, on_demand.get(f"machines-{result.plan.partition('-')[2]}")) for result in results]


def _with_saving(result: Result, without: Result | None) -> Result:
    spot = result.spot
    if spot is None or without is None or not without.replica_s or not without.cost:
        return result
    over = max(0.0, result.replica_s / without.replica_s - 1)
    changes: dict[str, Any] = {
        "over_provisioning": over,
        "saving": 1 - result.cost / without.cost,
        "saving_by_formula": saving(spot.availability, spot.discount, over),
    }
    return msgspec.structs.replace(result, spot=msgspec.structs.replace(spot, **changes))


def _or_none(value: float) -> float | None:
    return None if isnan(value) else value
