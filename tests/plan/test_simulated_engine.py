"""The simulated engine: the scheduler's rules hold, and many steps in one event give what they give one by one."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotlight.engine.pace import DecodeGraph
from pilotlight.engine.policy import Policy
from pilotlight.engine.scheduler import StepPlan
from pilotlight.host.step_times import StepTimes
from pilotlight.plan.agenda import Agenda
from pilotlight.plan.engine import Capacity, Event, SimulatedEngine
from pilotlight.plan.prompts import Prompt
from pilotlight.plan.trace import Arrival
from pilotlight.request import FinishReason, Sequence
from planning import STEPS

NUM_SLOTS = 4
CAPACITY = Capacity(NUM_SLOTS, 512, 1000)
arrivals = st.lists(
    st.builds(Arrival, st.floats(0, 3), st.integers(1, 300), st.integers(1, 60), st.sampled_from([None, "a", "b"])),
    min_size=1,
    max_size=25,
)
policies = st.builds(
    Policy,
    max_chunk_tokens=st.sampled_from([32, 128]),
    kv_budget_tokens=st.sampled_from([None, 400, 700]),
    deterministic=st.booleans(),
)


@dataclass
class Watched:
    """An engine with a look at each of its plans."""

    policy: Policy
    coalesce: bool = True
    first: dict[str, float] = field(default_factory=dict)
    ended: dict[str, float] = field(default_factory=dict)
    agenda: Agenda = field(default_factory=Agenda)

    def run(self, given: list[Arrival]) -> SimulatedEngine:
        engine = SimulatedEngine(
            CAPACITY, self.policy, StepTimes(STEPS), self.agenda, self.emit, coalesce=self.coalesce
        )
        schedule = engine.scheduler.schedule

        def checked() -> StepPlan:
            plan = schedule()
            assert engine.scheduler.num_in_slots <= NUM_SLOTS
            if self.policy.kv_budget_tokens is not None and engine.scheduler.num_in_slots > 1:
                assert engine.scheduler.num_committed_tokens <= self.policy.kv_budget_tokens
            return plan

        engine.scheduler.schedule = checked  # type: ignore[method-assign]
        for number, arrival in enumerate(given):
            sequence = Sequence(str(number), Prompt.of(number, arrival), arrival.num_new_tokens, tenant=arrival.tenant)
            self.agenda.at(arrival.at_s, engine.submit, sequence)
        self.agenda.run()
        return engine

    def emit(self, events: list[Event]) -> None:
        for name, event in events:
            self.first.setdefault(name, self.agenda.now)
            if event.finish is not None:
                assert event.finish is FinishReason.LENGTH
                assert name not in self.ended
                self.ended[name] = self.agenda.now


@given(arrivals, policies)
@settings(deadline=None, max_examples=60)
def test_everybody_is_served_once_within_slots_and_budget(given: list[Arrival], policy: Policy) -> None:
    watched = Watched(policy)
    engine = watched.run(given)
    assert watched.ended.keys() == {str(number) for number in range(len(given))}
    assert engine.num_open == len(engine.scheduler) == engine.scheduler.num_cached_tokens == 0
    assert engine.num_tokens >= sum(one.num_new_tokens for one in given)
    if not engine.scheduler.num_preemptions:
        assert engine.num_tokens == sum(one.num_new_tokens for one in given)
    for number, one in enumerate(given):
        assert one.at_s < watched.first[str(number)] <= watched.ended[str(number)]


@given(arrivals, policies)
@settings(deadline=None, max_examples=60)
def test_many_steps_in_one_event_are_the_same_steps(given: list[Arrival], policy: Policy) -> None:
    at_once, one_by_one = Watched(policy), Watched(policy, coalesce=False)
    few, many = at_once.run(given), one_by_one.run(given)
    assert few.num_steps == many.num_steps
    assert few.scheduler.num_preemptions == many.scheduler.num_preemptions
    for name, instant in one_by_one.ended.items():
        assert at_once.ended[name] == pytest.approx(instant, rel=1e-6)
        assert at_once.first[name] == pytest.approx(one_by_one.first[name], rel=1e-6)


def test_a_lone_request_takes_what_was_measured() -> None:
    watched = Watched(Policy(max_chunk_tokens=256))
    watched.run([Arrival(0.0, 256, 3)])
    overhead_s = 0.0006
    prefill_s = (2 + 64) / 1000 + overhead_s
    assert watched.first["0"] == pytest.approx(prefill_s)
    steps_s = 1.5 * (12 + 256 / 200) / 1000 + (12 + 257 / 200) / 1000 + 2 * overhead_s  # the first behind the prompt
    assert watched.ended["0"] == pytest.approx(prefill_s + steps_s)


def test_long_runs_are_few_events() -> None:
    watched = Watched(Policy())
    engine = watched.run([Arrival(0.0, 100, 400)])
    assert engine.num_steps == 400
    assert watched.agenda.num_done < 6


def test_shared_beginnings_are_not_computed_again() -> None:
    policy = Policy(max_chunk_tokens=64, prefix_cache_bytes=1 << 20)
    watched = Watched(policy)
    shared = [Arrival(at, 300, 2, None, (1, 2, 3, 4), 75.0) for at in (0.0, 5.0)]
    engine = watched.run([*shared, Arrival(10.0, 300, 2, None, (1, 9, 10, 11), 75.0)])
    assert engine.scheduler.num_prefix_hit_tokens == 256 + 64
    assert watched.first["1"] - 5.0 < (watched.first["0"]) / 3


def test_the_lines_go_through_what_was_measured() -> None:
    times = StepTimes(STEPS)
    assert times.decode_s(DecodeGraph.MAIN, 4, 400) == pytest.approx((10 + 8 + 8) / 1000)
    assert times.decode_s(DecodeGraph.MAIN, 3, 400) == pytest.approx((10 + 6 + 6) / 1000), "between 2 and 4"
    assert times.prefill_s(64, 100) == pytest.approx((2 + 16 + 0.64) / 1000)
    assert times.prefill_s(512, 0) == pytest.approx(2 * times.prefill_s(256, 0)), "beyond the largest, in proportion"
    three = sum(times.prefill_s(64, past) for past in (0, 64, 128))
    assert times.prefill_s(64, 0, 3) == pytest.approx(three)
    assert times.decode_s(DecodeGraph.MAIN, 2, 10, 3) == pytest.approx(
        sum(times.decode_s(DecodeGraph.MAIN, 2, context) for context in (10, 11, 12))
    )
    assert StepTimes(STEPS, speed=2.0).prefill_s(64, 0) == pytest.approx(times.prefill_s(64, 0) / 2)
