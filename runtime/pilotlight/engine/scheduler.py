"""What runs in the next step. Pure: no tensors, no clock, no threads.

Slots are dense by construction. The running sequences occupy slots 0 to B - 1 in the order of ``running``, and the one
which is being prefilled has slot B, so a decode step is always one contiguous batch and a finished prefill changes
nothing. When a running sequence leaves, the last one takes its slot, and the prefilling one moves up behind it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

from pilotlight.engine.fair_queue import FairQueue
from pilotlight.engine.pace import DecodeGraph, Pace
from pilotlight.engine.policy import Policy
from pilotlight.engine.prefix_cache import Block, PrefixCache
from pilotlight.engine.speculation import MAX_DRAFTING_ROWS, Draft, PromptLookup, drafts_that_pay
from pilotlight.request import FinishReason, Sequence, Signals

CALM_STEPS = 64
"""After so many steps twice as many sequences are admitted as a device had memory for."""

HEADROOM_STEPS = 16
"""What is admitted finds room in the cache for so many steps of everybody, or it would be preempted again at once."""


@dataclass(eq=False, slots=True)
class Active:
    """A sequence in the engine: its tokens so far, and how many of them the cache holds.

    ``num_to_prefill`` tokens are read as a prompt; known tokens behind them are replayed one a step. ``order`` counts
    admissions. ``num_recomputed`` counts tokens that were computed again, since the last event said so; ``num_reused``
    are those of the prompt that did not have to be computed. ``block_keys`` name its blocks in the prefix cache.
    ``lookup`` guesses its next tokens, from the first decode step on in which that might pay.
    """

    sequence: Sequence
    tokens: list[int] = field(default_factory=list)
    num_cached: int = 0
    num_to_prefill: int = 0
    order: int | None = None
    num_lost: int = 0
    num_recomputed: int = 0
    complete: bool = False
    """Whether its grammar lets nothing follow."""
    block_keys: list[bytes] = field(default_factory=list)
    num_reused: int = 0
    lookup: PromptLookup | None = None

    def __post_init__(self) -> None:
        self.tokens = [*self.sequence.prompt_ids, *self.sequence.emitted_ids]

    @property
    def tenant(self) -> str | None:
        return self.sequence.tenant

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.sequence.prompt_ids)

    @property
    def num_uncached(self) -> int:
        return len(self.tokens) - self.num_cached

    @property
    def next_token(self) -> int:
        """The token that its next decode step runs on."""
        return self.tokens[self.num_cached]

    @property
    def replays(self) -> bool:
        """Whether the next decode step gives a token that is known already."""
        return self.num_uncached > 1

    @property
    def watched(self) -> PromptLookup:
        """Its guesses, kept from now on."""
        if self.lookup is None:
            self.lookup = PromptLookup(self.tokens)
        return self.lookup

    @property
    def max_draft_tokens(self) -> int:
        """How many tokens can be kept beside the next one."""
        return self.sequence.max_new_tokens - self.num_generated - 1

    def append(self, token_id: int) -> None:
        """Take over a new token."""
        self.tokens.append(token_id)
        if self.lookup is not None:
            self.lookup.push(token_id)

    @property
    def finish(self) -> FinishReason | None:
        """Why the sequence has to end after its newest token, if it has to."""
        if self.complete or (self.num_generated and self.tokens[-1] in self.sequence.stop_ids):
            return FinishReason.STOP
        if self.num_generated >= self.sequence.max_new_tokens:
            return FinishReason.LENGTH
        return None


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """``num_tokens`` of a prompt, behind the ``past_tokens`` that its slot holds."""

    active: Active
    slot: int
    past_tokens: int
    num_tokens: int

    @property
    def end(self) -> int:
        return self.past_tokens + self.num_tokens

    @property
    def token_ids(self) -> list[int]:
        return self.active.tokens[self.past_tokens : self.end]

    @property
    def completes_prompt(self) -> bool:
        return self.end == self.active.num_to_prefill

    @property
    def gives_token(self) -> bool:
        return self.end == len(self.active.tokens)


@dataclass(frozen=True, slots=True)
class SlotMove:
    source: int
    target: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: slots to move first, then a decode run over slots 0 to B - 1, and a prefill run of one slot beside it.

    ``reuse``: blocks to copy into the prefill's slot, behind the moves and before anything runs.
    ``padding``: a second row, for a decode run of one, which holds so many tokens; its result means nothing.
    ``drafts``: how each row may go on. With them each row has a run of its own, on its next token and its draft.
    """

    moves: tuple[SlotMove, ...] = ()
    decode: tuple[Active, ...] = ()
    graph: DecodeGraph = DecodeGraph.MAIN
    padding: int | None = None
    drafts: tuple[Draft, ...] = ()
    reuse: tuple[Block, ...] = ()
    prefill: PrefillChunk | None = None

    def __bool__(self) -> bool:
        return bool(self.decode) or self.prefill is not None


