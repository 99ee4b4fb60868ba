"""The queue in front of the slots: in order within a tenant, fair by tokens between tenants, nobody starves."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from pilotlight.engine.fair_queue import FairQueue
from pilotlight.engine.policy import Policy
from simulation import Simulation, make


@dataclass(frozen=True)
class Job:
    tenant: str | None
    number: int
    cost: int


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 5000)), min_size=1))
def test_between_tenants_that_wait_the_gap_is_bounded(asked: list[tuple[str, int]]) -> None:
    queue: FairQueue[Job] = FairQueue()
    jobs = [Job(tenant, number, cost) for number, (tenant, cost) in enumerate(asked)]
    left = {tenant: deque(job for job in jobs if job.tenant == tenant) for tenant in "abcd"}
    for job in jobs:
        queue.add(job)
    served: Counter[str | None] = Counter()
    largest = max(job.cost for job in jobs)
    while queue:
        waiting = [tenant for tenant in "abcd" if left[tenant]]
        job = queue.pop()
        assert job is left[job.tenant or ""].popleft()
        queue.charge(job.tenant, job.cost)
        served[job.tenant] += job.cost
        if len(waiting) == 4:
            assert max(served.values()) - min(served[t] for t in "abcd") <= 2 * largest
    assert not any(left.values())


def test_one_who_asks_seldom_is_not_kept_waiting_by_one_who_asks_much() -> None:
    simulation = Simulation(2, Policy(max_chunk_tokens=64))
    for number in range(300):
        simulation.scheduler.add(make(f"flood{number}", 60, 4, "flood"))
    for _ in range(100):
        simulation.step()
    simulation.scheduler.add(make("rare", 60, 4, "rare"))
    num_before = len(simulation.finished)
    while "rare" not in simulation.finished:
        simulation.step()
    assert len(simulation.finished) - num_before < 25


def test_debts_are_forgotten_when_nobody_waits() -> None:
    queue: FairQueue[Job] = FairQueue()
    queue.add(Job("a", 0, 1))
    queue.charge("a", 10**6)
    queue.pop()
    queue.charge("a", 10**6)
    jobs = [Job("b", 1, 1), Job("a", 2, 1), Job("b", 3, 1)]
    for job in jobs:
        queue.add(job)
    served = []
    while queue:
        served.append(queue.pop())
        queue.charge(served[-1].tenant, 1)
    assert served == jobs


def test_what_goes_back_to_the_front_is_next() -> None:
    queue: FairQueue[Job] = FairQueue()
    jobs = [Job("a", number, 1) for number in range(3)]
    for job in jobs[1:]:
        queue.add(job)
    queue.add_front(jobs[0])
    assert [queue.pop() for _ in jobs] == jobs
