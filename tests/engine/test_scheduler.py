"""The scheduler under random events: slots stay dense, order and budget are kept, nobody starves, nothing leaks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotlight.engine.pace import DecodeGraph, Pace
from pilotlight.engine.policy import Policy
from pilotlight.engine.scheduler import Active, Scheduler
from pilotlight.request import FinishReason, Sequence
from simulation import TOKEN, Simulation, make

NUM_SLOTS = 3
EVENTS = st.lists(
    st.one_of(
        st.just("step"),
        st.tuples(st.integers(1, 9), st.sampled_from(["a", "b", None])),
        st.tuples(st.just("cancel"), st.integers(0, 20)),
    )
)
POLICIES = st.builds(
    Policy,
    max_chunk_tokens=st.integers(1, 4),
    kv_budget_tokens=st.sampled_from([None, 13, 20, 30]),
    deterministic=st.booleans(),
    speculates=st.booleans(),
)


def measured_pace() -> Pace:
    """Return speeds with which nearly every draft pays."""
    pace = Pace()
    for num_tokens in (1, 2, 4, 8, 16):
        pace.observe_step(num_tokens, 0.01)
        for _ in range(2):
            pace.observe_verify(DecodeGraph.MAIN, num_tokens, 0.001)
    return pace


@given(EVENTS, POLICIES)
def test_random_events_keep_slots_dense_order_and_budget(events: list[object], policy: Policy) -> None:
    simulation = Simulation(NUM_SLOTS, policy, measured_pace())
    submitted: dict[str, str | None] = {}
    cancelled: set[str] = set()
    for event in events:
        if not isinstance(event, tuple):
            simulation.step()
        elif event[0] != "cancel":
            name = f"s{len(submitted)}"
            submitted[name] = event[1]
            simulation.scheduler.add(make(name, event[0], min(1 + event[0] % 4 * 5, 13 - event[0]), event[1]))
        elif actives := list(simulation.scheduler):
            active = actives[int(event[1]) % len(actives)]
            cancelled.add(active.sequence.id)
            simulation.remove(active)
    for _ in range(40 * len(submitted)):
        simulation.step()
    assert not simulation.scheduler.schedule()
    assert len(simulation.scheduler) == 0
    assert simulation.scheduler.num_cached_tokens == 0
    first_starts = list(dict.fromkeys(simulation.started))
    for tenant in ("a", "b", None):  # first come, first served within a tenant
        mine = [name for name, owner in submitted.items() if owner == tenant]
        assert [name for name in first_starts if name in mine] == [name for name in mine if name in first_starts]
    assert set(simulation.finished) | cancelled == set(submitted)


def test_answers_that_repeat_themselves_take_fewer_steps() -> None:
    steps = {}
    for speculates in (False, True):
        policy = Policy(max_chunk_tokens=4, kv_budget_tokens=150, speculates=speculates)
        simulation = Simulation(NUM_SLOTS, policy, measured_pace())
        for name in "abcd":
            simulation.scheduler.add(make(name, 5, 60))
        while len(simulation.finished) < 4:
            simulation.step()
        steps[speculates] = simulation.num_steps
        assert set(simulation.finished.values()) == {FinishReason.LENGTH}
    assert steps[True] < steps[False] / 2


def test_a_waiting_prompt_is_prefilled_beside_the_running_ones() -> None:
    scheduler = Scheduler(NUM_SLOTS, Policy(max_chunk_tokens=3), Pace())
    first, second = make("first", num_prompt=2), make("second", num_prompt=5)
    scheduler.add(first)
    scheduler.add(second)
    plan = scheduler.schedule()
    assert plan.prefill is not None
    scheduler.commit_prefill(plan.prefill, 7)
    plan = scheduler.schedule()
    assert plan.decode == (first,)
    assert plan.prefill is not None
    assert (plan.prefill.active, plan.prefill.slot, plan.prefill.num_tokens) == (second, 1, 3)
    assert not plan.prefill.completes_prompt


def test_nothing_is_admitted_while_all_slots_run() -> None:
    scheduler = Scheduler(1, Policy(max_chunk_tokens=8), Pace())
    scheduler.add(make("first"))
    plan = scheduler.schedule()
    assert plan.prefill is not None
    scheduler.commit_prefill(plan.prefill, 7)
    scheduler.add(make("second"))
    assert scheduler.schedule().prefill is None
    assert scheduler.num_prefill_backlog_tokens == 5


def test_finish_names_the_reason() -> None:
    active = make("a", max_new_tokens=2)
    assert active.finish is None
    active.tokens.append(7)
    assert active.finish is None
    active.tokens.append(7)
    assert active.finish is FinishReason.LENGTH
    active.tokens[-1] = 0
    assert active.finish is FinishReason.STOP


class TestPreemption:
    def test_the_youngest_makes_room_and_comes_back_first_with_its_tokens(self) -> None:
        simulation = Simulation(2, Policy(max_chunk_tokens=8, kv_budget_tokens=80))
        old, young, waiting = (make(name, 8, 40) for name in ("old", "young", "waiting"))
        for active in (old, young, waiting):
            simulation.scheduler.add(active)
        while simulation.scheduler.num_preemptions == 0:
            simulation.step()
        assert old in simulation.scheduler.running
        assert next(iter(simulation.scheduler.waiting)) is young
        assert young.num_cached == 0
        held = list(young.tokens)
        assert len(held) > 8
        while young.num_cached == 0:
            simulation.step()
        assert young.tokens[: len(held)] == held
        assert young.num_recomputed == len(held) - 1  # its newest token had not been in the cache yet
        while len(simulation.finished) < 3:
            simulation.step()
        assert simulation.finished == dict.fromkeys(("old", "young", "waiting"), FinishReason.LENGTH)

    def test_a_deterministic_answer_is_replayed_by_decode_steps(self) -> None:
        scheduler = Scheduler(2, Policy(max_chunk_tokens=8, deterministic=True), Pace())
        active = Active(Sequence("moved", (1, 2, 3), 9, emitted_ids=(4, 5)))
        scheduler.add(active)
        plan = scheduler.schedule()
        assert plan.prefill is not None
        assert plan.prefill.token_ids == [1, 2, 3]
        assert not plan.prefill.gives_token
        scheduler.commit_prefill(plan.prefill, None)
        fed = []
        for replays in (True, False):
            (row,) = scheduler.schedule().decode
            fed.append(row.next_token)
            assert row.replays == replays
            scheduler.commit_decode(row, None if replays else TOKEN)
        assert fed == [4, 5]
        assert active.tokens == [1, 2, 3, 4, 5, TOKEN]

    def test_what_was_emitted_elsewhere_is_read_with_the_prompt_and_counts(self) -> None:
        scheduler = Scheduler(2, Policy(max_chunk_tokens=8), Pace())
        active = Active(Sequence("moved", (1, 2, 3), 3, emitted_ids=(4, 5)))
        scheduler.add(active)
        plan = scheduler.schedule()
        assert plan.prefill is not None
        assert plan.prefill.token_ids == [1, 2, 3, 4, 5]
        assert active.finish is None
        scheduler.commit_prefill(plan.prefill, TOKEN)
        assert active.finish is FinishReason.LENGTH


class TestChunks:
    @pytest.mark.parametrize("num_prompt", [1, 2, 16, 17, 18, 33, 34])
    def test_never_one_token_alone_except_in_a_prompt_of_one(self, num_prompt: int) -> None:
        simulation = Simulation(1, Policy(max_chunk_tokens=16))
        simulation.scheduler.add(make("a", num_prompt, 1))
        while not simulation.finished:
            simulation.step()  # which checks every chunk

    def test_deterministic_chunks_end_where_they_always_end(self) -> None:
        def ends(policy: Policy, pace: Pace) -> list[int]:
            scheduler = Scheduler(4, policy, pace)
            for active in (make("running", 2, 90), make("read", 70, 1)):
                scheduler.add(active)
            found = []
            while any(a.sequence.id == "read" for a in (*scheduler.waiting, scheduler.prefilling) if a):
                plan = scheduler.schedule()
                for active in plan.decode:
                    scheduler.commit_decode(active, TOKEN)
                if plan.prefill:
                    found.append(plan.prefill.end)
                    scheduler.commit_prefill(plan.prefill, TOKEN if plan.prefill.gives_token else None)
            return found

        slow = Pace(max_inter_token_ms=100)
        slow.observe_prefill(100, 0.4)
        slow.observe_decode(DecodeGraph.MAIN, 1, 0.01)
        assert ends(Policy(32, 100), slow) == [2, 16, 32, 48, 64, 70]
        assert ends(Policy(32, 100, deterministic=True), slow) == [2, 32, 64, 70]


class TestDeterministicPlans:
    def decode(self, num_running: int, num_slots: int = 8) -> tuple[DecodeGraph, int | None]:
        pace = Pace(has_batch_graph=True)
        scheduler = Scheduler(num_slots, Policy(64, deterministic=True), pace)
        scheduler.running = [make(str(index)) for index in range(num_running)]
        plan = scheduler.schedule()
        return plan.graph, plan.padding

    def test_one_graph_for_every_batch(self) -> None:
        assert {self.decode(rows)[0] for rows in range(1, 9)} == {DecodeGraph.BATCH}
        assert {self.decode(rows, num_slots=3)[0] for rows in range(1, 4)} == {DecodeGraph.MAIN}

    def test_a_lone_row_is_padded_where_it_disturbs_nobody(self) -> None:
        assert self.decode(1)[1] == 0
        assert self.decode(2)[1] is None
        scheduler = Scheduler(2, Policy(4, deterministic=True), Pace())
        for active in (make("running", 2, 9), make("read", 9, 9)):
            scheduler.add(active)
        for expected in (None, 0, 4):
            plan = scheduler.schedule()
            assert plan.padding == expected
            for active in plan.decode:
                scheduler.commit_decode(active, TOKEN)
            assert plan.prefill is not None
            assert plan.padding is None or plan.prefill.past_tokens <= plan.padding < plan.prefill.end
            scheduler.commit_prefill(plan.prefill, TOKEN if plan.prefill.gives_token else None)
