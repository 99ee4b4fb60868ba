"""All plans on one trace, several at a time, and the one to take."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import msgspec

from pilotlight.plan.plans import Plan
from pilotlight.plan.result import Limits, Result, cheapest, with_savings
from pilotlight.plan.simulate import Conditions, simulate
from pilotlight.plan.trace import Arrival


class Comparison(msgspec.Struct, frozen=True):
    """``broken`` names the limits that each plan does not keep; ``cheapest`` is the plan to take, if there is one."""

    results: list[Result]
    broken: dict[str, list[str]]
    cheapest: str | None


def compare(
    plans: list[Plan], arrivals: list[Arrival], conditions: Conditions, limits: Limits, num_processes: int = 1
) -> Comparison:
    """Simulate every plan, so many at a time.

    Raises:
        ConfigError: a replica would not fit its machine.
    """
    results = with_savings(_simulate_all(plans, arrivals, conditions, min(num_processes, len(plans))))
    best = cheapest(results, limits)
    broken = {result.plan: limits.broken_by(result) for result in results}
    return Comparison(results, broken, best.plan if best is not None else None)


def _simulate_all(
    plans: list[Plan], arrivals: list[Arrival], conditions: Conditions, num_processes: int
) -> list[Result]:
    if num_processes == 1:
        return [simulate(plan, arrivals, conditions) for plan in plans]
    global _shared
    _shared = arrivals, conditions
    with ProcessPoolExecutor(num_processes, multiprocessing.get_context("fork")) as pool:
        return list(pool.map(_simulate_shared, plans))


_shared: tuple[list[Arrival], Conditions]
"""What forked processes find here instead of being sent it."""


def _simulate_shared(plan: Plan) -> Result:
    return simulate(plan, *_shared)
