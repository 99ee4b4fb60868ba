"""What runs in the next step. Pure: no tensors, no clock, no threads.

Slots are dense by construction. The running sequences occupy slots 0 to B - 1 in the order of ``running``, and the one
which is being prefilled has slot B, so a decode step is always one contiguous batch and a finished prefill changes
nothing. When a running sequence leaves, the last one takes its slot, and the prefilling one moves up behind it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from pilotlight.request import FinishReason, Sequence


@dataclass(eq=False, slots=True)
class Active:
    """A sequence in the engine: its tokens so far, and how many of them the cache holds."""

    sequence: Sequence
    tokens: list[int] = field(default_factory=list)
    num_cached: int = 0

    def __post_init__(self) -> None:
        self.tokens = [*self.sequence.prompt_ids, *self.sequence.emitted_ids]

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.sequence.prompt_ids)

    @property
    def num_uncached(self) -> int:
        return len(self.tokens) - self.num_cached

    @property
    def finish(self) -> FinishReason | None:
        """Why the sequence has to end after its newest token, if it has to."""
        if self.num_generated and self.tokens[-1] in self.sequence.stop_ids:
            return FinishReason.STOP
        if self.num_generated >= self.sequence.max_new_tokens:
            return FinishReason.LENGTH
        return None


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """The next ``num_tokens`` of a prompt, behind the ``active.num_cached`` tokens that its slot holds."""

    active: Active
    slot: int
    num_tokens: int

    @property
    def completes_prompt(self) -> bool:
        return self.num_tokens == self.active.num_uncached


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: a decode run over slots 0 to B - 1, and a prefill run of one slot beside it."""

    decode: tuple[Active, ...]
    prefill: PrefillChunk | None

    def __bool__(self) -> bool:
        return bool(self.decode) or self.prefill is not None


@dataclass(frozen=True, slots=True)
class SlotMove:
    source: int
    target: int
    num_tokens: int


class Scheduler:
    """First come, first served; running sequences decode in every step, one waiting prompt is prefilled in chunks."""

    def __init__(self, num_slots: int, max_chunk_tokens: int) -> None:
        self.num_slots = num_slots
        self.max_chunk_tokens = max_chunk_tokens
        self.waiting: deque[Active] = deque()
        self.running: list[Active] = []
        self.prefilling: Active | None = None

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __iter__(self) -> Iterator[Active]:
        yield from self.running
        if self.prefilling is not None:
            yield self.prefilling
        yield from self.waiting

    @property
    def num_cached_tokens(self) -> int:
        return sum(active.num_cached for active in self)

    @property
    def num_prefill_backlog_tokens(self) -> int:
        backlog = sum(active.num_uncached for active in self.waiting)
        return backlog + (self.prefilling.num_uncached if self.prefilling else 0)

    def add(self, active: Active) -> None:
        self.waiting.append(active)

    def schedule(self) -> StepPlan:
        """Decide the next step; admits the first waiting sequence when a slot is free and no prompt is half done."""
        if self.prefilling is None and self.waiting and len(self.running) < self.num_slots:
            self.prefilling = self.waiting.popleft()
        chunk = None
        if self.prefilling is not None:
            num_tokens = min(self.prefilling.num_uncached, self.max_chunk_tokens)
            chunk = PrefillChunk(self.prefilling, len(self.running), num_tokens)
        return StepPlan(tuple(self.running), chunk)

    def commit_decode(self, active: Active, token_id: int) -> None:
        """Take over the token that a decode run gave: its predecessor is cached now."""
        active.num_cached += 1
        active.tokens.append(token_id)

    def commit_prefill(self, chunk: PrefillChunk, token_id: int | None) -> None:
        """Take over a prefilled chunk; the one that completes the prompt brings the first token along."""
        chunk.active.num_cached += chunk.num_tokens
        if token_id is not None:
            chunk.active.tokens.append(token_id)
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

    def _vacate(self, slot: int) -> list[SlotMove]:
        moves = []
        last = self.running.pop()
        if slot < len(self.running):
            self.running[slot] = last
            moves.append(SlotMove(len(self.running), slot, last.num_cached))
        if self.prefilling is not None:
            moves.append(SlotMove(len(self.running) + 1, len(self.running), self.prefilling.num_cached))
        return moves
