"""The engine: one thread which owns a session and turns submitted sequences into token events."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from pilotlight.engine.device_logits import DeviceLogits, choose
from pilotlight.engine.grammar import Grammars, GrammarState
from pilotlight.engine.logprobs import keep_asked, token_logprobs
from pilotlight.engine.pace import Pace
from pilotlight.engine.policy import DEFAULT_POLICY, Policy
from pilotlight.engine.prefix_keys import PrefixChanges
from pilotlight.engine.sampler import SamplingRow
from pilotlight.engine.scheduler import Active, PrefillChunk, Scheduler, SlotMove, StepPlan
from pilotlight.engine.session import Logits, Session
from pilotlight.engine.speculation import Draft
from pilotlight.engine.timeline import NO_TIMELINE, Timeline
from pilotlight.errors import EngineError, OutOfMemory
from pilotlight.request import FinishReason, Sequence, Signals, TokenEvent, TokenLogprobs

Event = tuple[str, TokenEvent]
Emit = Callable[[list[Event]], None]
Chosen = tuple[int, TokenLogprobs | None]
"""A token, and how likely the model held it where that was asked for."""
Outcome = Chosen | Exception | None
"""What a run gave a sequence; None: nothing new."""
Result = tuple[Active, Outcome, FinishReason | None]
"""What a step gave a sequence, and whether it ends by that."""


@dataclass(frozen=True, slots=True)
class _Submit:
    sequence: Sequence


@dataclass(frozen=True, slots=True)
class _Compiled:
    sequence_id: str
    grammar: Future[GrammarState]


@dataclass(frozen=True, slots=True)
class _Abort:
    sequence_id: str


@dataclass(frozen=True, slots=True)
class _Replace:
    session: Session


class _Close:
    pass


class Engine:
    """Continuous batching over one session: sequences join and leave between steps.

    ``emit`` is called on the engine's thread, once a step, with that step's events in order.
    """

    def __init__(
        self,
        session: Session,
        emit: Emit,
        policy: Policy = DEFAULT_POLICY,
        grammars: Grammars | None = None,
        timeline: Timeline = NO_TIMELINE,
    ) -> None:
        assert session.num_slots > 1 or not policy.deterministic
        self._session = session
        self._emit = emit
        self._timeline = timeline
        self._pace = Pace(policy.max_inter_token_ms, session.has_batch_graph)
        self._scheduler = Scheduler(session.num_slots, policy, self._pace)
        self._inbox: queue.SimpleQueue[_Submit | _Compiled | _Abort | _Replace | _Close] = queue.SimpleQueue()
        self._grammars = grammars
        self._compiling: dict[str, Sequence] = {}
        self._states: dict[str, GrammarState] = {}
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
        if self._grammars is not None:
            self._grammars.close()

    def submit(self, sequence: Sequence) -> None:
        """Hand a sequence over. Its prompt and its new tokens must fit into a slot, and into the cache's budget."""
        num_tokens = len(sequence.prompt_ids) + sequence.max_new_tokens - 1
        assert 0 <= num_tokens <= min(self._session.max_context_tokens, self._scheduler.max_cached_tokens)
        assert len(sequence.emitted_ids) < sequence.max_new_tokens
        self._inbox.put(_Submit(sequence))

    def abort(self, sequence_id: str) -> None:
        """End a sequence as cancelled before the next step; one that has ended already is left alone."""
        self._inbox.put(_Abort(sequence_id))

    def replace_session(self, session: Session) -> None:
        """Go on with another session between two steps; it must work on the same KV cache."""
        self._inbox.put(_Replace(session))

    def signals(self) -> Signals:
        """Return the load as of the last step or message."""
        return self._signals

    def note_prefixes(self) -> None:
        """Have the coming and going of kept prompt beginnings noted; before the start."""
        self._scheduler.prefixes.changes = {}

    def take_prefix_changes(self) -> PrefixChanges:
        """Return what came and went since the last time; on the engine's thread, in ``emit``."""
        changes, self._scheduler.prefixes.changes = self._scheduler.prefixes.changes, {}
        return changes or {}

    @property
    def holds_anything(self) -> bool:
        """Whether a sequence is here, or anything of one that has ended; for tests, on a closed engine."""
        return bool(
            len(self._scheduler) or self._sampling or self._states or self._compiling or self._prefill_started_at
        )

    def _loop(self) -> None:
        while self._receive():
            self._timeline.enter("schedule")
            plan = self._scheduler.schedule()
            if plan:
                self._publish(self._step(plan))

    def _receive(self) -> bool:
        """Take in all messages, waiting for one only when there is nothing to run; False when it is time to end."""
        wait = not len(self._scheduler)
        self._timeline.enter("idle" if wait else "receive")
        while wait or not self._inbox.empty():
            wait = False
            message = self._inbox.get()
            if isinstance(message, _Submit):
                self._add(message.sequence)
            elif isinstance(message, _Compiled):
                self._add_compiled(message.sequence_id, message.grammar)
            elif isinstance(message, _Abort):
                self._cancel([a for a in self._scheduler if a.sequence.id == message.sequence_id])
                self._cancel_compiling([message.sequence_id])
            elif isinstance(message, _Replace):
                self._session = message.session
                self._pace.has_batch_graph = message.session.has_batch_graph
            else:
                self._cancel(list(self._scheduler))
                self._cancel_compiling(list(self._compiling))
                return False
        return True

    def _add(self, sequence: Sequence) -> None:
        """Queue a sequence; one with a grammar waits beside the queue until the grammar is compiled."""
        if sequence.grammar is None:
            self._scheduler.add(Active(sequence))
        else:
            assert self._grammars is not None, "a sequence with a grammar, and nobody to compile it"
            self._compiling[sequence.id] = sequence
            compiling = self._grammars.compile(sequence.grammar, sequence.emitted_ids, sequence.stop_ids)
            compiling.add_done_callback(lambda grammar: self._inbox.put(_Compiled(sequence.id, grammar)))
        self._signals = self._measure()

    def _add_compiled(self, sequence_id: str, grammar: Future[GrammarState]) -> None:
        sequence = self._compiling.pop(sequence_id, None)
        if sequence is None:
            return  # cancelled meanwhile
        if (error := grammar.exception()) is not None:
            event = TokenEvent(None, time.monotonic(), FinishReason.ERROR, error=f"{type(error).__name__}: {error}")
            self._publish([(sequence_id, event)])
            return
        self._states[sequence_id] = grammar.result()
        self._scheduler.add(Active(sequence))

    def _cancel_compiling(self, sequence_ids: list[str]) -> None:
        now = time.monotonic()
        found = [sequence_id for sequence_id in sequence_ids if self._compiling.pop(sequence_id, None) is not None]
        self._publish([(sequence_id, TokenEvent(None, now, FinishReason.CANCELLED)) for sequence_id in found])

    def _cancel(self, actives: list[Active]) -> None:
        now = time.monotonic()
        self._publish([self._end(active, TokenEvent(None, now, FinishReason.CANCELLED)) for active in actives])

    def _publish(self, events: list[Event]) -> None:
        """Emit a step's events; whoever sees a sequence end sees its slot free, too."""
        self._timeline.enter("measure")
        self._signals = self._measure()
        self._timeline.enter("emit")
        self._emit(events)

    def _step(self, plan: StepPlan) -> list[Event]:
        """Run both halves on the slots as planned, commit all their tokens, and only then let go of what ended.

        Letting go moves slots, by the number of tokens that each of them holds.
        """
        self._timeline.enter("move")
        self._move(plan.moves)
        for block in plan.reuse:
            self._session.load_prefix(len(plan.decode), block.start, block.held)
        results: list[Result] = []
        if plan.drafts:
            for slot, draft in enumerate(plan.drafts):
                results += self._verify(plan, slot, draft)
        elif plan.decode:
            begun_at = time.perf_counter()
            outcomes = self._decode(plan)
            self._timeline.enter("commit")
            results += [self._committed(*outcome) for outcome in zip(plan.decode, outcomes, strict=True)]
            self._pace.observe_step(len(plan.decode), time.perf_counter() - begun_at)
        if plan.prefill is not None:
            first = self._prefill(plan.prefill)
            if not isinstance(first, Exception):
                self._scheduler.commit_prefill(plan.prefill, first and first[0])
            results.append((plan.prefill.active, first, plan.prefill.active.finish))
        self._timeline.enter("commit")
        now = time.monotonic()
        sheds = self._scheduler.num_in_slots > 1 and any(isinstance(chosen, OutOfMemory) for _, chosen, _ in results)
        said = [one for one in results if one[1] is not None and not (sheds and isinstance(one[1], OutOfMemory))]
        events = [self._event(active, chosen, finish, now) for active, chosen, finish in said if chosen is not None]
        if sheds:
            self._move(self._scheduler.shed())
        return events

    def _committed(self, active: Active, chosen: Outcome) -> Result:
        """Commit what a decode run gave a sequence, and say whether it ends by it."""
        if not isinstance(chosen, Exception):
            self._scheduler.commit_decode(active, chosen and chosen[0])
        return active, chosen, active.finish

    def _verify(self, plan: StepPlan, slot: int, draft: Draft) -> list[Result]:
        """Run a sequence's next token and its draft, and commit token by token what the sampler draws behind them.

        The draws go on while they are what was drafted. What the cache holds behind them is written again by the
        next run.
        """
        active = plan.decode[slot]
        results: list[Result] = []
        begun_at = time.perf_counter()
        self._timeline.enter("bind")
        masks = None
        try:
            masks = self._find_banned([active])
            token_ids = np.array([active.next_token, *draft], np.int64)
            logits = self._session.verify(slot, token_ids, active.num_cached, plan.graph)
            self._timeline.attribute("run", self._session.run_s)
            for place in range(len(token_ids)):
                (chosen,) = self._sample(logits[place : place + 1], (active,), masks)
                results.append(self._committed(active, chosen))
                if results[-1][2] or isinstance(chosen, Exception) or chosen[0] not in draft[place : place + 1]:
                    break
                masks = self._find_banned([active])
            self._pace.observe_verify(plan.graph, len(token_ids), time.perf_counter() - begun_at)
        except Exception as error:  # noqa: BLE001 - a failed run must end its sequences, not the engine
            _wait_for(masks)
            results.append((active, error, None))
        self._scheduler.count_drafted(len(draft), max(0, len(results) - 1))
        return results

    def _decode(self, plan: StepPlan) -> Items[Outcome]:
        self._timeline.enter("bind")
        tokens = [active.next_token for active in plan.decode]
        pasts = [active.num_cached for active in plan.decode]
        if plan.padding is not None:
            tokens.append(0)
            pasts.append(plan.padding)
        masks = None
        try:
            masks = self._find_banned([active for active in plan.decode if not active.replays])
            logits = self._session.decode(np.array(tokens, np.int64), np.array(pasts, np.int64), plan.graph)
            self._timeline.attribute("run", self._session.run_s)
            self._pace.observe_decode(plan.graph, len(tokens), self._session.run_s)
            return self._sample_new(logits[: len(plan.decode)], plan.decode, masks)
        except Exception as error:  # noqa: BLE001 - a failed run must end its sequences, not the engine
            _wait_for(masks)
            return [error] * len(plan.decode)

    def _prefill(self, chunk: PrefillChunk) -> Outcome:
        self._prefill_started_at.setdefault(chunk.active.sequence.id, time.monotonic())
        self._timeline.enter("bind")
        masks = None
        try:
            masks = self._find_banned([chunk.active]) if chunk.gives_token else None
            logits = self._session.prefill(chunk.slot, np.array(chunk.token_ids, np.int64), chunk.past_tokens)
            self._timeline.attribute("run", self._session.run_s)
            self._pace.observe_prefill(chunk.num_tokens, self._session.run_s)
            self._timeline.enter("keep prefix")
            self._keep_prefix(chunk)
            return self._sample(logits, (chunk.active,), masks)[0] if chunk.gives_token else None
        except Exception as error:  # noqa: BLE001 - as above
            _wait_for(masks)
            return error

    def _find_banned(self, actives: list[Active]) -> Future[None] | None:
        """Begin with the masks of a step, beside the model's run."""
        if not self._states or self._grammars is None:
            return None
        return self._grammars.find_banned(self._states.get(active.sequence.id) for active in actives)

    def _keep_prefix(self, chunk: PrefillChunk) -> None:
        """Keep the blocks that a chunk has completed."""
        prefixes, keys = self._scheduler.prefixes, chunk.active.block_keys
        size = prefixes.block_tokens
        for index in prefixes.missing(keys, chunk.past_tokens, chunk.end):
            held = self._session.save_prefix(chunk.slot, index * size, (index + 1) * size)
            if held is None:
                return
            prefixes.add(keys, index, held)

    def _sample_new(
        self, logits: Logits | DeviceLogits, actives: tuple[Active, ...], masks: Future[None] | None
    ) -> Items[Outcome]:
        """Sample for those whose next token is not known yet."""
        if not any(active.replays for active in actives):
            return self._sample(logits, actives, masks)
        new = [row for row, active in enumerate(actives) if not active.replays]
        outcomes: list[Outcome] = [None] * len(actives)
        if new:
            sampled = self._sample(logits[new], tuple(actives[row] for row in new), masks)
            for row, chosen in zip(new, sampled, strict=True):
                outcomes[row] = chosen
        return outcomes

    def _sample(
        self, logits: Logits | DeviceLogits, actives: tuple[Active, ...], masks: Future[None] | None
    ) -> list[Chosen | Exception]:
        self._timeline.enter("sample")
        if masks is not None:
            masks.result()
        rows = [self._sampling_row(active, logits.shape[1]) for active in actives]
        nums_top = [active.sequence.num_top_logprobs for active in actives]
        kept = keep_asked(logits, nums_top)
        token_ids: list[int] = choose(logits, rows).tolist()
        chosen: list[Chosen] = [
            (token_id, None if row is None else token_logprobs(row, token_id, num_top or 0))
            for token_id, row, num_top in zip(token_ids, kept, nums_top, strict=True)
        ]
        return [self._checked(active, one) for active, one in zip(actives, chosen, strict=True)]

    def _checked(self, active: Active, chosen: Chosen) -> Chosen | Exception:
        """Return what was chosen for a sequence, or why its grammar could not tell what is allowed."""
        if (state := self._states.get(active.sequence.id)) is None:
            return chosen
        if (failure := state.failure) is not None:
            return EngineError(f"the grammar failed: {failure}")
        active.complete = state.complete
        return chosen

    def _sampling_row(self, active: Active, vocab_size: int) -> SamplingRow:
        sequence = active.sequence
        row = self._sampling.get(sequence.id)
        if row is None:
            state = self._states.get(sequence.id)
            row = SamplingRow(sequence.sampling, sequence.prompt_ids, vocab_size, sequence.emitted_ids, state)
            self._sampling[sequence.id] = row
        return row

    def _event(self, active: Active, chosen: Chosen | Exception, finish: FinishReason | None, now: float) -> Event:
        if isinstance(chosen, Exception):
            failure = f"{type(chosen).__name__}: {chosen}"
            retry_after_s = chosen.retry_after_s if isinstance(chosen, OutOfMemory) else None
            lost = TokenEvent(None, now, FinishReason.ERROR, error=failure, out_of_memory_retry_s=retry_after_s)
            return self._end(active, lost)
        is_first = active.num_generated == len(active.sequence.emitted_ids) + 1
        started_at = self._prefill_started_at[active.sequence.id] if is_first else None
        token_id, logprobs = chosen
        recomputed, active.num_recomputed = active.num_recomputed, 0
        num_cached = active.num_reused if is_first else 0
        event = TokenEvent(
            token_id,
            now,
            finish,
            started_at,
            logprobs=logprobs,
            num_recomputed_tokens=recomputed,
            num_cached_tokens=num_cached,
        )
        return self._end(active, event) if event.finish else (active.sequence.id, event)

    def _end(self, active: Active, event: TokenEvent) -> Event:
        self._move(self._scheduler.remove(active))
        self._sampling.pop(active.sequence.id, None)
        self._states.pop(active.sequence.id, None)
        self._prefill_started_at.pop(active.sequence.id, None)
        return active.sequence.id, event

    def _move(self, moves: Items[SlotMove]) -> None:
        for move in moves:
            self._session.move(move.source, move.target, move.num_tokens)

    def _measure(self) -> Signals:
        session = self._session
        return self._scheduler.signals(session.kv_bytes_per_token, session.max_context_tokens, len(self._compiling))


def _wait_for(masks: Future[None] | None) -> None:
    """Let a step's masks be done: the sequences may go on, and the next step's are written to the same place."""
    if masks is not None:
        masks.exception()
