"""What the host remembers of each open sequence, so that it can go on elsewhere when its replica dies."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import msgspec

from pilotlight.mailbox import TokenStream
from pilotlight.request import FinishReason, Sequence, Start, TokenEvent

MAX_FRUITLESS_MOVES = 8
"""A sequence that was moved so often without a new token may be what kills its replicas. Fewer can be bad luck: on a
busy machine, reading a prompt again takes long."""


@dataclass(eq=False, slots=True)
class Entry:
    """An open sequence: what was asked for, and what has been emitted of the answer."""

    sequence: Sequence
    queued_at: float
    stream: TokenStream = field(default_factory=TokenStream)
    emitted_ids: list[int] = field(default_factory=list)
    dispatched_at: float | None = None
    num_fruitless_moves: int = 0
    num_recomputed_tokens: int = 0
    aborted: bool = False
    cold: bool = False
    start: Start | None = None
    epoch: int = 0
    """How often it was moved. What an earlier epoch still says is not part of the answer."""
    last_at: float = 0.0
    """The latest instant in its events, where they come from another machine's clock."""

    @property
    def tenant(self) -> str | None:
        return self.sequence.tenant

    @property
    def num_prefill_tokens(self) -> int:
        """How many tokens a replica has to compute before the next one comes."""
        return len(self.sequence.prompt_ids) + len(self.sequence.emitted_ids) + len(self.emitted_ids)

    @property
    def position(self) -> int:
        """The number in the answer of the token that comes next."""
        return len(self.sequence.emitted_ids) + len(self.emitted_ids)

    @property
    def has_begun(self) -> bool:
        return bool(self.emitted_ids)

    @property
    def exhausted(self) -> bool:
        return self.num_fruitless_moves >= MAX_FRUITLESS_MOVES

    def continuation(self) -> Sequence:
        """Return what a fresh replica has to be asked for, so that the answer goes on as it would have."""
        if not self.emitted_ids:
            return self.sequence
        return dataclasses.replace(self.sequence, emitted_ids=(*self.sequence.emitted_ids, *self.emitted_ids))

    def moved(self, had_slot: bool) -> None:
        """Note that its replica is gone. One that had no slot yet cannot have been the cause."""
        self.epoch += 1
        self.num_fruitless_moves += had_slot
        if self.emitted_ids:
            self.num_recomputed_tokens += self.num_prefill_tokens
        self.dispatched_at = None

    def turned_away(self, had_slot: bool) -> None:
        """Note that a replica gave nothing of the answer, so that nothing of it has to be computed again."""
        self.epoch += 1
        self.num_fruitless_moves += had_slot

    def accepts(self, epoch: int, position: int) -> bool:
        """Say whether tokens from ``position`` on, computed in an ``epoch``, are the next ones of the answer."""
        return epoch == self.epoch and position == self.position

    def deliver(self, event: TokenEvent, replica_id: str) -> None:
        """Note an event and pass it on. The first one also says where it comes from, and what it had to wait for."""
        if event.token_id is not None:
            first = not self.emitted_ids
            self.emitted_ids.append(event.token_id)
            self.num_fruitless_moves = 0
            if first or self.num_recomputed_tokens:
                event = self._annotated(event, replica_id)
        self.stream.put(event)

    def fail(self, at: float, problem: str, retry_after_s: float | None = None) -> None:
        """End the stream with an error."""
        event = TokenEvent(None, at, FinishReason.ERROR, error=problem, retry_after_s=retry_after_s)
        self.stream.put(event)

    def cancel(self, at: float) -> None:
        """End the stream as cancelled."""
        self.stream.put(TokenEvent(None, at, FinishReason.CANCELLED))

    def _annotated(self, event: TokenEvent, replica_id: str) -> TokenEvent:
        recomputed, self.num_recomputed_tokens = self.num_recomputed_tokens, 0
        start, self.start = self.start, None
        return msgspec.structs.replace(event, replica_id=replica_id, start=start, num_recomputed_tokens=recomputed)
