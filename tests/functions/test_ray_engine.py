"""A replica of the Ray application, without Ray: its streams, its signals, and its departure."""

from __future__ import annotations

import asyncio
import itertools
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import ray_engine
import ray_node
from pilotlight.engine.backend import EngineBackend
from pilotlight.engine.fake import FakeSession, next_token
from pilotlight.engine.policy import Policy
from pilotlight.errors import ArtifactError
from pilotlight.host.attempt import Attempt, FromAttempt, HandOver, Part, read_answer
from pilotlight.host.loaded import Loaded
from pilotlight.host.notice import Kind, Notice
from pilotlight.host.wire import ReplicaSpec, Stages, encode
from pilotlight.request import FinishReason, SamplingParams, Sequence
from ray_engine import EngineReplica
from ray_node import deadline_ms, replaced

VOCAB_SIZE = 258
SPEC = ReplicaSpec("f", "nowhere", 2, 4096, Policy(8), 1, None, 0.0)
GREEDY = SamplingParams(temperature=0.0)


class Toy(Loaded):
    """An engine on the fake session, which stops after some tokens until ``gate`` is opened."""

    gate = threading.Event()

    def __init__(self, spec: ReplicaSpec) -> None:
        runs = itertools.count()
        session = FakeSession(
            VOCAB_SIZE, spec.num_slots, spec.max_context_tokens, lambda: next(runs) < 30 or Toy.gate.wait()
        )
        self.backend = EngineBackend(session, max_queued_requests=100)
        self.start_s = 0.5
        self.stages = Stages("ray", 0.0, 1.0, 2.0, 0.0)


@pytest.fixture
def drained(monkeypatch: pytest.MonkeyPatch) -> list[Notice]:
    """Have a toy for an engine, a replacement at once, and note how often Ray is told to drain the node."""
    found: list[Notice] = []
    monkeypatch.setattr(Toy, "gate", threading.Event())
    monkeypatch.setattr(ray_engine, "Loaded", Toy)
    monkeypatch.setattr(ray_engine, "drain_this_node", found.append)
    monkeypatch.setattr(ray_engine, "is_replaced", lambda: True)
    return found


def expected(prompt: tuple[int, ...], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, VOCAB_SIZE))
    return tokens[len(prompt) :]


async def answers(replica: EngineReplica, sequence: Sequence, epoch: int = 0) -> AsyncIterator[FromAttempt]:
    async for payload in replica.generate(encode(Attempt("f", sequence, epoch)), blocks=[], num_tokens=2):
        yield read_answer(payload)


async def left(replica: EngineReplica) -> None:
    """Wait until a replica takes nothing more."""
    while not replica._leaving:
        await asyncio.sleep(0)


def tokens_of(parts: list[Any]) -> list[int]:
    events = [event for part in parts if isinstance(part, Part) for event in part.events]
    return [event.token_id for event in events if event.token_id is not None]


def test_a_stream_in_parts_is_in_order_and_says_where_it_stands(drained: list[Notice]) -> None:
    async def scenario() -> list[FromAttempt]:
        Toy.gate.set()
        replica = EngineReplica("f-1", {"f": SPEC}, "")
        found = [answer async for answer in answers(replica, Sequence("s", (1, 2), 40, sampling=GREEDY), epoch=3)]
        assert replica.record_autoscaling_stats()["service_s"] > 0
        await replica.close()
        return found

    parts = asyncio.run(scenario())
    assert all(isinstance(part, Part) for part in parts)
    position = 0
    for part in parts:
        assert isinstance(part, Part)
        assert (part.epoch, part.position, part.replica_id) == (3, position, "f-1")
        position += len(part.events)
    assert tokens_of(parts) == expected((1, 2), 40)
    assert parts[0].stages is not None  # type: ignore[union-attr]
    assert parts[-1].events[-1].finish is FinishReason.LENGTH  # type: ignore[union-attr]


def test_a_continuation_goes_on_behind_what_was_emitted(drained: list[Notice]) -> None:
    async def scenario() -> list[FromAttempt]:
        replica = EngineReplica("f-1", {"f": SPEC}, "")
        begun = Sequence("s", (1, 2), 10, sampling=GREEDY, emitted_ids=tuple(expected((1, 2), 4)))
        found = [answer async for answer in answers(replica, begun, epoch=1)]
        await replica.close()
        return found

    parts = asyncio.run(scenario())
    assert parts[0].position == 4  # type: ignore[union-attr]
    assert tokens_of(parts) == expected((1, 2), 10)[4:]


