"""Runs a scheduler's plans against a picture of the slots, as the engine would against the cache."""

from __future__ import annotations

from collections import Counter

from pilotlight.engine.pace import Pace
from pilotlight.engine.policy import Policy
from pilotlight.engine.scheduler import Active, Scheduler, SlotMove, StepPlan
from pilotlight.request import FinishReason, Sequence

TOKEN = 7
OTHER = 8
"""Now and then instead, so that some drafts are rejected."""


def make(name: str, num_prompt: int = 5, max_new_tokens: int = 4, tenant: str | None = None) -> Active:
    prompt = tuple(range(1, num_prompt + 1))
    return Active(Sequence(name, prompt, max_new_tokens, stop_ids=frozenset({0}), tenant=tenant))


class Simulation:
    """Checks every plan: each slot holds what the plan expects in it, and the budget is kept."""

    def __init__(self, num_slots: int, policy: Policy, pace: Pace | None = None) -> None:
        self.scheduler = Scheduler(num_slots, policy, pace or Pace())
        self.policy = policy
        self.slots: list[tuple[str, int] | None] = [None] * num_slots  # whose cache, how many tokens
        self.started: list[str] = []
        self.finished: dict[str, FinishReason] = {}
        self.served: Counter[str | None] = Counter()
        self.num_steps = self.num_drafted = 0

    def step(self) -> StepPlan:
        plan = self.scheduler.schedule()
        self.num_steps += 1
        self._move(plan.moves)
        self._run_decode(plan)
        self._run_prefill(plan)
        held = sum(active.num_cached for active in self.scheduler)
        assert held == self.scheduler.num_cached_tokens
        if self.policy.kv_budget_tokens is not None:
            assert held <= self.policy.kv_budget_tokens
        for active in list(self.scheduler):
            if active.finish:
                self.finished[active.sequence.id] = active.finish
                self.remove(active)
        return plan

    def remove(self, active: Active) -> None:
        self._move(self.scheduler.remove(active))

    def _run_decode(self, plan: StepPlan) -> None:
        if plan.drafts:
            self._run_drafts(plan)
            return
        for slot, active in enumerate(plan.decode):
            assert self.slots[slot] == (active.sequence.id, active.num_cached)
            self.slots[slot] = (active.sequence.id, active.num_cached + 1)
        for active in plan.decode:
            self.served[active.tenant] += 1
            self.scheduler.commit_decode(active, None if active.replays else self._token(active))

    def _run_drafts(self, plan: StepPlan) -> None:
        assert plan.prefill is None
        assert not self.policy.deterministic
        for slot, (active, draft) in enumerate(zip(plan.decode, plan.drafts, strict=True)):
            held, name = active.num_cached, active.sequence.id
            assert self.slots[slot] == (name, held)
            assert 1 + len(draft) <= active.sequence.max_new_tokens - active.num_generated
            budget = self.policy.kv_budget_tokens
            assert budget is None or self.scheduler.num_cached_tokens + 1 + len(draft) <= budget
            for token_id in (*draft, None):
                drawn = self._token(active)
                self.scheduler.commit_decode(active, drawn)
                if drawn != token_id or active.finish:
                    break
            self.slots[slot] = (name, active.num_cached)
            self.served[active.tenant] += active.num_cached - held
            self.num_drafted += len(draft)

    def _token(self, active: Active) -> int:
        return OTHER if active.num_generated % 13 == 12 else TOKEN

    def _run_prefill(self, plan: StepPlan) -> None:
        if plan.prefill is None:
            return
        chunk = plan.prefill
        name, held = chunk.active.sequence.id, chunk.active.num_cached
        assert chunk.slot == len(plan.decode)
        assert 0 < chunk.num_tokens <= max(2, self.policy.max_chunk_tokens)
        assert chunk.num_tokens > 1 or chunk.end == 1, "a chunk of one token"
        assert chunk.past_tokens <= held < chunk.end <= len(chunk.active.tokens)
        if held == 0:
            self.started.append(name)
        else:
            assert self.slots[chunk.slot] == (name, held)
        self.slots[chunk.slot] = (name, chunk.end)
        self.served[chunk.active.tenant] += chunk.num_tokens
        self.scheduler.commit_prefill(chunk, TOKEN if chunk.gives_token else None)

    def _move(self, moves: tuple[SlotMove, ...] | list[SlotMove]) -> None:
        for move in moves:
            held = self.slots[move.source]
            assert held is not None
            assert held[1] == move.num_tokens
            self.slots[move.target] = held
