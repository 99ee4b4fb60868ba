"""The scheduler under random events: slots stay dense, order is kept, nobody starves, nothing leaks."""

from hypothesis import given
from hypothesis import strategies as st

from pilotlight.engine.scheduler import Active, Scheduler
from pilotlight.request import FinishReason, Sequence

NUM_SLOTS = 3


def make(name: str, num_prompt: int = 5, max_new_tokens: int = 4) -> Active:
    return Active(Sequence(name, tuple(range(1, num_prompt + 1)), max_new_tokens, stop_ids=frozenset({0})))


class Simulation:
    """Runs plans against a picture of the slots, as the engine would against the cache."""

    def __init__(self) -> None:
        self.scheduler = Scheduler(NUM_SLOTS, max_chunk_tokens=3)
        self.slots: list[tuple[str, int] | None] = [None] * NUM_SLOTS  # whose cache, how many tokens
        self.started: list[str] = []
        self.finished: dict[str, FinishReason] = {}

    def step(self) -> None:
        plan = self.scheduler.schedule()
        for slot, active in enumerate(plan.decode):
            assert self.slots[slot] == (active.sequence.id, active.num_cached)
            assert active.num_uncached == 1
            self.slots[slot] = (active.sequence.id, active.num_cached + 1)
        if plan.prefill:
            chunk = plan.prefill
            name, held = chunk.active.sequence.id, chunk.active.num_cached
            assert chunk.slot == len(plan.decode)
            assert 0 < chunk.num_tokens <= 3
            if held == 0:
                self.started.append(name)
            else:
                assert self.slots[chunk.slot] == (name, held)
            self.slots[chunk.slot] = (name, held + chunk.num_tokens)
        for active in plan.decode:
            self.scheduler.commit_decode(active, 7)
        if plan.prefill:
            self.scheduler.commit_prefill(plan.prefill, 7 if plan.prefill.completes_prompt else None)
        for active in list(self.scheduler):
            if active.finish:
                self.finished[active.sequence.id] = active.finish
                self.remove(active)

    def remove(self, active: Active) -> None:
        for move in self.scheduler.remove(active):
            held = self.slots[move.source]
            assert held is not None
            assert held[1] == move.num_tokens
            self.slots[move.target] = held


@given(st.lists(st.one_of(st.just("step"), st.integers(1, 9), st.tuples(st.just("cancel"), st.integers(0, 20)))))
def test_random_events_keep_slots_dense_and_order(events: list[object]) -> None:
    simulation = Simulation()
    submitted: list[str] = []
    cancelled: set[str] = set()
    for event in events:
        if event == "step":
            simulation.step()
        elif isinstance(event, int):
            submitted.append(f"s{len(submitted)}")
            simulation.scheduler.add(make(submitted[-1], num_prompt=event, max_new_tokens=1 + event % 4))
        elif isinstance(event, tuple) and (actives := list(simulation.scheduler)):
            active = actives[int(event[1]) % len(actives)]
            cancelled.add(active.sequence.id)
            simulation.remove(active)
    for _ in range(20 * len(submitted)):
        simulation.step()
    assert not simulation.scheduler.schedule()
    assert len(simulation.scheduler) == 0
    assert simulation.started == [name for name in submitted if name in simulation.started]
    assert set(simulation.finished) | cancelled == set(submitted)


def test_a_waiting_prompt_is_prefilled_beside_the_running_ones() -> None:
    scheduler = Scheduler(NUM_SLOTS, max_chunk_tokens=3)
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
    scheduler = Scheduler(num_slots=1, max_chunk_tokens=8)
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
