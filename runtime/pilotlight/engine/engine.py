"""The engine: one thread which owns a session and turns submitted sequences into token events."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pilotlight.engine.logprobs import keep_asked, token_logprobs
from pilotlight.engine.sampler import SamplingRow, sample
from pilotlight.engine.scheduler import Active, PrefillChunk, Scheduler, StepPlan
from pilotlight.engine.session import Logits, Session
from pilotlight.request import FinishReason, Sequence, Signals, TokenEvent, TokenLogprobs

Event = tuple[str, TokenEvent]
Emit = Callable[[list[Event]], None]
Chosen = tuple[int, TokenLogprobs | None]
"""A token, and how likely the model held it where that was asked for."""


@dataclass(frozen=True, slots=True)
class _Submit:
    sequence: Sequence


@dataclass(frozen=True, slots=True)
class _Abort:
    sequence_id: str


class _Close:
    pass


class Engine:
    """Continuous batching over one session: sequences join and leave between steps.

    ``emit`` is called on the engine's thread, once a step, with that step's events in order.
    """

    def __init__(self, session: Session, emit: Emit, max_chunk_tokens: int = 128) -> None:
        self._session = session
        self._emit = emit
        self._scheduler = Scheduler(session.num_slots, max_chunk_tokens)
        self._inbox: queue.SimpleQueue[_Submit | _Abort | _Close] = queue.SimpleQueue()
        self._sampling: dict[str, SamplingRow] = {}
        self._prefill_started_at: dict[str, float] = {}
        self._signals = self._measure()
        self._thread = threading.Thread(target=self._loop, name="pilotlight-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End every sequence as cancelled and stop the thread."""
        self._inbox.put(_Close())
        self._thread.join()

    def submit(self, sequence: Sequence) -> None:
        """Hand a sequence over. Its prompt and its new tokens must fit into a slot."""
        assert 0 < len(sequence.prompt_ids) + sequence.max_new_tokens <= self._session.max_context_tokens + 1
        self._inbox.put(_Submit(sequence))

    def abort(self, sequence_id: str) -> None:
        """End a sequence as cancelled before the next step; one that has ended already is left alone."""
        self._inbox.put(_Abort(sequence_id))

    def signals(self) -> Signals:
        """Return the load as of the last step or message."""
        return self._signals

    def _loop(self) -> None:
        while self._receive():
            plan = self._scheduler.schedule()
            if plan:
                self._publish(self._step(plan))

    def _receive(self) -> bool:
        """Take in all messages, waiting for one only when there is nothing to run; False when it is time to end."""
        wait = not len(self._scheduler)
        while wait or not self._inbox.empty():
            wait = False
            message = self._inbox.get()
            if isinstance(message, _Submit):
                self._scheduler.add(Active(message.sequence))
                self._signals = self._measure()
            elif isinstance(message, _Abort):
                self._cancel([a for a in self._scheduler if a.sequence.id == message.sequence_id])
            else:
                self._cancel(list(self._scheduler))
                return False
        return True

    def _cancel(self, actives: list[Active]) -> None:
        now = time.monotonic()
        self._publish([self._end(active, TokenEvent(None, now, FinishReason.CANCELLED)) for active in actives])

    def _publish(self, events: list[Event]) -> None:
        """Emit a step's events; whoever sees a sequence end sees its slot free, too."""
        self._signals = self._measure()
        self._emit(events)

    def _step(self, plan: StepPlan) -> list[Event]:
        """Run both halves on the slots as planned, commit all their tokens, and only then let go of what ended.

        Letting go moves slots, by the number of tokens that each of them holds.
        """
        outcomes = list(zip(plan.decode, self._decode(plan.decode), strict=True)) if plan.decode else []
        for active, chosen in outcomes:
            if not isinstance(chosen, Exception):
                self._scheduler.commit_decode(active, chosen[0])
        if plan.prefill is not None:
            first = self._prefill(plan.prefill)
            if not isinstance(first, Exception):
                self._scheduler.commit_prefill(plan.prefill, first and first[0])
            if first is not None:
                outcomes.append((plan.prefill.active, first))
        now = time.monotonic()
        return [self._event(active, chosen, now) for active, chosen in outcomes]

    def _decode(self, actives: tuple[Active, ...]) -> list[Chosen | Exception]:
        token_ids = np.array([active.tokens[-1] for active in actives], np.int64)
        past_tokens = np.array([active.num_cached for active in actives], np.int64)
        try:
            logits = self._session.decode(token_ids, past_tokens)
            return [*self._sample(logits, actives)]
        except Exception as error:  # noqa: BLE001 - a failed run must end its sequences, not the engine
            return [error] * len(actives)

    def _prefill(self, chunk: PrefillChunk) -> Chosen | Exception | None:
        active = chunk.active
        self._prefill_started_at.setdefault(active.sequence.id, time.monotonic())
        end = active.num_cached + chunk.num_tokens
        token_ids = np.array(active.tokens[active.num_cached : end], np.int64)
        try:
            logits = self._session.prefill(chunk.slot, token_ids, active.num_cached)
            return self._sample(logits, (active,))[0] if chunk.completes_prompt else None
        except Exception as error:  # noqa: BLE001 - as above
            return error

    def _sample(self, logits: Logits, actives: tuple[Active, ...]) -> list[Chosen]:
        rows = [self._sampling_row(active, logits.shape[1]) for active in actives]
        nums_top = [active.sequence.num_top_logprobs for active in actives]
        kept = keep_asked(logits, nums_top)
        token_ids: list[int] = sample(logits, rows).tolist()
        return [
            (token_id, None if row is None else token_logprobs(row, token_id, num_top or 0))
            for token_id, row, num_top in zip(token_ids, kept, nums_top, strict=True)
        ]

    def _sampling_row(self, active: Active, vocab_size: int) -> SamplingRow:
        sequence = active.sequence
        row = self._sampling.get(sequence.id)
        if row is None:
            row = SamplingRow(sequence.sampling, sequence.prompt_ids, vocab_size, sequence.emitted_ids)
            self._sampling[sequence.id] = row
        return row

    def _event(self, active: Active, chosen: Chosen | Exception, now: float) -> Event:
        if isinstance(chosen, Exception):
            failure = f"{type(chosen).__name__}: {chosen}"
            return self._end(active, TokenEvent(None, now, FinishReason.ERROR, error=failure))
        started_at = self._prefill_started_at[active.sequence.id] if active.num_generated == 1 else None
        token_id, logprobs = chosen
        event = TokenEvent(token_id, now, active.finish, started_at, logprobs=logprobs)
        return self._end(active, event) if event.finish else (active.sequence.id, event)

    def _end(self, active: Active, event: TokenEvent) -> Event:
        for move in self._scheduler.remove(active):
            self._session.move(move.source, move.target, move.num_tokens)
        self._sampling.pop(active.sequence.id, None)
        self._prefill_started_at.pop(active.sequence.id, None)
        return active.sequence.id, event

    def _measure(self) -> Signals:
        scheduler, session = self._scheduler, self._session
        return Signals(
            num_waiting=len(scheduler.waiting),
            num_running=len(scheduler) - len(scheduler.waiting),
            num_slots=session.num_slots,
            num_prefill_backlog_tokens=scheduler.num_prefill_backlog_tokens,
            kv_used_bytes=scheduler.num_cached_tokens * session.kv_bytes_per_token,
            kv_reserved_bytes=session.num_slots * session.max_context_tokens * session.kv_bytes_per_token,
        )
