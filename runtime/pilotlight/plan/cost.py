"""What a simulated fleet would have been billed. Estimates in the prices' currency: floats, unlike the metering's."""

from __future__ import annotations

from collections.abc import Iterable

from pilotlight.host.fleet import TEMPLATE_BYTES
from pilotlight.plan.prices import Lambda, Machines, Modal, Own
from pilotlight.plan.replica import Life
from pilotlight.plan.sandboxes import Sandbox

HOUR_S = 3600.0


def own_cost(lives: Iterable[Life], template_s: float, now: float, terms: Own) -> float:
    """Return what replicas take of a machine that is there anyway, and templates of its memory."""
    template_share = TEMPLATE_BYTES / (terms.machine_memory_gb * 1e9)
    seconds = sum(life.seconds(now) for life in lives) + template_s * template_share
    return seconds * terms.machine_per_hour / HOUR_S


def machines_cost(lives: Iterable[Life], now: float, terms: Machines) -> float:
    """Return what the machines cost, each for a while at least."""
    return sum(
        max(terms.min_billed_s, life.seconds(now)) * (terms.spot_per_hour if life.on_spot else terms.per_hour)
        for life in lives
    ) / HOUR_S  # fmt: skip


def lambda_cost(sandboxes: list[Sandbox], num_provisioned: int, now: float, terms: Lambda) -> float:
    """Return what running, initialising and requests cost; the first sandboxes are provisioned all the time."""
    cost = num_provisioned * now * terms.gb * terms.provisioned_per_gb_second
    by_age = sorted(sandboxes, key=lambda one: one.life.asked_at)
    for number, sandbox in enumerate(by_age):
        provisioned = number < num_provisioned
        per_second = terms.gb * (terms.provisioned_duration_per_gb_second if provisioned else terms.per_gb_second)
        init_s = 0.0
        if not provisioned and sandbox.life.ready_at is not None:
            init_s = max(0.0, sandbox.life.ready_at - sandbox.life.asked_at - terms.sandbox_s)
        cost += (sandbox.busy_until(now) + init_s) * per_second + sandbox.num_invocations * terms.per_request
    return cost


def modal_cost(lives: Iterable[Life], now: float, terms: Modal) -> float:
    """Return what containers cost for as long as they are there."""
    return sum(life.seconds(now) for life in lives) * terms.per_second
