"""Who finishes and who moves, and how spot and on-demand replicas make up what is wanted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotlight.host.departure import MARGIN_S, Open, plan_departure
from pilotlight.host.mix import Mix, MixPolicy, mix

sequences = st.lists(
    st.builds(Open, st.text(min_size=1), st.integers(0, 5000), st.booleans()), unique_by=lambda one: one.sequence_id
)


@given(sequences, st.floats(0, 1), st.floats(0, 300))
def test_everybody_finishes_in_time_or_moves(running: list[Open], inter_token_s: float, seconds_left: float) -> None:
    plan = plan_departure(running, inter_token_s, seconds_left)
    by_id = {one.sequence_id: one for one in running}
    assert sorted((*plan.finishing, *plan.moving)) == sorted(by_id)
    for sequence_id in plan.finishing:
        assert by_id[sequence_id].has_begun
        assert by_id[sequence_id].num_left_tokens * inter_token_s <= seconds_left - MARGIN_S


def test_what_fits_stays_and_what_does_not_moves() -> None:
    running = [Open("short", 10), Open("long", 1000), Open("queued", 1, has_begun=False)]
    plan = plan_departure(running, inter_token_s=0.1, seconds_left=10)
    assert (plan.finishing, plan.moving) == (("short",), ("long", "queued"))


def test_without_a_measured_pace_everybody_moves() -> None:
    assert plan_departure([Open("a", 1)], 0.0, 120.0).moving == ("a",)


@pytest.mark.parametrize(
    ("num_wanted", "num_spot_ready", "policy", "expected"),
    [
        (0, 3, MixPolicy(2), Mix(0, 0)),
        (1, 0, MixPolicy(2), Mix(1, 0)),
        (5, 3, MixPolicy(2), Mix(2, 3)),
        (5, 0, MixPolicy(2), Mix(5, 3)),
        (5, 2, MixPolicy(2), Mix(3, 3)),
        (5, 0, MixPolicy(2, fall_back=False), Mix(2, 3)),
        (5, 4, MixPolicy(1, spot_surplus=1), Mix(1, 5)),
        (3, 0, MixPolicy(0), Mix(3, 3)),
    ],
)
def test_the_mix(num_wanted: int, num_spot_ready: int, policy: MixPolicy, expected: Mix) -> None:
    assert mix(num_wanted, num_spot_ready, policy) == expected


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 10), st.integers(0, 5), st.booleans())
def test_the_floor_holds_and_what_serves_is_enough(
    num_wanted: int, num_spot_ready: int, floor: int, surplus: int, fall_back: bool
) -> None:
    found = mix(num_wanted, num_spot_ready, MixPolicy(floor, surplus, fall_back))
    assert found.on_demand >= min(num_wanted, floor)
    assert found.on_demand + found.spot >= num_wanted
    if fall_back and num_wanted:
        assert found.on_demand + min(num_spot_ready, found.spot) >= num_wanted
