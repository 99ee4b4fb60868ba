"""Replicas of two kinds: how many of each, and where an attempt goes, without Ray."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ray_mix
import ray_mixed_place
import ray_replicas
from pilotlight.artifact import Artifact
from pilotlight.engine.policy import Policy
from pilotlight.host.attempt import Attempt, FromAttempt, HandOver, Part
from pilotlight.host.remote import RemoteBackend, RemoteSettings, ReplicaLost
from pilotlight.host.routing import prefix_keys
from pilotlight.host.wire import ReplicaSpec
from pilotlight.request import FinishReason, Sequence, TokenEvent
from ray_mix import ON_DEMAND, SPOT, Seen
from ray_mixed_place import MixedPlace, capacity_of
from ray_scaling import MixedPolicy
from support import serving

NOTHING = Seen(0, 0, 0.0, 0.0, {})
CROWD: dict[str, dict[Any, float]] = {"service_s": {"a": 4.0}, "start_s": {"a": 1.0}}


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_mix, "_functions", {})
    monkeypatch.setattr(ray_replicas, "_known", {})
    monkeypatch.setattr(ray_replicas, "_leaving", type(ray_replicas._leaving)())


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Both:
    """The two deployments of a function as Serve asks for them: what is wanted is there the next time, if it can be."""

    def __init__(self, clock: Clock, num_spot_machines: int = 100, **mix: Any) -> None:
        self.num_spot_machines = num_spot_machines
        self.ready = {ON_DEMAND: 0, SPOT: 0}
        policy = {"num_slots": 4, "max_replicas": 5, "idle_timeout_s": 60.0, "scale_in_after_s": 30.0}
        self._policies = {
            kind: MixedPolicy(pool="f", kind=kind, mix=mix, clock=clock, **policy) for kind in (ON_DEMAND, SPOT)
        }

    def ask(self, num_requests: float, leaving: int = 0) -> dict[str, int]:
        """Have all requests lie with the replicas on demand, and decide for both."""
        metrics: dict[str, dict[Any, float]] = {**CROWD, "leaving": dict.fromkeys(range(leaving), 1.0)}
        wanted = {}
        for kind, policy in self._policies.items():
            seen = Seen(self.ready[kind], self.ready[kind], 0.0, 0.0, metrics if kind == SPOT else CROWD)
            if kind == ON_DEMAND:
                seen = replace(seen, total_num_requests=num_requests, total_queued_requests=max(0.0, num_requests - 4))
            wanted[kind], _ = policy(seen)
        self.ready = {ON_DEMAND: wanted[ON_DEMAND], SPOT: min(wanted[SPOT], self.num_spot_machines)}
        return wanted

    def settle(self, num_requests: float, leaving: int = 0) -> dict[str, int]:
        for _ in range(4):
            wanted = self.ask(num_requests, leaving)
        return wanted


def test_the_floor_is_on_demand_and_the_rest_on_spot_machines() -> None:
    both = Both(Clock(), on_demand_floor=1)
    assert both.settle(100) == {ON_DEMAND: 1, SPOT: 4}


def test_the_first_replica_of_a_sleeping_function_is_one_of_the_floor() -> None:
    assert Both(Clock(), on_demand_floor=1).settle(1) == {ON_DEMAND: 1, SPOT: 0}
    assert Both(Clock(), on_demand_floor=2).settle(0) == {ON_DEMAND: 0, SPOT: 0}


def test_replicas_on_demand_stand_in_for_missing_spot_ones_and_leave_again() -> None:
    both = Both(Clock(), num_spot_machines=1, on_demand_floor=1)
    assert both.settle(100) == {ON_DEMAND: 4, SPOT: 4}
    assert both.ready == {ON_DEMAND: 4, SPOT: 1}
    both.num_spot_machines = 100
    assert both.settle(100) == {ON_DEMAND: 1, SPOT: 4}


def test_a_spot_replica_that_has_to_leave_is_missing_before_it_is_gone() -> None:
    both = Both(Clock(), on_demand_floor=1)
    both.settle(100)
    assert both.settle(100, leaving=2) == {ON_DEMAND: 3, SPOT: 4}


def test_without_falling_back_nothing_stands_in_and_a_surplus_bridges() -> None:
    both = Both(Clock(), num_spot_machines=0, on_demand_floor=1, fall_back=False, spot_surplus=2)
    assert both.settle(100) == {ON_DEMAND: 1, SPOT: 6}


def test_an_idle_function_sleeps_with_its_floor() -> None:
    clock = Clock()
    both = Both(clock, on_demand_floor=2)
    assert both.settle(100) == {ON_DEMAND: 2, SPOT: 3}
    assert both.settle(0) == {ON_DEMAND: 2, SPOT: 3}
    clock.now += 61
    assert both.settle(0) == {ON_DEMAND: 0, SPOT: 0}


@given(st.integers(0, 3), st.integers(0, 3), st.booleans(), st.lists(st.tuples(st.integers(0, 60), st.integers(0, 5))))
def test_the_floor_is_never_on_spot_machines(
    floor: int, surplus: int, fall_back: bool, steps: list[tuple[int, int]]
) -> None:
    ray_mix._functions.clear()
    both = Both(Clock(), on_demand_floor=floor, spot_surplus=surplus, fall_back=fall_back)
    for num_requests, num_machines in steps:
        both.num_spot_machines = num_machines
        wanted = both.settle(num_requests)
        num = wanted[ON_DEMAND] + wanted[SPOT]
        assert wanted[ON_DEMAND] >= min(floor, num)
        assert wanted[SPOT] <= 5 + surplus
        assert wanted[ON_DEMAND] <= 5


# where an attempt goes


class Deployed:
    """A deployment that says who it is, once its gate is open."""

    def __init__(self, deployment: str) -> None:
        self.deployment = deployment
        self.gate = asyncio.Event()
        self.gate.set()
        self.num_asked = 0
        self.num_closed = 0

    async def attempt(self, attempt: Attempt) -> AsyncGenerator[FromAttempt, None]:
        self.num_asked += 1
        try:
            await self.gate.wait()
            yield HandOver(attempt.epoch, f"{self.deployment}-1")
            yield HandOver(attempt.epoch, f"{self.deployment}-2")
        finally:
            self.num_closed += 1

    def leaving(self, replica_id: str) -> None:
        ray_replicas.leave_out(replica_id)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_mixed_place, "LOOK_AGAIN_S", 0.001)


def spec(**policy: Any) -> ReplicaSpec:
    return ReplicaSpec("f", "nowhere", 2, 4096, Policy(8, **policy), 1, None, 0.0)


def attempt(*prompt: int) -> Attempt:
    return Attempt("f", Sequence("s", prompt or (1, 2), 3), 0)


async def went(place: MixedPlace, one: Attempt) -> list[str]:
    return [answer.replica_id async for answer in place.attempt(one)]


def test_an_attempt_goes_to_the_replica_with_the_least_work_of_both_kinds() -> None:
    async def scenario() -> list[str]:
        place = MixedPlace(Deployed("f"), Deployed("f-spot"), spec())
        ray_replicas.present("f", {"a": 4})
        ray_replicas.present("f-spot", {"b": 4})
        known = ray_replicas.known("f", "a")
        assert known is not None
        known.work["other"] = 50
        return await went(place, attempt())

    assert asyncio.run(scenario()) == ["f-spot-1", "f-spot-2"]


def test_a_known_beginning_is_worth_its_tokens_across_kinds() -> None:
    async def scenario() -> list[str]:
        place = MixedPlace(Deployed("f"), Deployed("f-spot"), spec(prefix_cache_bytes=1))
        ray_replicas.present("f", {"a": 4})
        ray_replicas.present("f-spot", {"b": 4})
        one = attempt(*range(100))
        keys = [b"f" + key for key in prefix_keys(one.sequence, place._policy)]
        known = ray_replicas.known("f-spot", "b")
        assert known is not None
        known.prefixes.add(keys)
        known.work["other"] = 50
        return await went(place, one)

    assert asyncio.run(scenario())[0] == "f-spot-1"


def test_without_replicas_it_waits_on_demand_and_what_leaves_does_not_count() -> None:
    async def scenario() -> tuple[list[str], list[str]]:
        place = MixedPlace(Deployed("f"), Deployed("f-spot"), spec())
        asleep = await went(place, attempt())
        ray_replicas.present("f-spot", {"b": 4})
        place.leaving("f-spot-b")
        return asleep, await went(place, attempt())

    asleep, leaving = asyncio.run(scenario())
    assert asleep[0] == leaving[0] == "f-1"


@pytest.mark.usefixtures("quick")
def test_what_waits_where_the_last_replica_is_gone_goes_where_there_is_one() -> None:
    async def scenario() -> tuple[list[str], Deployed, MixedPlace]:
        on_demand, spot = Deployed("f"), Deployed("f-spot")
        spot.gate.clear()
        place = MixedPlace(on_demand, spot, spec())
        ray_replicas.present("f-spot", {"b": 4})
        waiting = asyncio.create_task(went(place, attempt()))
        while not spot.num_asked:
            await asyncio.sleep(0)
        ray_replicas.forget("f-spot", "b")
        ray_replicas.present("f", {"a": 4})
        return await waiting, spot, place

    found, spot, place = asyncio.run(scenario())
    assert found == ["f-1", "f-2"]
    assert spot.num_closed == 1
    assert not any(place._unanswered.values())


@pytest.mark.usefixtures("quick")
def test_whoever_stops_waiting_ends_the_attempt() -> None:
    async def scenario() -> Deployed:
        spot = Deployed("f-spot")
        spot.gate.clear()
        ray_replicas.present("f-spot", {"b": 4})
        waiting = asyncio.create_task(went(MixedPlace(Deployed("f"), spot, spec()), attempt()))
        while not spot.num_asked:
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait({waiting})
        return spot

    assert asyncio.run(scenario()).num_closed == 1


# what is known of replicas


def test_what_is_crowded_comes_late_and_what_is_unreachable_not_at_all() -> None:
    ray_replicas.present("f", {"a": 1, "b": 1})
    one, other = (ray_replicas.known("f", key) for key in "ab")
    assert one is not None
    assert other is not None
    other.work["x"] = 5
    assert other.choice((), 8).num_outstanding_tokens == 5 + ray_replicas.CROWDED_TOKENS
    ray_replicas.suspect("f", "a")
    assert ray_replicas.staying("f") == {"b": other}
    ray_replicas.present("f", {"a": 1})
    assert ray_replicas.known("f", "a") is one, "what is known of a replica outlives an update"
    assert ray_replicas.known("f", "b") is None


class Answering:
    """A place whose replica answers with one token after the other, until the answer is as long as was asked for."""

    def __init__(self, *replicas: str) -> None:
        self.replicas = deque(replicas)

    def leaving(self, replica_id: str) -> None:
        raise AssertionError

    async def attempt(self, attempt: Attempt) -> AsyncGenerator[FromAttempt, None]:
        replica_id, begun = self.replicas.popleft(), len(attempt.sequence.emitted_ids)
        for number in range(begun, attempt.sequence.max_new_tokens):
            is_last = number == attempt.sequence.max_new_tokens - 1
            event = TokenEvent(3, 1.0, FinishReason.LENGTH if is_last else None, None if number else 0.5)
            yield Part(attempt.epoch, number, replica_id, 1.0, [event])
            if self.replicas:
                raise ReplicaLost("its machine is gone")


@pytest.mark.parametrize(
    ("replicas", "capacity"),
    [(["toy-abc"], "on_demand"), (["toy-spot-abc"], "spot"), (["toy-spot-abc", "toy-def"], "on_demand")],
)
def test_a_record_says_how_the_last_replica_s_machine_is_paid_for(
    toy_artifact: Artifact, tmp_path: Path, replicas: list[str], capacity: str
) -> None:
    async def scenario() -> dict[str, Any]:
        async with serving(toy_artifact, tmp_path) as toy:
            await toy.function.backend.close()
            toy.function.backend = RemoteBackend(RemoteSettings("toy", 8, 1000), Answering(*replicas))
            toy.function.capacity_of = partial(capacity_of, pool="toy")
            response = await toy.complete(max_tokens=3)
            record = await toy.client.get(f"/v1/usage/{response.headers['x-request-id']}")
            found: dict[str, Any] = record.json()
            return found

    record = asyncio.run(scenario())
    assert (record["replica_id"], record["capacity"]) == (replicas[-1], capacity)
    assert record["completion_tokens"] == 3


def test_the_function_s_name_may_look_like_that_of_spot_machines() -> None:
    assert capacity_of("my-spot-abc", "my-spot") == "on_demand"
    assert capacity_of("my-spot-spot-abc", "my-spot") == "spot"
