"""An engine on simulated time: the real scheduler, and runs that take as long as was measured.

Nothing is decided here. The scheduler says what the next step is; as long as nothing can change its mind, the steps
behind it are the same, so that many of them are one event. What ends such a row of steps: an answer's last token, a
prompt's last chunk, the cache's budget, or a sequence that comes, which the engine looks at behind the present step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from pilotlight.engine.pace import Pace
from pilotlight.engine.policy import Policy
from pilotlight.engine.scheduler import PrefillChunk, Scheduler, StepPlan
from pilotlight.host.step_times import StepTimes
from pilotlight.plan.agenda import Agenda
from pilotlight.plan.desk import Desk
from pilotlight.plan.prompts import TOKEN, HeldBytes, NamedPrefixes, SimulatedActive
from pilotlight.request import FinishReason, Sequence, Signals, TokenEvent

LEAST_S = 1e-5
Event = tuple[str, TokenEvent]
Emit = Callable[[list[Event]], None]


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a replica's cache holds."""

    num_slots: int
    max_context_tokens: int
    kv_bytes_per_token: int


@dataclass(slots=True)
class Run:
    """The same step so often: ``num_steps`` of them take ``first_s`` and then ``more_s`` more each time."""

    plan: StepPlan
    began_at: float
    first_s: float
    more_s: float
    num_steps: int
    tokens_per_s: float = 0.0

    def after_s(self, num_steps: int) -> float:
        return num_steps * self.first_s + self.more_s * num_steps * (num_steps - 1) / 2

    def steps_begun(self, now: float) -> int:
        """Return how many steps have begun by now, one at least."""
        half, passed_s = self.more_s / 2, now - self.began_at
        if half > 1e-15:
            linear = self.first_s - half
            done = (math.sqrt(linear * linear + 4 * half * passed_s) - linear) / (2 * half)
        else:
            done = passed_s / self.first_s if self.first_s > 0 else self.num_steps
        return max(1, min(self.num_steps, math.ceil(done - 1e-9)))


