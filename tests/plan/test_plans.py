"""Whole plans: everything that came is accounted for, limits hold over time, the same seed gives the same figures."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotlight.errors import ConfigError
from pilotlight.plan.compare import compare
from pilotlight.plan.drawing import draw
from pilotlight.plan.plans import Place, Plan, Warmth, plans
from pilotlight.plan.prices import Prices
from pilotlight.plan.result import Limits, Result, cheapest
from pilotlight.plan.simulate import simulate
from pilotlight.plan.spot import saving
from pilotlight.plan.trace import Arrival
from planning import PRICES, RATES, bursts, conditions

COLD = Plan(Place.OWN, Warmth.COLD)
LIGHT = Plan(Place.OWN, Warmth.LIGHT)
WARM = Plan(Place.OWN, Warmth.WARM)
SPOT = Plan(Place.SPOT, Warmth.WARM)
GIVEN: dict[str, Any] = {"idle_timeout_s": 10.0, "max_replicas": 3}


def prices(table: str, **changes: object) -> Prices:
    of_table = msgspec.structs.replace(getattr(PRICES, table), **changes)
    return msgspec.structs.replace(PRICES, **{table: of_table})


@pytest.mark.parametrize("plan", plans(), ids=lambda plan: plan.name)
def test_every_request_is_accounted_for(plan: Plan) -> None:
    arrivals = bursts(150)
    result = simulate(plan, arrivals, conditions(**GIVEN))
    assert result.num_requests == 150
    assert result.num_served + result.num_refused + result.num_failed == 150
    assert result.num_failed == 0
    assert result.cost > 0
    assert result.ttft_p50_s is not None
    assert result.ttft_p95_s is not None
    assert result.ttft_p50_s <= result.ttft_p95_s


@given(st.integers(0, 1000), st.sampled_from(plans()), st.integers(1, 4), st.integers(0, 6))
@settings(deadline=None, max_examples=40)
def test_limits_hold_over_time(seed: int, plan: Plan, max_replicas: int, max_queued: int) -> None:
    given = conditions(seed, max_replicas=max_replicas, max_queued_requests=max_queued, idle_timeout_s=5.0, num_slots=2)
    result = simulate(plan, bursts(60, seed), given)
    series = result.series
    assert result.num_served + result.num_refused + result.num_failed == 60
    for number in range(len(series["at_s"])):
        assert series["num_running"][number] <= series["num_slots"][number]
        # what is reserved holds what is used
        assert series["kv_used_bytes"][number] <= series["memory_bytes"][number]
        if plan.place in (Place.OWN, Place.MACHINES):
            assert series["num_replicas"][number] <= max_replicas
            assert series["num_queued"][number] <= max_queued + 2 * max_replicas + 2


@pytest.mark.parametrize("plan", [COLD, LIGHT, SPOT, Plan(Place.MODAL, Warmth.COLD)], ids=lambda plan: plan.name)
def test_the_same_seed_gives_the_same_figures(plan: Plan) -> None:
    given = conditions(7, prices("machines", interruptions_per_hour=30.0), **GIVEN)
    first, second = (simulate(plan, bursts(120), given) for _ in range(2))
    assert msgspec.json.encode(first) == msgspec.json.encode(second)


def test_sleep_is_paid_with_waiting() -> None:
    arrivals = bursts(200, gap_s=60.0)
    cold, light, warm = (simulate(plan, arrivals, conditions(**GIVEN)) for plan in (COLD, LIGHT, WARM))
    assert cold.cost < light.cost < warm.cost
    assert cold.ttft_p95_s > light.ttft_p95_s  # type: ignore[operator]
    assert warm.num_waited_for_start == 0
    assert cold.num_waited_for_start >= cold.num_cold_starts > 5


def test_a_lone_request_waits_for_start_and_prompt() -> None:
    result = simulate(COLD, [Arrival(0.0, 64, 1)], conditions())
    host_s, start_s, first_run_s, prefill_s = 0.00464, 0.5, 0.04, 0.018 + 0.0006
    assert result.ttft_p50_s == pytest.approx(host_s + start_s + first_run_s + prefill_s, abs=0.001)
    assert result.num_cold_starts == result.num_waited_for_start == 1


@pytest.mark.parametrize("place", [Place.OWN, Place.LAMBDA, Place.MODAL])
def test_a_replica_is_slower_while_it_grows(place: Place) -> None:
    starts = msgspec.structs.replace(RATES.starts, growing_factor=2.0)
    whole = msgspec.structs.replace(RATES.whole, num_threads=2)
    slow, undisturbed = (
        simulate(
            Plan(place, Warmth.COLD),
            [Arrival(0.0, 64, 100)],
            conditions(rates=msgspec.structs.replace(RATES, whole=whole, starts=one)),
        )
        for one in (starts, RATES.starts)
    )
    assert slow.ttft_p50_s == undisturbed.ttft_p50_s
    # at half the speed for 0.3 s; a step is 13 ms, and the one under way ends as it began
    speed = {Place.OWN: 1.0, Place.LAMBDA: PRICES.aws_lambda.speed, Place.MODAL: PRICES.modal.speed}[place]
    lost_s = 0.15 / speed
    assert slow.mean_stages_s["decode"] - undisturbed.mean_stages_s["decode"] == pytest.approx(lost_s, abs=0.03 / speed)


def test_a_second_request_within_the_timeout_is_warm() -> None:
    spaced = [Arrival(at, 64, 1) for at in (0.0, 8.0, 30.0)]
    assert simulate(COLD, spaced, conditions(**GIVEN)).num_cold_starts == 2


def test_a_replica_that_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="a replica needs"):
        simulate(COLD, bursts(3), conditions().with_memory(50_000_000))


def test_spot_machines_are_taken_away_and_nothing_is_lost() -> None:
    taken = prices("machines", interruptions_per_hour=120.0, notice_s=0.0, outage_s=20.0, boot_s=1.0)
    arrivals = bursts(300, gap_s=5.0)
    result = simulate(SPOT, arrivals, conditions(3, taken, max_replicas=3, max_queued_requests=500))
    assert result.spot is not None
    assert result.spot.num_interruptions > 3
    assert 0 < result.spot.availability < 1
    assert result.num_served == 300


def test_a_floor_stays_on_demand() -> None:
    plan = Plan(Place.MIXED, Warmth.WARM)
    result = simulate(plan, bursts(50), conditions(max_replicas=1))
    assert result.spot is not None
    assert result.spot.availability == 0


def test_lambda_never_waits_for_a_place_and_modal_shares_containers() -> None:
    at_once = [Arrival(0.0, 64, 50) for _ in range(12)]
    of_lambda = simulate(Plan(Place.LAMBDA, Warmth.COLD), at_once, conditions(num_slots=4))
    of_modal = simulate(Plan(Place.MODAL, Warmth.COLD), at_once, conditions(num_slots=4))
    assert of_lambda.num_cold_starts == 12
    assert of_modal.num_cold_starts == 3
    few = prices("aws_lambda", max_sandboxes=5)
    assert simulate(Plan(Place.LAMBDA, Warmth.COLD), at_once, conditions(prices=few)).num_refused == 7


def test_the_bill_of_lambda() -> None:
    result = simulate(Plan(Place.LAMBDA, Warmth.COLD), [Arrival(0.0, 64, 1)], conditions())
    init_s, run_s = 0.5, 0.04 + 0.018 + 0.0006
    gb = PRICES.aws_lambda.memory_mb / 1024
    expected = (init_s + run_s) * gb * PRICES.aws_lambda.per_gb_second + PRICES.aws_lambda.per_request
    assert result.cost == pytest.approx(expected)


def test_the_formula_for_spot() -> None:
    assert saving(1.0, 0.6, 0.0) == pytest.approx(0.6)
    assert saving(0.0, 0.6, 0.5) == pytest.approx(0.0)
    assert saving(0.9, 0.6, 0.1) == pytest.approx(1 - (0.9 * 0.4 * 1.1 + 0.1))


def test_simulated_savings_follow_the_formula() -> None:
    taken = prices("machines", interruptions_per_hour=6.0, outage_s=120.0, boot_s=1.0, min_billed_s=0.0)
    given = conditions(1, taken, max_replicas=1)
    compared = compare([Plan(Place.MACHINES, Warmth.WARM), SPOT], bursts(400, gap_s=20.0), given, Limits())
    spot = compared.results[1].spot
    assert spot is not None
    assert spot.num_interruptions > 0
    assert spot.saving == pytest.approx(spot.saving_by_formula, abs=0.06)


def test_the_cheapest_within_the_limits() -> None:
    arrivals = bursts(100, gap_s=60.0)
    free = compare([COLD, LIGHT, WARM], arrivals, conditions(**GIVEN), Limits())
    assert free.cheapest == "own-cold"
    bound = compare([COLD, LIGHT, WARM], arrivals, conditions(**GIVEN), Limits(max_cold_starts=0), num_processes=2)
    assert bound.cheapest == "own-warm"
    assert bound.broken["own-cold"] == ["max_cold_starts"]
    assert compare([COLD], arrivals, conditions(**GIVEN), Limits(max_cost=0.0)).cheapest is None


@pytest.mark.parametrize(
    ("limits", "broken"),
    [
        (Limits(max_ttft_p50_s=1e-6), "max_ttft_p50_s"),
        (Limits(max_ttft_p95_s=1e-6), "max_ttft_p95_s"),
        (Limits(max_ttft_p99_s=1e-6), "max_ttft_p99_s"),
        (Limits(max_cost=1e-9), "max_cost"),
        (Limits(max_cold_starts=0), "max_cold_starts"),
    ],
)
def test_limits_are_named(limits: Limits, broken: str) -> None:
    result = simulate(COLD, bursts(20), conditions())
    assert limits.broken_by(result) == [broken]
    assert cheapest([result], limits) is None


def test_unserved_requests_break_a_limit() -> None:
    result = simulate(COLD, [Arrival(0.0, 400, 50)] * 40, conditions(max_queued_requests=2, num_slots=1))
    assert result.num_refused > 20
    assert Limits().broken_by(result) == ["max_unserved"]


def test_the_picture_is_well_formed() -> None:
    from xml.etree import ElementTree

    compared = compare(plans(), bursts(40), conditions(**GIVEN), Limits(max_cost=0.001))
    root = ElementTree.fromstring(draw(compared))
    text = " ".join(element.text or "" for element in root.iter())
    assert all(plan.name in text for plan in plans())
    assert "queued" in text
    assert "nan" not in draw(compared)


def test_nobody_served_is_no_number() -> None:
    result = simulate(COLD, [Arrival(0.0, 10, 1)], conditions())
    assert not math.isnan(result.cost)
    assert isinstance(result, Result)
    assert RATES.artifact.name == "round"


@pytest.mark.parametrize("place", [Place.OWN, Place.LAMBDA])
def test_the_stages_of_a_first_token_are_all_of_its_time(place: Place) -> None:
    result = simulate(Plan(place, Warmth.COLD), bursts(200, seed=3), conditions())
    stages = result.mean_stages_s
    assert result.num_served == result.num_requests
    assert stages["host"] + stages["wait"] + stages["prefill"] == pytest.approx(result.mean_ttft_s)
    assert min(stages.values()) > 0
