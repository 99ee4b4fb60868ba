"""The pool without processes: starts, streams, deaths, limits, sleep."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Awaitable, Callable
from functools import wraps

import msgspec
import pytest

from fake_replicas import VOCAB_SIZE, FakeLauncher
from pilotlight.engine.fake import next_token
from pilotlight.engine.policy import Policy as EnginePolicy
from pilotlight.errors import Draining, QueueFull, StartFailed
from pilotlight.host.autoscaler import Policy, Sleep
from pilotlight.host.back_off import MAX_KILLED_STARTS
from pilotlight.host.journal import MAX_FRUITLESS_MOVES
from pilotlight.host.machine import Machine
from pilotlight.host.pool import Pool
from pilotlight.host.pool_settings import PoolSettings
from pilotlight.host.routing import prefix_keys
from pilotlight.host.wire import ReplicaSpec
from pilotlight.mailbox import TokenStream
from pilotlight.request import FinishReason, SamplingParams, Sequence, TokenEvent

SPEC = ReplicaSpec("f", "nowhere", 2, 64, EnginePolicy(8), 1, None, 0.0)
SETTINGS = PoolSettings("f", SPEC, Policy(2, sleep=Sleep.DEEP), 100, 100, max_queued_requests=4)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Stage:
    """A pool, what it launched, and a clock."""

    def __init__(self, settings: PoolSettings = SETTINGS, budget_bytes: int = 10**12) -> None:
        self.clock = Clock()
        self.launcher = FakeLauncher()
        self.machine = Machine(budget_bytes, free_bytes=lambda: 10**12)
        self.pool = Pool(settings, self.launcher, self.machine, clock=self.clock)
        self.events: dict[str, list[TokenEvent]] = {}
        self._readers: list[asyncio.Task[None]] = []

    def submit(self, name: str, prompt: tuple[int, ...] = (1, 2), max_new_tokens: int = 4, tenant: str = "") -> None:
        sequence = Sequence(name, prompt, max_new_tokens, sampling=SamplingParams(temperature=0.0), tenant=tenant)
        events = self.events[name] = []
        self._readers.append(asyncio.create_task(_collect(self.pool.submit(sequence), events)))

    def tokens(self, name: str) -> list[int]:
        return [event.token_id for event in self.events[name] if event.token_id is not None]

    def finish(self, name: str) -> FinishReason | None:
        return self.events[name][-1].finish if self.events[name] else None

    async def settle(self) -> None:
        """Let everything run that can."""
        for _ in range(20):
            await asyncio.sleep(0)

    async def run_out(self) -> None:
        """Step whatever lives until nothing is open."""
        while self.pool.num_open:
            for replica in self.launcher.living:
                replica.step() if replica.alive else replica.start()
            await self.settle()
        await asyncio.gather(*self._readers)


async def _collect(stream: TokenStream, events: list[TokenEvent]) -> None:
    async for event in stream:
        events.append(event)


def expected(prompt: tuple[int, ...], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, VOCAB_SIZE))
    return tokens[len(prompt) :]


def on_a_loop(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    @wraps(test)
    def run() -> None:
        asyncio.run(test())  # type: ignore[arg-type]

    return run


@on_a_loop
async def test_nothing_runs_before_a_request_and_all_share_one_start() -> None:
    stage = Stage()
    stage.pool.tick()
    assert stage.launcher.launched == []
    for name in "abc":
        stage.submit(name)
    assert len(stage.launcher.launched) == 1
    stage.clock.now += 0.25
    stage.launcher.launched[0].start()
    await stage.run_out()
    for name in "abc":
        assert stage.tokens(name) == expected((1, 2), 4)
        start = stage.events[name][0].start
        assert start is not None
        assert (start.waited_ms, start.session_ms) == (250.0, 3.0)
    stage.submit("later")
    await stage.run_out()
    assert stage.events["later"][0].start is None
    assert stage.events["later"][0].replica_id == stage.launcher.launched[0].spec.replica_id
    assert len(stage.launcher.launched) == 1


@on_a_loop
async def test_a_replica_that_dies_is_replaced_and_its_streams_go_on() -> None:
    stage = Stage()
    stage.submit("a", max_new_tokens=6)
    first = stage.launcher.launched[0]
    first.start()
    first.step()
    first.step()
    first.die()
    second = stage.launcher.launched[1]
    second.start()
    assert second.sequences["a"].emitted_ids == tuple(expected((1, 2), 2))
    await stage.run_out()
    assert stage.tokens("a") == expected((1, 2), 6)
    assert stage.finish("a") is FinishReason.LENGTH
    assert [event.num_recomputed_tokens for event in stage.events["a"]] == [0, 0, 4, 0, 0, 0]


@on_a_loop
async def test_moved_sequences_come_first_and_in_order() -> None:
    stage = Stage(settings_with(max_queued_requests=10))
    for number in range(5):
        stage.submit(str(number))
    first = stage.launcher.launched[0]
    first.start()
    first.step()
    assert list(first.running) == ["0", "1", "2"]
    first.die()
    second = stage.launcher.launched[1]
    second.start()
    assert list(second.running) == ["0", "1", "2"]
    await stage.run_out()
    assert all(stage.tokens(str(number)) == expected((1, 2), 4) for number in range(5))


@on_a_loop
async def test_a_sequence_that_gets_nowhere_ends_with_an_error() -> None:
    stage = Stage()
    stage.submit("poison")
    for number in range(MAX_FRUITLESS_MOVES):
        stage.launcher.launched[number].start()
        stage.launcher.launched[number].die()
    await stage.settle()
    assert stage.finish("poison") is FinishReason.ERROR
    assert stage.launcher.living == []


@on_a_loop
async def test_random_deaths_change_no_token() -> None:
    for seed in range(30):
        rng = random.Random(seed)
        stage = Stage(settings_with(max_queued_requests=1000, policy=Policy(2, max_replicas=3, sleep=Sleep.DEEP)))
        asked: dict[str, tuple[tuple[int, ...], int]] = {}
        aborted: set[str] = set()
        for number in range(40):
            name = f"s{number}"
            asked[name] = (tuple(rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 9))), rng.randint(1, 12))
            stage.submit(name, *asked[name], tenant=rng.choice("xyz"))
            if rng.random() < 0.1:
                aborted.add(victim := rng.choice(list(asked)))
                stage.pool.abort(victim)
            for replica in list(stage.launcher.living):
                if not replica.alive:
                    replica.start()
                elif rng.random() < 0.12 and replica.num_steps:
                    replica.die()
                else:
                    replica.step()
            stage.clock.now += rng.random()
            stage.pool.tick()
            await stage.settle()
        await stage.run_out()
        for name, (prompt, max_new_tokens) in asked.items():
            if name in aborted:
                assert stage.tokens(name) == expected(prompt, len(stage.tokens(name)))
            else:
                assert stage.tokens(name) == expected(prompt, max_new_tokens), (seed, name)
                assert stage.finish(name) is FinishReason.LENGTH


@on_a_loop
async def test_a_failed_start_is_told_to_all_waiters_and_not_tried_again_at_once() -> None:
    stage = Stage()
    for name in "abc":
        stage.submit(name)
    stage.launcher.launched[0].fail("model.onnx: no graph")
    await stage.settle()
    for name in "abc":
        assert stage.finish(name) is FinishReason.ERROR
        assert stage.events[name][-1].error == "the function cannot start: model.onnx: no graph"
        assert stage.events[name][-1].retry_after_s == 1.0
    with pytest.raises(StartFailed, match="no graph"):
        stage.submit("d")
    assert len(stage.launcher.launched) == 1
    stage.clock.now += 1.5
    stage.submit("e")
    assert len(stage.launcher.launched) == 2
    stage.launcher.launched[1].fail("model.onnx: no graph")
    await stage.settle()
    assert stage.events["e"][-1].retry_after_s == 2.0, "the back-off grows"


@on_a_loop
async def test_a_start_that_is_killed_is_tried_again_a_few_times() -> None:
    stage = Stage()
    stage.submit("a")
    for number in range(MAX_KILLED_STARTS):
        assert not stage.events["a"]
        stage.launcher.launched[number].die()
    await stage.settle()
    assert "died while they started" in str(stage.events["a"][-1].error)


@on_a_loop
async def test_the_queue_is_bounded_in_requests_and_in_tokens() -> None:
    stage = Stage(settings_with(max_queued_tokens=40))
    for number in range(6):
        stage.submit(str(number))
    with pytest.raises(QueueFull) as refusal:
        stage.submit("7")
    assert refusal.value.retry_after_s >= 1
    await stage.run_out()
    stage = Stage(settings_with(max_queued_tokens=40))
    stage.submit("a", prompt=(1,) * 30)
    with pytest.raises(QueueFull, match="prompt tokens"):
        stage.submit("b", prompt=(1,) * 30)
    await stage.run_out()


@on_a_loop
async def test_an_aborted_request_leaves_the_queue_at_once() -> None:
    stage = Stage()
    for number in range(4):
        stage.submit(str(number))
    stage.pool.abort("3")
    await stage.settle()
    assert stage.finish("3") is FinishReason.CANCELLED
    assert stage.pool.num_queued == 3
    stage.launcher.launched[0].start()
    stage.pool.abort("0")
    await stage.settle()
    assert stage.finish("0") is FinishReason.CANCELLED
    await stage.run_out()


@on_a_loop
async def test_a_tenant_with_many_requests_does_not_starve_another() -> None:
    stage = Stage(settings_with(max_queued_requests=100))
    for number in range(40):
        stage.submit(f"heavy{number}", tenant="heavy")
    stage.submit("light0", tenant="light")
    stage.launcher.launched[0].start()
    while stage.finish("light0") is None:
        stage.launcher.launched[0].step()
        await stage.settle()
    assert sum(1 for name in stage.events if stage.finish(name)) <= 6
    await stage.run_out()


@on_a_loop
async def test_an_idle_replica_leaves_and_comes_back() -> None:
    stage = Stage()
    stage.submit("a")
    await stage.run_out()
    stage.clock.now += 299
    stage.pool.tick()
    assert len(stage.launcher.living) == 1
    stage.pool.signals()
    stage.clock.now += 2
    stage.pool.tick()
    assert stage.launcher.living == []
    assert stage.machine.taken_bytes == 0
    stage.submit("b")
    await stage.run_out()
    assert stage.tokens("b") == expected((1, 2), 4)


@on_a_loop
async def test_light_sleep_keeps_a_template_for_a_while() -> None:
    stage = Stage(settings_with(policy=Policy(2, idle_timeout_s=10, light_timeout_s=100)))
    stage.submit("a")
    await stage.run_out()
    stage.clock.now += 11
    stage.pool.tick()
    assert len(stage.launcher.living) == 1, "it waits for the template"
    (template,) = stage.launcher.templates
    template.settle()
    assert stage.launcher.living == []
    assert stage.pool.fleet.sleep.value == "light"
    stage.submit("b")
    await stage.run_out()
    assert stage.launcher.launched[-1].template is template
    stage.clock.now += 11
    stage.pool.tick()
    assert stage.launcher.living == []
    assert len(stage.launcher.templates) == 1
    stage.clock.now += 100
    stage.pool.tick()
    assert template.gone
    assert stage.pool.fleet.sleep.value == "deep"
    assert stage.machine.taken_bytes == 0
    stage.submit("c")
    await stage.run_out()
    assert stage.launcher.launched[-1].template is None


@on_a_loop
async def test_a_request_while_the_template_is_made_finds_the_replica() -> None:
    stage = Stage(settings_with(policy=Policy(2, idle_timeout_s=10)))
    stage.submit("a")
    await stage.run_out()
    stage.clock.now += 11
    stage.pool.tick()
    stage.submit("b")
    stage.launcher.templates[0].settle()
    await stage.run_out()
    assert stage.tokens("b") == expected((1, 2), 4)
    assert len(stage.launcher.launched) == 1


@on_a_loop
async def test_a_template_that_cannot_be_made_means_deep_sleep() -> None:
    stage = Stage(settings_with(policy=Policy(2, idle_timeout_s=10)))
    stage.submit("a")
    await stage.run_out()
    stage.clock.now += 11
    stage.pool.tick()
    stage.launcher.templates[0].listener.template_ended("no graph")
    assert stage.launcher.living == []
    assert stage.pool.fleet.sleep.value == "deep"


@on_a_loop
async def test_a_silent_replica_is_killed_and_a_slow_one_is_not() -> None:
    stage = Stage()
    stage.submit("a", max_new_tokens=3)
    replica = stage.launcher.launched[0]
    replica.start()
    for _ in range(60):
        replica.num_steps += 1
        replica.beat()
        stage.pool.tick()
    assert not replica.gone, "it beats and makes steps"
    for _ in range(31):
        replica.beat()
        stage.pool.tick()
    assert replica.killed, "it beats, has work, and makes no step"
    await stage.run_out()
    assert stage.tokens("a") == expected((1, 2), 3)


@on_a_loop
async def test_a_start_that_hangs_is_killed() -> None:
    stage = Stage()
    stage.submit("a")
    for _ in range(121):
        stage.pool.tick()
    assert stage.launcher.launched[0].killed
    await stage.run_out()


@on_a_loop
async def test_more_replicas_come_with_the_load_and_leave_after_it() -> None:
    policy = Policy(2, max_replicas=3, scale_in_after_s=10, idle_timeout_s=100, sleep=Sleep.DEEP)
    stage = Stage(settings_with(policy=policy, max_queued_requests=100))
    stage.launcher.on_launch = lambda replica: replica.start()
    stage.submit("first")
    stage.pool.measures.served(5.0)
    for number in range(20):
        stage.submit(str(number), max_new_tokens=9)
    stage.pool.tick()
    await stage.settle()
    assert len(stage.launcher.living) == 3
    await stage.run_out()
    stage.submit("last", max_new_tokens=9)
    for _ in range(12):
        stage.clock.now += 1
        stage.pool.tick()
    assert len(stage.launcher.living) == 1
    await stage.run_out()


@on_a_loop
async def test_routing_prefers_the_replica_that_holds_the_prefix() -> None:
    policy = Policy(2, min_replicas=2, max_replicas=2, sleep=Sleep.DEEP)
    spec = msgspec.structs.replace(SPEC, policy=EnginePolicy(8, prefix_cache_bytes=1000), max_context_tokens=1000)
    stage = Stage(settings_with(policy=policy, spec=spec))
    stage.launcher.on_launch = lambda replica: replica.start()
    stage.pool.act()
    await stage.settle()
    prompt = tuple(range(128))
    stage.submit("a", prompt)
    (home,) = [replica for replica in stage.launcher.living if replica.running]
    stage.submit("elsewhere", (5,) * 10)
    (other,) = [replica for replica in stage.launcher.living if replica is not home]
    assert list(other.running) == ["elsewhere"]
    stage.submit("at the same time", (*prompt, 6))
    assert "at the same time" in home.running, "it is about to be computed there"
    await stage.run_out()
    stage.submit("busy", (4,) * 20, max_new_tokens=9)
    assert list(home.running) == ["busy"]
    stage.submit("again", (*prompt, 7))
    assert list(home.running) == ["busy", "again"], "it has more to do, but less than computing all of it again"
    await stage.run_out()
    home.prefixes = dict.fromkeys(prefix_keys(Sequence("", prompt, 1, tenant=""), spec.policy), False)
    stage.submit("first", (9,) * 3)
    await stage.run_out()
    stage.submit("of another tenant", (*prompt, 7), tenant="y")
    stage.submit("evicted", (*prompt, 7))
    assert "of another tenant" in home.running
    assert list(other.running) == ["evicted"], "one each: neither finds anything"
    await stage.run_out()


@on_a_loop
async def test_no_replica_is_made_beyond_the_memory_and_idle_ones_make_room() -> None:
    stage = Stage(budget_bytes=60_000_000)
    other_launcher = FakeLauncher(lambda replica: replica.start())
    other = Pool(settings_with(name="g"), other_launcher, stage.machine, clock=stage.clock)
    other.hold(1)
    await stage.settle()
    assert len(other_launcher.living) == 1
    other.hold(0)
    stage.submit("a")
    await stage.settle()
    assert other_launcher.living == [], "it was idle"
    assert len(stage.launcher.living) == 1
    await stage.run_out()
    small = Stage(budget_bytes=1_000_000)
    small.submit("b")
    await small.settle()
    assert small.finish("b") is FinishReason.ERROR
    with pytest.raises(StartFailed, match="may take 1 MB together"):
        small.submit("c")


@on_a_loop
async def test_closing_cancels_and_ends_all() -> None:
    stage = Stage()
    for name in "abc":
        stage.submit(name)
    stage.launcher.launched[0].start()
    stage.launcher.launched[0].step()
    await stage.pool.close()
    await stage.settle()
    assert {stage.finish(name) for name in "abc"} == {FinishReason.CANCELLED}
    assert stage.launcher.living == []
    with pytest.raises(Draining):
        stage.submit("d")


def settings_with(**changes: object) -> PoolSettings:
    return dataclasses.replace(SETTINGS, **changes)  # type: ignore[arg-type]


@on_a_loop
async def test_a_template_that_has_just_died_costs_no_request() -> None:
    stage = Stage(settings_with(policy=Policy(2, idle_timeout_s=10)))
    stage.submit("a")
    await stage.run_out()
    stage.clock.now += 11
    stage.pool.tick()
    (template,) = stage.launcher.templates
    template.settle()
    template.dead = True
    stage.submit("b")
    await stage.run_out()
    assert stage.tokens("b") == expected((1, 2), 4)
    assert stage.launcher.launched[-1].template is None