class SimulatedEngine:
    """One replica's engine. ``emit`` gets first tokens and ends only; ``generated`` knows the tokens between."""

    def __init__(
        self,
        capacity: Capacity,
        policy: Policy,
        times: StepTimes,
        agenda: Agenda,
        emit: Emit,
        desk: Desk | None = None,
        *,
        coalesce: bool = True,
    ) -> None:
        self._pace = Pace(policy.max_inter_token_ms, "batch" in times.decode_lines)
        self.scheduler = Scheduler(capacity.num_slots, policy, self._pace)
        self.scheduler.prefixes = NamedPrefixes(policy.prefix_block_tokens, policy.prefix_cache_bytes)
        self.scheduler.prefixes.changes = {}
        self.num_steps = 0
        self.busy_s = 0.0
        self.num_tokens = 0
        self._capacity = capacity
        self._block = HeldBytes(policy.prefix_block_tokens * capacity.kv_bytes_per_token)
        self._times = times
        self._agenda = agenda
        self._emit = emit
        self._desk = desk
        self._coalesce = coalesce
        self._actives: dict[str, SimulatedActive] = {}
        self._inbox: list[SimulatedActive] = []
        self._run: Run | None = None
        self._number = 0
        self._first_run_s = self._first_token_s = 0.0
        self._first_prompt_is_read = False
        self._woken: SimulatedActive | None = None
        self._has_prefilled = False
        self._seen_s = 0.0

    def submit(self, sequence: Sequence) -> None:
        active = self._actives[sequence.id] = SimulatedActive(sequence)
        self._inbox.append(active)
        if self._run is None:
            self._woken = active
            self._seen_s = self._desk.worked_s if self._desk is not None else 0.0
            self._turn()
        else:
            self._cut()

    def delay_first_prompt(self, seconds: float, seconds_per_token: float) -> None:
        """Have the first prompt take so much longer: its pages and kernels are cold."""
        self._first_run_s, self._first_token_s = seconds, seconds_per_token

    def go_on_with(self, times: StepTimes) -> None:
        """Run at another speed from the next step on."""
        self._times = times
        self._pace.has_batch_graph = "batch" in times.decode_lines
        self._cut()

    def stop(self) -> None:
        """Nothing happens here any more."""
        self._number += 1
        self._leave_run()

    def generated(self, sequence_id: str) -> int:
        """Return how many tokens of an answer there are by now, those included that other replicas made."""
        active = self._actives[sequence_id]
        num_generated = active.num_generated
        if self._run is not None and active in self._run.plan.decode:
            num_generated += self._run.steps_begun(self._agenda.now) - 1
        return num_generated

    @property
    def steps_under_way(self) -> int:
        """How many steps of the present run have begun."""
        return 0 if self._run is None else self._run.steps_begun(self._agenda.now)

    @property
    def num_open(self) -> int:
        return len(self._actives)

    def signals(self) -> Signals:
        return self.scheduler.signals(
            self._capacity.kv_bytes_per_token, self._capacity.max_context_tokens, len(self._inbox)
        )

    def _turn(self) -> None:
        """Take in what came, and begin the next run."""
        for active in self._inbox:
            self.scheduler.add(active)
        self._inbox.clear()
        plan = self.scheduler.schedule()
        if plan:
            run = self._run = self._begin(plan)
            self._number += 1
            if self._desk is not None and plan.decode:
                run.tokens_per_s = len(plan.decode) * run.num_steps / run.after_s(run.num_steps)
                self._desk.stream(run.tokens_per_s)
            self._agenda.at(run.began_at + run.after_s(run.num_steps), self._end, self._number)

    def _begin(self, plan: StepPlan) -> Run:
        times, now = self._times, self._agenda.now
        first_s, more_s, num_rows = 0.0, 0.0, len(plan.decode)
        num_steps = self._num_alike(plan)
        if num_rows:
            context = sum(active.num_cached for active in plan.decode) / num_rows
            rows = num_rows + (plan.padding is not None)
            first_s = times.decode_s(plan.graph, rows, context)
            more_s = times.decode_s(plan.graph, rows, context, 2) - 2 * first_s
            if self._has_prefilled:
                late_s = times.after_prefill_s(plan.graph, rows, context)
                first_s += late_s
                more_s += times.after_prefill_s(plan.graph, rows, context, 2) - 2 * late_s
            if self._has_prefilled is (plan.prefill is None):
                num_steps = 1  # the next one comes behind another kind of run
        self._has_prefilled = plan.prefill is not None
        if (chunk := plan.prefill) is not None:
            active = chunk.active
            assert isinstance(active, SimulatedActive)
            if active.began_at is None:
                active.began_at = now + first_s
            factor = times.waking_up if active is self._woken else 1.0
            chunk_s = times.prefill_s(chunk.num_tokens, chunk.past_tokens)
            first_s += factor * chunk_s
            if chunk.past_tokens:
                more_s += factor * (times.prefill_s(chunk.num_tokens, chunk.past_tokens, 2) - 2 * chunk_s)
        first_s += times.overhead_s(num_rows + (chunk is not None))
        if (cold_s := self._cold_s(chunk)) > 0:
            first_s, num_steps = first_s + cold_s, 1
        if self._desk is not None and self._desk.crowding:
            worked_s = self._desk.worked_s
            late_s = self._desk.crowding * (worked_s - self._seen_s)
            self._seen_s = worked_s
            if late_s > LEAST_S:  # of the run before, which was planned without it
                first_s, num_steps = first_s + late_s, 1
        return Run(plan, now, first_s, more_s, num_steps)

    def _cold_s(self, chunk: PrefillChunk | None) -> float:
        """Return how much longer a chunk of the first prompt takes."""
        if chunk is None or self._first_prompt_is_read:
            return 0.0
        self._first_prompt_is_read = chunk.completes_prompt
        cold_s, self._first_run_s = self._first_run_s, 0.0
        return cold_s + self._first_token_s * chunk.num_tokens

    def _num_alike(self, plan: StepPlan) -> int:
        """Return how many steps in a row are certain to be this one again, but for the tokens behind it."""
        if not self._coalesce:
            return 1
        num_steps = 1 << 30
        scheduler, budget = self.scheduler, self.scheduler.policy.kv_budget_tokens
        if scheduler.waiting and plan.prefill is None and len(plan.decode) < scheduler.num_slots:
            return 1  # the budget keeps somebody out, and whose turn it is next may change with every token paid
        for active in plan.decode:
            assert isinstance(active, SimulatedActive)
            if active.tokens.num_tokens - active.num_cached > 1:  # it replays
                return 1
            if (num_left := active.num_left) < num_steps:
                num_steps = num_left
        if (chunk := plan.prefill) is not None:
            if chunk.past_tokens == 0 or (plan.decode and scheduler.policy.max_inter_token_ms is not None):
                return 1
            left = chunk.active.num_to_prefill - chunk.past_tokens
            num_steps = min(num_steps, max(1, -(-left // chunk.num_tokens) - 1))
        if budget is not None and plan.decode:
            num_steps = min(num_steps, 1 + max(0, budget - scheduler.num_committed_tokens) // len(plan.decode))
        return max(1, num_steps)

    def _leave_run(self) -> None:
        if self._desk is not None and self._run is not None and self._run.tokens_per_s:
            self._desk.stream(-self._run.tokens_per_s)
        self._run = None

    def _cut(self) -> None:
        """End the run behind the step in which it is."""
        run = self._run
        if run is None or run.num_steps == 1:
            return
        num_steps = run.steps_begun(self._agenda.now)
        if num_steps < run.num_steps:
            run.num_steps = num_steps
            self._number += 1
            self._agenda.at(run.began_at + run.after_s(num_steps), self._end, self._number)

    def _end(self, number: int) -> None:
        run = self._run
        if number != self._number or run is None:
            return
        self._leave_run()
        self.num_steps += run.num_steps
        self.busy_s += self._agenda.now - run.began_at
        events = self._commit(run)
        self._turn()  # an engine does not wait until the host has read what it emits
        if events:
            self._emit(events)

    def _commit(self, run: Run) -> list[Event]:
        plan, scheduler, now = run.plan, self.scheduler, self._agenda.now
        ended: list[SimulatedActive] = []
        events: list[Event] = []
        num_rows = len(plan.decode)
        self.num_tokens += run.num_steps * num_rows
        for active in plan.decode:
            assert isinstance(active, SimulatedActive)
            if run.num_steps == 1:
                scheduler.commit_decode(active, None if active.replays else TOKEN)
            else:
                active.advance(run.num_steps)
                scheduler.waiting.charge(active.tenant, run.num_steps)
            if active.num_left == 0 and not active.replays:
                ended.append(active)
        self._observe(run)
        if plan.prefill is not None:
            first = self._commit_prefill(plan.prefill, run.num_steps)
            if first is not None:
                event = TokenEvent(TOKEN, now, first.finish, first.began_at)
                events.append((first.sequence.id, event))
                if first.finish is not None:
                    self._remove(first)
        for active in ended:
            self._remove(active)
            events.append((active.sequence.id, TokenEvent(TOKEN, now, FinishReason.LENGTH)))
        return events

    def _commit_prefill(self, chunk: PrefillChunk, num_steps: int) -> SimulatedActive | None:
        """Take over a prompt's chunks; return the sequence if the last one gave its first token."""
        scheduler, active = self.scheduler, chunk.active
        assert isinstance(active, SimulatedActive)
        if num_steps > 1:
            chunk = PrefillChunk(active, chunk.slot, chunk.past_tokens, chunk.num_tokens * num_steps)
        for index in scheduler.prefixes.missing(active.block_keys, chunk.past_tokens, chunk.end):
            scheduler.prefixes.add(active.block_keys, index, self._block)
        gives_token = chunk.gives_token
        scheduler.commit_prefill(chunk, TOKEN if gives_token else None)
        self.num_tokens += gives_token
        is_first = gives_token and active.num_generated == len(active.sequence.emitted_ids) + 1
        return active if is_first or (gives_token and active.finish) else None

    def _observe(self, run: Run) -> None:
        """Tell the pace what a real engine would have measured, where it decides by that."""
        pace, plan = self._pace, run.plan
        if pace.max_inter_token_ms is None and not pace.has_batch_graph:
            return
        if plan.decode:
            context = sum(active.num_cached for active in plan.decode) / len(plan.decode)
            pace.observe_decode(
                plan.graph, len(plan.decode), self._times.decode_s(plan.graph, len(plan.decode), context)
            )
        if plan.prefill is not None:
            chunk = plan.prefill
            pace.observe_prefill(chunk.num_tokens, self._times.prefill_s(chunk.num_tokens, chunk.past_tokens))

    def _remove(self, active: SimulatedActive) -> None:
        self.scheduler.remove(active)
        del self._actives[active.sequence.id]
