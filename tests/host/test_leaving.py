"""A host that is told to end, or whose machine will be taken away: what it still takes, and when it goes."""

from __future__ import annotations

import asyncio
import math
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st

from pilotlight.host import server as host
from pilotlight.host.departure import MARGIN_S, admission_s
from pilotlight.host.notice import Kind, Notice, watch

DRAIN_S = 5.0


class Leaver:
    """What is asked of a function."""

    def __init__(self) -> None:
        self.ready = True
        self.drained_for: float | None = None

    def leave(self) -> None:
        self.ready = False

    async def drain(self, timeout_s: float) -> None:
        self.drained_for = timeout_s


class Leavers:
    def __init__(self) -> None:
        self.function = Leaver()

    def versions(self) -> list[Any]:
        return [self.function]


async def _nothing(*_: object) -> None:
    pass


def run(monkeypatch: pytest.MonkeyPatch, act: Callable[[host._Server], None], *, ends: bool) -> Leaver:
    """Have a server act on what happens to it, and shut down if it wants to; return its function."""
    monkeypatch.setattr(uvicorn.Server, "shutdown", _nothing)
    functions = Leavers()

    async def scenario() -> None:
        server = host._Server(None, functions, DRAIN_S)  # type: ignore[arg-type]
        watching = asyncio.create_task(watch([server.told], server.noticed))
        act(server)
        while functions.function.ready if ends else False:
            await asyncio.sleep(0)
        for _ in range(3):
            await asyncio.sleep(0)
        assert server.should_exit is ends
        if ends:
            await server.shutdown()
        watching.cancel()
        await asyncio.wait({watching})

    asyncio.run(scenario())
    return functions.function


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_notice_that_leaves_time_to_drain(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    begun_at = time.monotonic()
    function = run(monkeypatch, lambda server: server._signalled(number), ends=True)
    assert not function.ready
    assert function.drained_for is not None
    assert DRAIN_S - (time.monotonic() - begun_at) <= function.drained_for <= DRAIN_S


def test_a_machine_that_goes_at_once_ends_its_streams_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    notice = Notice(Kind.INTERRUPTION, "google", 3.0)
    function = run(monkeypatch, lambda server: server.noticed(notice), ends=True)
    assert function.drained_for is not None
    assert function.drained_for <= 1.0


def test_with_much_time_left_requests_are_taken_though_it_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    notice = Notice(Kind.INTERRUPTION, "aws", 120.0)
    function = run(monkeypatch, lambda server: server.noticed(notice), ends=False)
    assert not function.ready
    assert function.drained_for is None


def test_a_hint_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, lambda server: server.noticed(Notice(Kind.REBALANCE, "aws")), ends=False).ready


def test_a_signal_after_a_notice_ends_it_now(monkeypatch: pytest.MonkeyPatch) -> None:
    def act(server: host._Server) -> None:
        server.noticed(Notice(Kind.INTERRUPTION, "aws", 120.0))
        server._signalled(signal.SIGTERM)

    function = run(monkeypatch, act, ends=True)
    assert function.drained_for == DRAIN_S


def test_a_second_interrupt_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def act(server: host._Server) -> None:
        for _ in range(3):
            server._signalled(signal.SIGINT)
        assert server.force_exit

    run(monkeypatch, act, ends=True)


@given(st.floats(0, 1e6), st.floats(0, 3600))
def test_what_is_taken_last_has_its_time(seconds_left: float, drain_timeout_s: float) -> None:
    admits_s = admission_s(seconds_left, drain_timeout_s)
    assert 0 <= admits_s <= seconds_left
    if admits_s:
        assert math.isclose(seconds_left - admits_s, drain_timeout_s + MARGIN_S, abs_tol=1e-6)


def test_connections_stay_open_longer_than_clients_and_load_balancers_use_them_again() -> None:
    server = host._Server(None, Leavers(), DRAIN_S)  # type: ignore[arg-type]
    assert server.config.timeout_keep_alive > 60