def test_after_a_notice_what_does_not_fit_is_handed_over_without_a_loss(drained: list[Notice]) -> None:
    long = Sequence("long", (1, 2), 4000, sampling=GREEDY)

    async def scenario() -> tuple[list[FromAttempt], list[FromAttempt], list[FromAttempt]]:
        replica = EngineReplica("f-1", {"f": SPEC}, "")
        first: list[FromAttempt] = []
        async for answer in answers(replica, long):
            if not first:
                replica.noticed(Notice(Kind.INTERRUPTION, "file", 1.0))
                await left(replica)
                Toy.gate.set()
            first.append(answer)
        refused = [answer async for answer in answers(replica, Sequence("late", (5,), 3, sampling=GREEDY))]
        other = EngineReplica("f-2", {"f": SPEC}, "")
        rest = Sequence("long", (1, 2), 4000, sampling=GREEDY, emitted_ids=tuple(tokens_of(first)))
        second = [answer async for answer in answers(other, rest, epoch=1)]
        await replica.close()
        await other.close()
        return first, refused, second

    first, refused, second = asyncio.run(scenario())
    assert isinstance(first[-1], HandOver)
    assert refused == [HandOver(0, "f-1")]
    assert 0 < len(tokens_of(first)) < 4000
    assert tokens_of(first) + tokens_of(second) == expected((1, 2), 4000)
    assert [notice.kind for notice in drained] == [Kind.INTERRUPTION]


def test_what_fits_into_the_time_left_finishes(drained: list[Notice]) -> None:
    async def scenario() -> list[FromAttempt]:
        replica = EngineReplica("f-1", {"f": SPEC}, "")
        found: list[FromAttempt] = []
        async for answer in answers(replica, Sequence("s", (1, 2), 300, sampling=GREEDY)):
            found.append(answer)
            if len(tokens_of(found)) > 1 and not drained:
                replica.noticed(Notice(Kind.INTERRUPTION, "aws", 3600.0))
                await left(replica)
                Toy.gate.set()
        await replica.close()
        return found

    found = asyncio.run(scenario())
    assert tokens_of(found) == expected((1, 2), 300)