class Scheduler:
    """Running sequences decode in every step, one waiting prompt is prefilled in chunks; tenants take turns.

    When the cache's budget runs out, the youngest sequence makes room and is computed again later, so the oldest one
    always gets on.
    """

    def __init__(self, num_slots: int, policy: Policy, pace: Pace) -> None:
        self.num_slots = num_slots
        self.policy = policy
        self.pace = pace
        self.prefixes = PrefixCache(policy.prefix_block_tokens, policy.prefix_cache_bytes)
        self.num_prefix_query_tokens = self.num_prefix_hit_tokens = 0
        self.waiting: FairQueue[Active] = FairQueue()
        self.running: list[Active] = []
        self.prefilling: Active | None = None
        self.num_preemptions = 0
        self.num_drafted_tokens = self.num_accepted_tokens = 0
        self.max_in_slots = num_slots
        self._num_calm_steps = 0
        self._num_admitted = 0

    def __len__(self) -> int:
        return len(self.waiting) + self.num_in_slots

    def __iter__(self) -> Iterator[Active]:
        yield from self.running
        if self.prefilling is not None:
            yield self.prefilling
        yield from self.waiting

    @property
    def max_cached_tokens(self) -> int:
        """The longest that one sequence may become in the cache."""
        budget = self.policy.kv_budget_tokens
        return sys.maxsize if budget is None else budget

    @property
    def num_in_slots(self) -> int:
        return len(self.running) + (self.prefilling is not None)

    @property
    def num_cached_tokens(self) -> int:
        return sum(active.num_cached for active in self.running) + (
            self.prefilling.num_cached if self.prefilling else 0
        )

    @property
    def num_committed_tokens(self) -> int:
        """The tokens that slots hold after the next step, a prompt that has been begun counted whole."""
        prompt = len(self.prefilling.tokens) if self.prefilling else 0
        return sum(active.num_cached + 1 for active in self.running) + prompt

    @property
    def num_prefill_backlog_tokens(self) -> int:
        backlog = sum(active.num_uncached for active in self.waiting)
        return backlog + (self.prefilling.num_uncached if self.prefilling else 0)

    def signals(self, kv_bytes_per_token: int, max_context_tokens: int, num_beside: int = 0) -> Signals:
        """Return the load; ``num_beside`` sequences wait beside the queue."""
        return Signals(
            num_waiting=len(self.waiting) + num_beside,
            num_running=self.num_in_slots,
            num_slots=self.num_slots,
            num_prefill_backlog_tokens=self.num_prefill_backlog_tokens,
            kv_used_bytes=self.num_cached_tokens * kv_bytes_per_token,
            kv_reserved_bytes=self.num_slots * max_context_tokens * kv_bytes_per_token,
            num_preemptions=self.num_preemptions,
            num_prefix_query_tokens=self.num_prefix_query_tokens,
            num_prefix_hit_tokens=self.num_prefix_hit_tokens,
            prefix_cache_bytes=self.prefixes.num_bytes,
            num_drafted_tokens=self.num_drafted_tokens,
            num_accepted_tokens=self.num_accepted_tokens,
        )

    def add(self, active: Active) -> None:
        self.waiting.add(active)

    def schedule(self) -> StepPlan:
        """Decide the next step: who has to make room, who is admitted, and what runs."""
        moves = self._make_room()
        self._regain()
        reuse = self._admit()
        num_rows = len(self.running)
        padding = None
        if self.policy.deterministic and num_rows == 1:
            # what a prefill has written there stays valid: its next chunk begins where the padding wrote
            padding = self.prefilling.num_cached if self.prefilling else 0
        graph = self._graph()
        drafts = self._drafts(graph)
        return StepPlan(tuple(moves), tuple(self.running), graph, padding, drafts, reuse, self._chunk())

    def commit_decode(self, active: Active, token_id: int | None) -> None:
        """Take over what a decode run gave: its token is cached now, and the next one new, unless it was known."""
        active.num_cached += 1
        self.waiting.charge(active.tenant, 1)
        if token_id is not None:
            active.append(token_id)

    def count_drafted(self, num_drafted: int, num_accepted: int) -> None:
        """Note how many tokens of a draft came true; each of them, and the one behind, is committed by itself."""
        self.num_drafted_tokens += num_drafted
        self.num_accepted_tokens += num_accepted

    def commit_prefill(self, chunk: PrefillChunk, token_id: int | None) -> None:
        """Take over a prefilled chunk; the one that completes the prompt brings the next token along, unless known."""
        chunk.active.num_cached = chunk.end
        if token_id is not None:
            chunk.active.append(token_id)
        if chunk.completes_prompt:
            self.running.append(chunk.active)
            self.prefilling = None

    def remove(self, active: Active) -> list[SlotMove]:
        """Let a sequence go, whatever it was doing; the moves keep the slots dense and must be carried out."""
        if active is self.prefilling:
            self.prefilling = None
        elif active in self.running:
            return self._vacate(self.running.index(active))
        else:
            self.waiting.remove(active)
        return []

    def _graph(self) -> DecodeGraph:
        if not self.policy.deterministic:
            return self.pace.graph_for(len(self.running))
        batches = self.pace.has_batch_graph and self.num_slots >= self.pace.min_batch_rows
        return DecodeGraph.BATCH if batches else DecodeGraph.MAIN

    def _drafts(self, graph: DecodeGraph) -> tuple[Draft, ...]:
        """Return drafts for all rows, if all of them gain and no prompt has to wait for it."""
        speculates = self.policy.speculates and not self.policy.deterministic
        if not speculates or self.prefilling is not None or not 0 < len(self.running) <= MAX_DRAFTING_ROWS:
            return ()
        step_s = self.pace.step_s(len(self.running))
        if step_s is None:
            return ()
        limit_s = math.inf if self.pace.max_inter_token_ms is None else self.pace.max_inter_token_ms / 1000

        def verify_s(num_tokens: int) -> float:
            seconds = self.pace.verify_s(graph, num_tokens)
            return seconds if len(self.running) * seconds <= limit_s else math.inf

        lookups = [active.watched for active in self.running]
        drafts = drafts_that_pay(lookups, [active.max_draft_tokens for active in self.running], step_s, verify_s)
        budget = self.policy.kv_budget_tokens
        fits = budget is None or self.num_committed_tokens + sum(map(len, drafts)) <= budget
        return drafts if fits else ()

    def _chunk(self) -> PrefillChunk | None:
        active = self.prefilling
        if active is None:
            return None
        past, largest = active.num_cached, self.policy.max_chunk_tokens
        if self.policy.deterministic:
            end = past - past % largest + largest
        else:
            end = past + self.pace.chunk_tokens(len(self.running), largest)
        end = min(end, active.num_to_prefill)
        if end - past == 1 and past > 0:
            past -= 1  # one token alone takes other kernels, which round otherwise: it goes with the one before it
        return PrefillChunk(active, len(self.running), past, end - past)

    def _admit(self) -> tuple[Block, ...]:
        """Admit the sequence whose turn it is, when a slot is free, no prompt is half done, and the cache has room."""
        if self.prefilling is not None or len(self.running) >= self.max_in_slots:
            return ()
        active = self.waiting.peek()
        if active is None or not self._has_room(active):
            return ()
        self.waiting.remove(active)
        known = active.sequence.prompt_ids if self.policy.deterministic else active.tokens
        active.num_to_prefill = len(known)
        reuse = self._find_prefix(active)
        if active.order is None:
            active.order = self._num_admitted
            active.num_reused = min(active.num_cached, len(active.sequence.prompt_ids))
            self._num_admitted += 1
            self.waiting.charge(active.tenant, active.num_uncached)
        active.num_recomputed += max(0, active.num_lost - active.num_cached)
        active.num_lost = 0
        self.prefilling = active
        return reuse

    def _find_prefix(self, active: Active) -> tuple[Block, ...]:
        tenant = None if self.policy.share_prefixes else active.tenant
        scope = (tenant, active.sequence.cache_key)
        active.block_keys = self.prefixes.keys(scope, active.tokens[: active.num_to_prefill])
        found = tuple(self.prefixes.find(active.block_keys))
        active.num_cached = found[-1].end if found else 0
        self.num_prefix_query_tokens += active.num_to_prefill
        self.num_prefix_hit_tokens += active.num_cached
        return found

    def _has_room(self, active: Active) -> bool:
        if self.policy.kv_budget_tokens is None or not self.running:
            return True
        growth = HEADROOM_STEPS * (len(self.running) + 1)
        return self.num_committed_tokens + len(active.tokens) + growth <= self.policy.kv_budget_tokens

    def shed(self) -> list[SlotMove]:
        """Send the younger half in slots back to their queues, for want of memory, and admit no more for a while."""
        self.max_in_slots = max(1, self.num_in_slots // 2)
        self._num_calm_steps = 0
        moves: list[SlotMove] = []
        while self.num_in_slots > self.max_in_slots:
            moves += self._preempt()
        return moves

    def _regain(self) -> None:
        """Have room for twice as many now and then, until all slots are used again."""
        if self.max_in_slots < self.num_slots:
            self._num_calm_steps += 1
            if self._num_calm_steps >= CALM_STEPS:
                self.max_in_slots, self._num_calm_steps = min(2 * self.max_in_slots, self.num_slots), 0

    def _make_room(self) -> list[SlotMove]:
        moves: list[SlotMove] = []
        budget = self.policy.kv_budget_tokens
        while budget is not None and self.num_committed_tokens > budget and self.num_in_slots > 1:
            moves += self._preempt()
        return moves

    def _preempt(self) -> list[SlotMove]:
        """Send the youngest sequence back to the front of its queue."""
        in_slots = [*self.running, *([self.prefilling] if self.prefilling else [])]
        youngest = max(in_slots, key=lambda active: active.order or 0)
        moves = self.remove(youngest)
        youngest.num_lost, youngest.num_cached = youngest.num_cached, 0
        self.waiting.add_front(youngest)
        self.num_preemptions += 1
        return moves

    def _vacate(self, slot: int) -> list[SlotMove]:
        moves = []
        last = self.running.pop()
        if slot < len(self.running):
            self.running[slot] = last
            moves.append(SlotMove(len(self.running), slot, last.num_cached))
        if self.prefilling is not None:
            moves.append(SlotMove(len(self.running) + 1, len(self.running), self.prefilling.num_cached))
        return moves
