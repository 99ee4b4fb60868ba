"""What a usage record is made of, gathered while an invocation runs."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from pilotlight.function.invocation import Invocation
from pilotlight.metering.marks import Mark
from pilotlight.metering.usage import Timings, Usage
from pilotlight.request import FinishReason, Start, TokenEvent

_NO_START = Start(0.0, 0.0, 0.0, 0.0, 0.0)


@dataclass(slots=True)
class Progress:
    """What one invocation has used and how it went. Instants are monotonic."""

    received_at: float
    submitted_at: float
    cold_start_ms: float = 0.0
    num_completion_tokens: int = 0
    num_delivered_tokens: int = 0
    prefill_started_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    finish: FinishReason = FinishReason.ERROR
    stop_detail: str | None = None
    checkpoint: asyncio.Task[None] | None = None
    next_checkpoint_tokens: int = 1
    replica_id: str | None = None
    start: Start | None = None
    num_recomputed_tokens: int = 0
    num_cached_tokens: int = 0
    num_migrations: int = 0
    retry_after_s: float | None = None
    prompt_is_paid: bool = False
    out_of_memory_retry_s: float | None = None

    def count(self, event: TokenEvent) -> None:
        """Count one token of any choice."""
        self.num_completion_tokens += 1
        self.last_token_at = event.at
        if self.first_token_at is None:
            self.first_token_at = event.at
            self.prefill_started_at = event.prefill_started_at
            self.num_cached_tokens = 0 if self.prompt_is_paid else event.num_cached_tokens
        if event.replica_id is not None or event.num_recomputed_tokens:
            self._note_replica(event)

    def _note_replica(self, event: TokenEvent) -> None:
        """Note where a token comes from; only the first one from a replica says so."""
        moved = event.replica_id is not None and self.replica_id not in (None, event.replica_id)
        self.num_migrations += moved
        self.replica_id = event.replica_id or self.replica_id
        self.num_recomputed_tokens += event.num_recomputed_tokens
        if event.start is not None:
            self.start, self.cold_start_ms = event.start, event.start.waited_ms

    def mark(self, num_prompt_tokens: int) -> Mark:
        """Return what was used up to now, for a note."""
        return Mark(num_prompt_tokens, self.num_cached_tokens, self.num_completion_tokens, self.busy_ms)

    @property
    def busy_ms(self) -> int:
        """How long prefill and decode took up to now; reading again what was paid for does not count."""
        began_at = self.first_token_at if self.prompt_is_paid else self.prefill_started_at
        return 0 if began_at is None or self.last_token_at is None else round((self.last_token_at - began_at) * 1000)

    def checkpoint_is_due(self, tokens_between: int) -> bool:
        """Say whether to write one now: at the first token, and about every ``tokens_between`` after it."""
        if self.num_completion_tokens < self.next_checkpoint_tokens:
            return False
        if self.checkpoint is not None and not self.checkpoint.done():
            return False
        num_whole = (self.num_completion_tokens - 1) // tokens_between
        self.next_checkpoint_tokens = (num_whole + 1) * tokens_between + 1
        return True

    def timings(self) -> Timings:
        """Return the stages' durations up to now."""
        prefill_at, first_at, last_at = self.prefill_started_at, self.first_token_at, self.last_token_at
        if prefill_at is None or first_at is None or last_at is None:
            return Timings(cold_start_ms=self.cold_start_ms, total_ms=_ms(time.monotonic() - self.received_at))
        start = self.start or _NO_START
        return Timings(
            queue_ms=max(0.0, round(_ms(prefill_at - self.submitted_at) - start.waited_ms, 3)),
            cold_start_ms=self.cold_start_ms,
            fork_ms=start.fork_ms,
            map_ms=start.map_ms,
            unseal_ms=start.unseal_ms,
            session_ms=start.session_ms,
            warm_up_ms=start.warm_up_ms,
            prefill_ms=_ms(first_at - prefill_at),
            ttft_ms=_ms(first_at - self.received_at),
            decode_ms=_ms(last_at - first_at),
            total_ms=_ms(time.monotonic() - self.received_at),
        )

    def usage(self, invocation: Invocation) -> Usage:
        """Return what is billed if it ends now."""
        left_early = self.finish is FinishReason.CANCELLED
        return Usage(
            prompt_tokens=invocation.num_prompt_tokens if self.prefill_started_at is not None else 0,
            cached_tokens=self.num_cached_tokens,
            completion_tokens=self.num_completion_tokens,
            delivered_tokens=invocation.num_delivered_tokens if left_early else self.num_completion_tokens,
            recomputed_tokens=self.num_recomputed_tokens,
            reasoning_tokens=sum(stream.num_reasoning_tokens for stream in invocation.streams),
            migrations=self.num_migrations,
            busy_ms=self.busy_ms,
        )


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