def test_admission_ends_when_the_replacement_runs_and_not_before(
    drained: list[Notice], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asyncio.Event()
    runs = threading.Event()

    async def scenario() -> tuple[list[FromAttempt], list[FromAttempt], float]:
        loop = asyncio.get_running_loop()

        def is_replaced() -> bool:
            loop.call_soon_threadsafe(asked.set)
            return runs.is_set()

        monkeypatch.setattr(ray_engine, "is_replaced", is_replaced)
        monkeypatch.setattr(ray_engine, "LOOK_AGAIN_S", 0.0)
        Toy.gate.set()
        replica = EngineReplica("f-1", {"f": SPEC}, "")
        replica.noticed(Notice(Kind.INTERRUPTION, "aws", 3600.0))
        await asked.wait()
        before = [answer async for answer in answers(replica, Sequence("a", (5,), 3, sampling=GREEDY))]
        signal = replica.record_autoscaling_stats()["leaving"]
        runs.set()
        await left(replica)
        after = [answer async for answer in answers(replica, Sequence("b", (5,), 3, sampling=GREEDY))]
        await replica.close()
        return before, after, signal

    before, after, signal = asyncio.run(scenario())
    assert tokens_of(before) == expected((5,), 3)
    assert after == [HandOver(0, "f-1")]
    assert signal == 1.0, "the autoscaler knows meanwhile that this one goes"


@pytest.mark.parametrize("failing", [False, True])
def test_without_a_replacement_it_leaves_in_the_middle_of_its_time(
    drained: list[Notice], monkeypatch: pytest.MonkeyPatch, failing: bool
) -> None:
    def never() -> bool:
        if failing:
            raise RuntimeError("the controller does not answer")
        return False

    monkeypatch.setattr(ray_engine, "is_replaced", never)
    monkeypatch.setattr(ray_engine, "LOOK_AGAIN_S", 0.001)

    async def scenario() -> list[FromAttempt]:
        replica = EngineReplica("f-1", {"f": SPEC}, "")
        replica.noticed(Notice(Kind.INTERRUPTION, "file", 0.1))
        await left(replica)
        found = [answer async for answer in answers(replica, Sequence("b", (5,), 3, sampling=GREEDY))]
        await replica.close()
        return found

    assert asyncio.run(scenario()) == [HandOver(0, "f-1")]


@pytest.mark.parametrize(
    ("states", "is_replaced"),
    [
        ({"RUNNING": 1}, False),
        ({"PENDING_MIGRATION": 1, "STARTING": 1}, False),
        ({"PENDING_MIGRATION": 1, "RUNNING": 1, "STARTING": 1}, False),
        ({"PENDING_MIGRATION": 1, "RUNNING": 1}, True),
        ({"STOPPING": 1, "RUNNING": 2}, True),
        ({"PENDING_MIGRATION": 1}, False),
    ],
)
def test_a_replacement_runs_where_others_do_and_none_is_starting(states: dict[str, int], is_replaced: bool) -> None:
    assert replaced(states) is is_replaced


def test_a_node_is_gone_when_its_notice_says_so_or_at_no_known_time() -> None:
    assert deadline_ms(Notice(Kind.INTERRUPTION, "aws", 120.0), 1000.0) == 1_120_000
    assert deadline_ms(Notice(Kind.REBALANCE, "aws"), 1000.0) == 0


def test_a_hint_only_has_replacements_started(drained: list[Notice]) -> None:
    async def scenario() -> list[FromAttempt]:
        replica = EngineReplica("f-1", {"f": SPEC}, "")
        replica.noticed(Notice(Kind.REBALANCE, "aws"))
        found = [answer async for answer in answers(replica, Sequence("s", (1,), 3, sampling=GREEDY))]
        await replica.close()
        return found

    assert tokens_of(asyncio.run(scenario())) == expected((1,), 3)
    assert [notice.kind for notice in drained] == [Kind.REBALANCE]


def test_a_listener_that_leaves_frees_the_slot(drained: list[Notice]) -> None:
    async def scenario() -> None:
        replica = EngineReplica("f-1", {"f": SPEC}, "")
        stream = replica.generate(encode(Attempt("f", Sequence("s", (1, 2), 4000, sampling=GREEDY), 0)))
        async for _ in stream:
            break
        Toy.gate.set()
        await stream.aclose()  # type: ignore[attr-defined]
        while replica.record_autoscaling_stats()["num_running"]:
            await asyncio.sleep(0)
        await replica.close()

    asyncio.run(scenario())


def test_a_function_that_is_unloaded_hands_over_what_it_runs(drained: list[Notice]) -> None:
    async def scenario() -> list[FromAttempt]:
        replica = EngineReplica("f-1", {"f": SPEC}, "")
        found: list[FromAttempt] = []
        async for answer in answers(replica, Sequence("s", (1, 2), 4000, sampling=GREEDY)):
            if not found:
                unloading = asyncio.create_task(replica.unload("f"))
                await asyncio.sleep(0)
                Toy.gate.set()
                await unloading
            found.append(answer)
        return found

    found = asyncio.run(scenario())
    assert isinstance(found[-1], HandOver)
    assert tokens_of(found) == expected((1, 2), 4000)[: len(tokens_of(found))]


def test_a_function_that_was_loaded_while_its_replica_left_takes_nothing(drained: list[Notice]) -> None:
    async def scenario() -> list[FromAttempt]:
        class Slow(EngineReplica):
            async def engine(self, function: str) -> Loaded:
                self.noticed(Notice(Kind.INTERRUPTION, "file", 3600.0))
                await left(self)
                return await super().engine(function)

        replica = Slow("f-1", {"f": SPEC}, "")
        found = [answer async for answer in answers(replica, Sequence("s", (5,), 3, sampling=GREEDY), epoch=2)]
        assert replica.record_autoscaling_stats()["num_running"] == 0
        await replica.close()
        return found

    assert asyncio.run(scenario()) == [HandOver(2, "f-1")]


def test_a_function_is_loaded_beside_the_streams_of_others(drained: list[Notice]) -> None:
    loading, may_load = threading.Event(), threading.Event()
    engines: list[Loaded] = []

    def slow_engine(spec: ReplicaSpec) -> Loaded:
        loading.set()
        may_load.wait()
        engines.append(Toy(spec))
        return engines[-1]

    async def scenario() -> list[list[int]]:
        replica = EngineReplica("f-1", {"f": SPEC, "g": SPEC}, "")
        await replica.open("f", Toy)
        gone = asyncio.create_task(replica.open("g", slow_engine))
        await asyncio.to_thread(loading.wait)
        beside = [answer async for answer in answers(replica, Sequence("s", (5,), 3, sampling=GREEDY))]
        gone.cancel()
        waiting = asyncio.create_task(replica.open("g", slow_engine))
        await asyncio.sleep(0)
        may_load.set()
        assert await waiting is engines[0]
        assert gone.cancelled()
        payload = encode(Attempt("g", Sequence("t", (7,), 3, sampling=GREEDY), 0))
        behind = [read_answer(answer) async for answer in replica.generate(payload)]
        await replica.close()
        return [tokens_of(beside), tokens_of(behind)]

    assert asyncio.run(scenario()) == [expected((5,), 3), expected((7,), 3)]
    assert len(engines) == 1


def test_a_function_that_could_not_be_loaded_is_tried_again(drained: list[Notice]) -> None:
    def broken(spec: ReplicaSpec) -> Loaded:
        raise ArtifactError(Path("f"), "it is damaged")

    async def scenario() -> None:
        replica = EngineReplica("f-1", {"f": SPEC, "g": SPEC}, "")
        with pytest.raises(ArtifactError, match="damaged"):
            await replica.open("f", broken)
        assert isinstance(await replica.open("f", Toy), Toy)
        await replica.close()

    asyncio.run(scenario())


def test_a_replica_leaves_although_ray_cannot_drain_its_node(
    drained: list[Notice], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_engine, "drain_this_node", ray_node.drain_this_node)
    monkeypatch.setitem(sys.modules, "ray", None)  # another Ray, whose private parts are elsewhere

    async def scenario() -> list[FromAttempt]:
        replica = EngineReplica("f-1", {"f": SPEC}, "")
        replica.noticed(Notice(Kind.INTERRUPTION, "aws", 3600.0))
        await left(replica)
        found = [answer async for answer in answers(replica, Sequence("s", (5,), 3, sampling=GREEDY))]
        await replica.close()
        return found

    assert asyncio.run(asyncio.wait_for(scenario(), 60)) == [HandOver(0, "f-1")]
