"""The host's event loop as a queue: who comes waits for what is in front."""

from __future__ import annotations

import pytest

from pilotlight.host.rates import HostRates
from pilotlight.plan.agenda import Agenda
from pilotlight.plan.desk import Desk

RATES = HostRates(request_ms=3.0, prompt_token_ms=0.01, request_busy_ms=2.0, token_busy_ms=0.5, crowded_factor=1.5)


@pytest.fixture
def agenda() -> Agenda:
    return Agenda()


def test_a_lone_request_waits_for_itself_only(agenda: Agenda) -> None:
    assert Desk(RATES, agenda).take_in(100) == pytest.approx(0.004)


def test_those_who_come_together_wait_for_each_other(agenda: Agenda) -> None:
    desk = Desk(RATES, agenda)
    assert [desk.take_in(0) for _ in range(3)] == pytest.approx([0.003, 0.004, 0.005])
    agenda.now = 1.0
    assert desk.take_in(0) == pytest.approx(0.003), "by then it is idle again"


def test_a_loop_that_streams_more_than_it_can_falls_behind(agenda: Agenda) -> None:
    desk = Desk(RATES, agenda)
    desk.stream(3000.0)  # 1.5 s of work a second
    agenda.now = 2.0
    assert desk.hand_out(1, 0) == pytest.approx(1.0)
    desk.stream(-3000.0)
    agenda.now = 2.5
    assert desk.hand_out(0, 0) == pytest.approx(0.5005)


def test_work_is_counted(agenda: Agenda) -> None:
    desk = Desk(RATES, agenda)
    desk.take_in(0)
    desk.hand_out(2, 2)
    desk.stream(100.0)
    agenda.now = 10.0
    assert desk.worked_s == pytest.approx(0.001 + 2 * 0.0005 + 2 * 0.001 + 0.5)
    assert desk.crowding == pytest.approx(0.5)


def test_a_host_that_was_not_measured_takes_no_time(agenda: Agenda) -> None:
    desk = Desk(HostRates(), agenda)
    assert desk.take_in(1000) == desk.hand_out(5, 1) == desk.worked_s == desk.crowding == 0.0
