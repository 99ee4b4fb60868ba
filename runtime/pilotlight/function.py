"""A function: one artifact behind a name. It takes an invocation from the parsed request to its usage record.

template → tokenize → submit and admit → token events → text → commit, and only then the client's last frame. The task
that runs an invocation belongs to the function and not to the client's connection, so a client that leaves can end the
generation but never the metering.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from functools import cached_property
from typing import Any, Protocol

import msgspec

from pilotlight.answer import Choice, ChoiceStream, Delta, overall_finish
from pilotlight.artifact import GENERATION_CONFIG, Artifact
from pilotlight.errors import (
    ArtifactError,
    CapacityError,
    ContextLengthExceeded,
    DeadlineExceeded,
    Draining,
    EngineError,
    InvalidRequest,
    LedgerUnavailable,
    OutOfMemory,
    PilotlightError,
    RequestIdInUse,
    StartFailed,
)
from pilotlight.mailbox import Mailbox, TokenStream
from pilotlight.metering.idempotency import Claim
from pilotlight.metering.limits import Admitted, Standing
from pilotlight.metering.marks import Mark
from pilotlight.metering.prices import PriceTable
from pilotlight.metering.record import Admission, Capacity, UsageRecord, final_record, utc_text
from pilotlight.metering.usage import Timings, Usage
from pilotlight.request import Continuation, FinishReason, SamplingParams, Sequence, Signals, Start, TokenEvent
from pilotlight.tee import TeeLabel
from pilotlight.text.chat_template import ChatTemplate, load_chat_template
from pilotlight.text.detokenizer import TextStream
from pilotlight.text.grammar import check_grammar
from pilotlight.text.tokenizer import Tokenizer
from pilotlight.text.tool_calls import ToolCallParser
from pilotlight.text.tool_syntax import ToolUse

logger = logging.getLogger("pilotlight.function")

MAX_INLINE_CHARACTERS = 4096
"""Longer texts are tokenized on another thread, so that they don't hold up the streams of others."""

_NO_START = Start(0.0, 0.0, 0.0, 0.0, 0.0)


class Cut(StrEnum):
    """Why an answer was ended that had more to say."""

    DEADLINE = "the time that the platform or the function allows"
    TIMEOUT = "the time that the client allows"
    SHUTDOWN = "the server shuts down"


RETRY_DELAYS_S = (0.1, 0.3, 1.0, 3.0, 5.0)
"""How long to wait before a record is written again, while the ledger cannot be written."""


class Backend(Protocol):
    """Where sequences are generated: the engine in this process, or a pool of replicas."""

    def submit(self, sequence: Sequence) -> TokenStream:
        """Reserve a place at once and return the events; the last one carries a finish reason."""

    def abort(self, sequence_id: str) -> None:
        """Have a sequence end as cancelled before the next step."""

    def signals(self) -> Signals:
        """Return the load after the last step."""

    async def close(self) -> None:
        """Cancel what runs and deliver the last events."""


class UsageLedger(Protocol):
    """Where admissions, checkpoints and records are kept: SQLite on a host, DynamoDB on Lambda."""

    checkpoint_tokens: int
    """About how many tokens lie between two checkpoints: what a crash can leave unbilled, unless notes outlive it."""

    async def admit(self, admission: Admission, claim: Claim | None = None) -> Admitted:
        """Open an invocation, whose request id and claim must be new, within the limits of its key."""

    def note(self, request_id: str, mark: Mark) -> None:
        """Note what an open invocation has used so far, before any of it is delivered; must not block."""

    async def checkpoint(self, request_id: str, usage: Usage) -> None:
        """Note what an open invocation has used so far."""

    async def finish(self, record: UsageRecord) -> None:
        """End an open invocation by its one record."""

    def get(self, request_id: str) -> UsageRecord | None:
        """Return the record of a finished invocation; may block."""

    def receipt(self, request_id: str) -> str | None:
        """Return the signed record of a finished invocation, where records are signed; may block."""


class Prices(Protocol):
    """What a function costs over time: a table, or a schedule of them."""

    @property
    def tables(self) -> Items[PriceTable]:
        """All tables, in the order in which they hold."""

    def at(self, started_at_utc: str) -> PriceTable:
        """Return the table that holds at an instant, as records write it."""


class Observer(Protocol):
    """Told what happens, for metrics; it must not block."""

    def token(self, function: str, gap_s: float | None) -> None:
        """One token was generated, ``gap_s`` after its predecessor (None for the first)."""

    def finished(self, record: UsageRecord) -> None:
        """An invocation's record was committed."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asked for, parsed and checked. ``messages`` or ``text`` or ``token_ids`` is the prompt.

    With messages, the answer goes on behind ``prefill``, which is part of the prompt.
    A ``grammar`` (see ``text.grammar``) holds the answer to a form; ``grammar_param`` is where a client gave it.
    With ``num_top_logprobs`` each token comes with its log probability, and so many of the likeliest ones.
    Requests of one ``tenant`` with the same ``cache_key`` reuse each other's prompts where they begin the same.
    At ``deadline_at``, a monotonic instant, the answer ends as if its length were reached, and at ``timeout_at``, which
    is the client's own wish. With ``seal``, an answer that is cut off gives a token that ``continues`` it.
    """

    id: str
    num_choices: int = 1
    num_top_logprobs: int | None = None
    messages: Items[Mapping[str, Any]] | None = None
    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    prefill: str = ""
    prompt_name: str | None = None
    max_new_tokens: int | None = None
    stop_strings: tuple[str, ...] = ()
    ignore_eos: bool = False
    sampling: Mapping[str, Any] = field(default_factory=dict)
    grammar: str | None = None
    grammar_param: str = "response_format"
    tools: ToolUse | None = None
    received_at: float = field(default_factory=time.monotonic)
    deadline_at: float | None = None
    timeout_at: float | None = None
    continues: Continuation | None = None
    seal: Callable[[Continuation], str] | None = None
    tenant: str | None = None
    key_id: str | None = None
    claim: Claim | None = None
    cache_key: str | None = None

    @property
    def prompt_param(self) -> str:
        """The name of the parameter that a client would have to change."""
        return self.prompt_name or ("messages" if self.messages is not None else "prompt")


class Invocation:
    """One running request on a function. Iterate over it for the answer; after that it has a ``record``."""

    def __init__(
        self, function: Function, request: Request, num_prompt_tokens: int, streams: Items[ChoiceStream]
    ) -> None:
        self.request = request
        self.submitted_at = time.monotonic()
        self.num_prompt_tokens = num_prompt_tokens
        self.num_delivered_tokens = 0
        self.record: UsageRecord | None = None
        self.failure: PilotlightError | None = None
        self.cut: Cut | None = None
        self.seed = 0
        self.cancelled = False
        self.submitted = False
        self.unmetered: LedgerUnavailable | None = None
        self.standing: Standing | None = None
        self.task: asyncio.Task[None]
        self.admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.function = function
        self.streams = streams
        self._deltas: Mailbox[Delta | PilotlightError | None] = Mailbox()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        """Yield the answer as it is generated; ends when the usage record is durable.

        Raises:
            EngineError: the model run failed; what was generated is metered.
            LedgerUnavailable: the usage record could not be written.
        """
        while True:
            item = await self._deltas.get()
            if item is None:
                return
            if isinstance(item, PilotlightError):
                self.failure = item
                raise item
            self.num_delivered_tokens += len(item.token_ids)
            yield item

    async def choices(self) -> list[Choice]:
        """Return the whole answer, once its usage record is durable; raises what iterating over it raises."""
        deltas = [delta async for delta in self]
        choices = [Choice(stream.index, self.finish(stream.index)) for stream in self.streams]
        for choice, stream in zip(choices, self.streams, strict=True):
            choice.tool_calls = list(stream.begun_calls)
        for delta in deltas:
            choices[delta.choice].add(delta)
        return choices

    def finish(self, choice: int) -> FinishReason:
        """Return why a choice of a finished invocation ended."""
        finish = self.streams[choice].finish
        assert finish is not None
        return finish

    def cancel(self) -> None:
        """End the generation within a step; what was generated is metered. Harmless when it has ended."""
        self.function.cancel(self.request.id)

    def end_early(self, cut: Cut) -> None:
        """End the generation within a step, as if its length were reached."""
        self.cut = self.cut or cut
        self.cancel()

    @property
    def continuation(self) -> Continuation | None:
        """What another invocation needs to go on with this answer, if it was cut off.

        One that its client wished to end is no longer paid for, or its prompt could be read for nothing any number of
        times.
        """
        if self.cut is None or self.streams[0].finish is not FinishReason.DEADLINE:
            return None
        emitted_ids = tuple(self.streams[0].token_ids)
        before = self.request.continues
        paid = bool(emitted_ids) and self.cut is not Cut.TIMEOUT
        return Continuation(self.request.id if before is None else before.first_id, emitted_ids, self.seed, paid)

    @cached_property
    def resume_token(self) -> str | None:
        """The token that continues this answer, where it was cut off and there are such tokens."""
        continuation = self.continuation
        if self.request.seal is None or continuation is None:
            return None
        return self.request.seal(continuation)

    def push(self, item: Delta | PilotlightError | None) -> None:
        self._deltas.put(item)


@dataclass(slots=True)
class _Progress:
    """What the record is made of, gathered while an invocation runs. Instants are monotonic."""

    received_at: float
    submitted_at: float
    cold_start_ms: float
    num_completion_tokens: int = 0
    num_delivered_tokens: int = 0
    prefill_started_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    finish: FinishReason = FinishReason.ERROR
    stop_detail: str | None = None
    checkpoint: asyncio.Task[None] | None = None
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
        """Return what was used up to now, for the note of a token."""
        assert self.last_token_at is not None
        return Mark(num_prompt_tokens, self.num_cached_tokens, self.num_completion_tokens, self.busy_ms)

    @property
    def busy_ms(self) -> int:
        """How long prefill and decode took up to now; reading again what was paid for does not count."""
        began_at = self.first_token_at if self.prompt_is_paid else self.prefill_started_at
        return 0 if began_at is None or self.last_token_at is None else round((self.last_token_at - began_at) * 1000)

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


@dataclass(frozen=True, slots=True)
class Texts:
    """How an artifact's texts become tokens: what of a function needs neither a ledger nor a backend."""

    tokenizer: Tokenizer
    template: ChatTemplate

    @classmethod
    def of(cls, artifact: Artifact) -> Texts:
        """Load them.

        Raises:
            ArtifactError: a file of the artifact cannot be read as what it should be.
        """
        tokenizer = Tokenizer.of(artifact)
        special_tokens = artifact.manifest.special_tokens
        return cls(tokenizer, load_chat_template(artifact, tokenizer.special_texts(special_tokens)))


class Function:
    """An artifact's text side, its backend and its meter, under the name that clients call ``model``."""

    def __init__(
        self,
        name: str,
        artifact: Artifact,
        backend: Backend,
        ledger: UsageLedger,
        prices: Prices,
        *,
        max_context_tokens: int,
        max_duration_s: float = 3600.0,
        max_answer_tokens: int | None = None,
        capacity: Capacity = Capacity.ON_DEMAND,
        tee: TeeLabel = TeeLabel.NONE,
        observer: Observer | None = None,
        texts: Texts | None = None,
        provider: str = "cpu",
    ) -> None:
        self.name = name
        self.artifact = artifact
        self.backend = backend
        self.prices = prices
        self.max_context_tokens = max_context_tokens
        self.max_duration_s = max_duration_s
        self.max_answer_tokens = max_answer_tokens
        self.capacity = capacity
        self.tee = tee
        self.created_at_utc = datetime.now(UTC)
        self.replica_id = _new_replica_id(name)
        self._ledger = ledger
        self._observer: Observer = observer or _Unobserved()
        self._provider = provider
        texts = texts or Texts.of(artifact)
        self._tokenizer, self._template = texts.tokenizer, texts.template
        self._default_sampling = _default_sampling(artifact)
        self._stop_ids = frozenset(artifact.manifest.special_tokens.eos_ids)
        self.cold_start_ms = 0.0
        self._cold_start_to_report_ms = 0.0
        self._running: dict[str, Invocation] = {}
        self._drain_began = asyncio.Event()

    def started(self, cold_start_ms: float) -> None:
        """Note how long the start took; the first invocation's record reports it."""
        self.cold_start_ms = self._cold_start_to_report_ms = cold_start_ms

    def restored(self) -> None:
        """Go on in a copy of this process that was restored from a snapshot: a replica of its own, without a start."""
        self.replica_id = _new_replica_id(self.name)
        self.started(cold_start_ms=0.0)

    async def invoke(self, request: Request) -> Invocation:
        """Check a request, submit it and return its running invocation.

        Raises:
            InvalidRequest: the prompt or a parameter is not acceptable for this function.
            ContextLengthExceeded: the prompt leaves no room for an answer.
            QueueFull: no place is free.
            RequestIdInUse: the ledger holds an invocation of that id.
            LedgerUnavailable: the invocation cannot be metered, so it is not served.
            LimitExceeded, NotPermitted, InvalidKey: the request's key does not allow it.
            IdempotencyConflict: the request was sent before.
            Draining: the function is being closed.
        """
        if self.draining:
            raise Draining
        prompt_ids = await self._prompt_ids(request)
        request = self._with_forced_calls(request)
        if request.grammar is not None:
            await _check_grammar(request, request.grammar)
        sequences = self._sequences(request, prompt_ids)
        streams = [
            ChoiceStream(index, sequence.id, sequence.stop_ids, self._text_stream(request), self._call_parser(request))
            for index, sequence in enumerate(sequences)
        ]
        if request.continues is not None:
            await asyncio.to_thread(streams[0].replay, request.continues.emitted_ids, self._tokenizer)
        if request.id in self._running:
            raise RequestIdInUse(request.id)
        invocation = Invocation(self, request, _num_new_prompt_tokens(request, prompt_ids), streams)
        invocation.seed = sequences[0].sampling.seed
        # What its key may not do takes no place and wakes nothing; without a key, the admission hardly ever fails, so
        # the prefill runs while it goes to disk.
        events = await self._submit(invocation, sequences) if request.key_id is None else None
        running = self._run(invocation, sequences, events)
        invocation.task = asyncio.create_task(running, name=f"invocation {request.id}")
        self._running[request.id] = invocation
        invocation.task.add_done_callback(lambda _: self._running.pop(request.id, None))
        try:
            await asyncio.shield(invocation.admitted)
        except asyncio.CancelledError:
            invocation.cancel()
            raise
        return invocation

    async def count_prompt_tokens(self, request: Request) -> int:
        """Return how many tokens a request's prompt has, whether or not they fit the context.

        Raises:
            InvalidRequest: the prompt is not acceptable for this function.
        """
        return len(await self._prompt_ids(request))

    @property
    def draining(self) -> bool:
        """Whether no more requests are taken."""
        return self._drain_began.is_set()

    @property
    def num_running(self) -> int:
        return len(self._running)

    def running(self, request_id: str) -> Invocation | None:
        """Return the running invocation of that id."""
        return self._running.get(request_id)

    def cancel(self, request_id: str) -> bool:
        """End a running invocation as cancelled; False when there is none of that id."""
        if (invocation := self._running.get(request_id)) is None:
            return False
        invocation.cancelled = True
        if invocation.submitted:
            for stream in invocation.streams:
                self.backend.abort(stream.sequence_id)
        return True

    async def settled(self, request_id: str) -> None:
        """Wait until no invocation of that id runs any more, and its record is written."""
        if (invocation := self._running.get(request_id)) is not None:
            await asyncio.wait([invocation.task])

    async def drain(self, timeout_s: float) -> None:
        """Take no more requests; give the running ones a while, then cancel them and wait for their records."""
        self._drain_began.set()
        if self._running:
            await asyncio.wait(self._tasks(), timeout=timeout_s)
        for invocation in list(self._running.values()):
            if invocation.request.seal is not None:
                invocation.end_early(Cut.SHUTDOWN)
            else:
                invocation.cancel()
        await asyncio.gather(*self._tasks())

    async def close(self) -> None:
        """End what still runs, with its record, and stop the backend."""
        await self.drain(timeout_s=0)
        await self.backend.close()

    def _tasks(self) -> list[asyncio.Task[None]]:
        return [invocation.task for invocation in self._running.values()]

    async def _prompt_ids(self, request: Request) -> tuple[int, ...]:
        if request.token_ids is not None:
            return self._checked_ids(request.token_ids)
        if request.messages is not None:
            tools = request.tools.offered if request.tools is not None else ()
            of_tools = [tool.for_template() for tool in tools] or None
            text = self._template.render(request.messages, of_tools) + request.prefill
            encode = self._tokenizer.encode_rendered
        else:
            text = request.text or ""
            encode = self._tokenizer.encode_prompt
        token_ids = encode(text) if len(text) <= MAX_INLINE_CHARACTERS else await asyncio.to_thread(encode, text)
        if not token_ids:
            raise InvalidRequest(request.prompt_param, "the prompt is empty")
        return tuple(token_ids)

    def _with_forced_calls(self, request: Request) -> Request:
        """Return the request with the grammar of its tool calls, where it demands one or has another grammar beside."""
        use = request.tools
        if use is None or use.choice == "none" or (use.choice == "auto" and request.grammar is None):
            return request
        syntax = self._template.tool_syntax
        special_ids = self._tokenizer.special_ids_of(syntax.markers)
        if use.choice == "required" or request.grammar is None:
            return replace(request, grammar=syntax.forced_grammar(use, special_ids), grammar_param="tools")
        beside = syntax.grammar_beside(request.grammar, use, special_ids)
        if beside is None:
            raise InvalidRequest(request.grammar_param, f"{request.grammar_param}: only JSON can go with tools")
        return replace(request, grammar=beside)

    def _text_stream(self, request: Request) -> TextStream:
        if request.tools is None or not request.tools.offered:
            return TextStream(self._tokenizer, request.stop_strings)
        special_ids = self._tokenizer.special_ids_of(self._template.tool_syntax.markers)
        shown = {token_id: text for text, token_id in special_ids.items()}
        return TextStream(self._tokenizer, request.stop_strings, shown)

    def _call_parser(self, request: Request) -> ToolCallParser | None:
        if request.tools is None or not request.tools.offered:
            return None
        return ToolCallParser(self._template.tool_syntax, request.tools.names)

    def _checked_ids(self, token_ids: tuple[int, ...]) -> tuple[int, ...]:
        vocab_size = self.artifact.manifest.shapes.vocab_size
        if not token_ids:
            raise InvalidRequest("prompt", "the prompt is empty")
        if not all(0 <= token_id < vocab_size for token_id in token_ids):
            raise InvalidRequest("prompt", f"token ids must lie between 0 and {vocab_size - 1}")
        return token_ids

    async def _submit(self, invocation: Invocation, sequences: Items[Sequence]) -> list[TokenStream]:
        """Submit all sequences of a request, or none."""
        invocation.submitted = True
        submitted: list[TokenStream] = []
        try:
            for sequence in sequences:
                submitted.append(self.backend.submit(sequence))
        except PilotlightError:
            await self._discard([sequence.id for sequence in sequences], submitted)
            raise
        return submitted

    def _sequences(self, request: Request, prompt_ids: tuple[int, ...]) -> list[Sequence]:
        """Return one sequence a choice; each draws its own random numbers, the first one those of the seed itself."""
        first = self._sequence(request, prompt_ids)
        others = [
            replace(first, id=f"{first.id}#{index}", sampling=replace(first.sampling, seed=first.sampling.seed + index))
            for index in range(1, request.num_choices)
        ]
        return [first, *others]

    def _sequence(self, request: Request, prompt_ids: tuple[int, ...]) -> Sequence:
        room = self.max_context_tokens - len(prompt_ids)
        if room < 1:
            raise ContextLengthExceeded(len(prompt_ids), self.max_context_tokens, request.prompt_param)
        sampling = SamplingParams(**{"seed": secrets.randbits(63), **self._default_sampling, **request.sampling})
        beyond = [token_id for token_id in sampling.logit_bias if token_id >= self.artifact.manifest.shapes.vocab_size]
        if beyond:
            raise InvalidRequest("logit_bias", f"logit_bias names token {beyond[0]}, which is not in the vocabulary")
        max_new_tokens = min(request.max_new_tokens or room, self.max_answer_tokens or room, room)
        emitted_ids: tuple[int, ...] = ()
        if request.continues is not None:
            emitted_ids, sampling = request.continues.emitted_ids, replace(sampling, seed=request.continues.seed)
            if len(emitted_ids) >= max_new_tokens:
                raise InvalidRequest("resume_token", "resume_token: the context here holds no more of this answer")
        return Sequence(
            id=request.id,
            prompt_ids=prompt_ids,
            max_new_tokens=max_new_tokens,
            stop_ids=frozenset() if request.ignore_eos else self._stop_ids,
            sampling=sampling,
            num_top_logprobs=request.num_top_logprobs,
            emitted_ids=emitted_ids,
            tenant=request.tenant,
            grammar=request.grammar,
            cache_key=request.cache_key,
        )

    async def _run(self, invocation: Invocation, sequences: Items[Sequence], events: Items[TokenStream] | None) -> None:
        """Carry one invocation to its record; what was not submitted yet is submitted once it is admitted."""
        request = invocation.request
        cold_start_ms, self._cold_start_to_report_ms = self._cold_start_to_report_ms, 0.0
        progress = _Progress(request.received_at, invocation.submitted_at, cold_start_ms)
        progress.prompt_is_paid = request.continues is not None and request.continues.paid
        admission = self._admission(request, sequences)
        try:
            admitted = await self._ledger.admit(admission, request.claim)
        except PilotlightError as error:
            await self._discard([stream.sequence_id for stream in invocation.streams], events or [])
            invocation.admitted.set_exception(error)
            return
        invocation.standing = admitted.standing
        admission = msgspec.structs.replace(admission, attempt=admitted.attempt)
        try:
            if events is None and invocation.cancelled:
                events = [_cancelled() for _ in sequences]
            elif events is None:
                events = await self._submit(invocation, sequences)
        except PilotlightError as error:
            await self._reject(admission, progress, error)
            invocation.admitted.set_exception(error)
            return
        invocation.admitted.set_result(None)
        try:
            with _deadline(invocation, request.received_at + self.max_duration_s):
                failure = await self._generate(invocation, events, progress)
            usage = _usage(invocation, progress)
            if progress.replica_id is not None:
                admission = msgspec.structs.replace(admission, replica_id=progress.replica_id)
            record = final_record(admission, usage, progress.timings(), progress.finish, progress.stop_detail)
            await self._finish(invocation, record)
            self._observer.finished(record)
            invocation.record = record
            invocation.push(failure)
        except PilotlightError as error:
            invocation.push(error)
        except Exception as error:
            logger.exception("invocation %s failed", request.id)
            invocation.cancel()
            invocation.push(_caused_by(error))

    async def _generate(
        self, invocation: Invocation, events: Items[TokenStream], progress: _Progress
    ) -> PilotlightError | None:
        """Turn token events into deltas; a failed run is returned, since it is metered like any other end."""
        streams = invocation.streams
        await asyncio.gather(
            *(self._follow(invocation, stream, of, progress) for stream, of in zip(streams, events, strict=True))
        )
        progress.finish = overall_finish([invocation.finish(stream.index) for stream in streams])
        details = (stream.stop_detail for stream in streams if stream.finish is progress.finish)
        progress.stop_detail = next(details, None)
        if progress.checkpoint is not None:
            await progress.checkpoint
        if invocation.unmetered is not None:
            progress.finish, progress.stop_detail = FinishReason.ERROR, invocation.unmetered.message
            return invocation.unmetered
        if (refusal := _refusal(invocation, progress)) is not None:
            progress.finish, progress.stop_detail = FinishReason.REJECTED, refusal.message
            return refusal
        if progress.finish is FinishReason.ERROR and progress.retry_after_s is not None:
            return StartFailed(progress.stop_detail or "", progress.retry_after_s)
        if progress.finish is FinishReason.ERROR and progress.out_of_memory_retry_s is not None:
            return OutOfMemory(progress.out_of_memory_retry_s)
        if progress.finish is FinishReason.ERROR:
            return EngineError("the model run failed; what was generated until then is metered")
        return None

    async def _follow(
        self, invocation: Invocation, stream: ChoiceStream, events: TokenStream, progress: _Progress
    ) -> None:
        """Carry one choice to its end. Its events are taken where they arrive, without waking a task for each."""
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def listen(event: TokenEvent) -> None:
            if ended.done():
                return
            try:
                self._take(event, invocation, stream, progress)
            except Exception as error:  # noqa: BLE001 - a defect here must end this invocation, and no other
                ended.set_exception(error)
            else:
                if event.finish is not None:
                    ended.set_result(None)

        events.listen(listen)
        await ended
        if stream.finish is FinishReason.ERROR:
            invocation.cancel()  # the other choices: nobody will see them

    def _take(self, event: TokenEvent, invocation: Invocation, stream: ChoiceStream, progress: _Progress) -> None:
        """Count one event of a choice, and pass on what it adds."""
        if stream.finish is not None:
            return  # was under way when the stop string was found: neither billed nor delivered
        if event.token_id is not None:
            progress.count(event)
            self._observer.token(self.name, stream.gap_s(event))
            delta = stream.push(event, self._tokenizer)
            if self._note(invocation, progress):
                invocation.push(delta)
        if stream.finish is not None:
            self.backend.abort(stream.sequence_id)
        elif event.finish is FinishReason.CANCELLED and invocation.cut is not None:
            stream.finish, stream.stop_detail = FinishReason.DEADLINE, invocation.cut
            if invocation.request.seal is None:  # or what is held back belongs to the continuation
                invocation.push(stream.cut())
        elif event.finish is not None:
            stream.finish, stream.stop_detail = event.finish, event.error
            progress.retry_after_s = event.retry_after_s
            progress.out_of_memory_retry_s = event.out_of_memory_retry_s

    def _note(self, invocation: Invocation, progress: _Progress) -> bool:
        """Note a token before it is delivered, and return whether it may be.

        For the case that the whole machine crashes, a checkpoint is written at the first token and now and then after
        it, one at a time.
        """
        try:
            self._ledger.note(invocation.request.id, progress.mark(invocation.num_prompt_tokens))
        except LedgerUnavailable as error:
            self._end_unmetered(invocation, error)
        if invocation.unmetered is not None:
            return False
        due = progress.num_completion_tokens % self._ledger.checkpoint_tokens == 1
        if due and (progress.checkpoint is None or progress.checkpoint.done()):
            progress.checkpoint = asyncio.create_task(self._checkpoint(invocation, progress))
        return True

    async def _checkpoint(self, invocation: Invocation, progress: _Progress) -> None:
        """Record what a crash of the machine would lose. The stream doesn't wait for it, but ends when it fails."""
        try:
            await self._ledger.checkpoint(invocation.request.id, _usage(invocation, progress))
        except LedgerUnavailable as error:
            self._end_unmetered(invocation, error)

    def _end_unmetered(self, invocation: Invocation, error: LedgerUnavailable) -> None:
        """End what can no longer be metered, within a step."""
        logger.error("invocation %s ends because %s", invocation.request.id, error.message)
        invocation.unmetered = error
        invocation.cancel()

    async def _finish(self, invocation: Invocation, record: UsageRecord) -> None:
        """Write the record. While that fails, the client is told, and it is tried again until the function is closed.

        Raises:
            LedgerUnavailable: the function is closed; the admission stays open, and the next start closes it.
        """
        for delay_s in itertools.chain(RETRY_DELAYS_S, itertools.repeat(RETRY_DELAYS_S[-1])):
            try:
                return await self._ledger.finish(record)
            except LedgerUnavailable as error:
                if self.draining:
                    raise
                invocation.push(error)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._drain_began.wait(), delay_s)

    async def _reject(self, admission: Admission, progress: _Progress, cause: PilotlightError) -> None:
        """End what was admitted and then found no place: free of charge, and its reservation is released."""
        record = final_record(admission, Usage(), progress.timings(), FinishReason.REJECTED, cause.message)
        with contextlib.suppress(LedgerUnavailable):
            await self._ledger.finish(record)
            self._observer.finished(record)

    async def _discard(self, sequence_ids: Items[str], submitted: Items[TokenStream]) -> None:
        """End what was submitted of these sequences, the first ones of them."""
        for sequence_id, _ in zip(sequence_ids, submitted, strict=False):
            self.backend.abort(sequence_id)
        for events in submitted:
            async for _ in events:
                pass

    def _admission(self, request: Request, sequences: Items[Sequence]) -> Admission:
        continues = request.continues
        prompt_tokens = _num_new_prompt_tokens(request, sequences[0].prompt_ids)
        max_new_tokens = sum(sequence.max_new_tokens - len(sequence.emitted_ids) for sequence in sequences)
        max_busy_ms = round(self.max_duration_s * 1000)
        started_at_utc = utc_text(datetime.now(UTC))
        prices = self.prices.at(started_at_utc)
        return Admission(
            request_id=request.id,
            function=self.name,
            artifact_digest=self.artifact.digest,
            precision=self.artifact.manifest.precision,
            provider=self._provider,
            replica_id=self.replica_id,
            started_at_utc=started_at_utc,
            prices=prices,
            capacity=self.capacity,
            tee=self.tee,
            model=self.artifact.manifest.source.model,
            tenant=request.tenant,
            key_id=request.key_id,
            idempotency_key=None if request.claim is None else request.claim.idempotency_key,
            reserved_tokens=prompt_tokens + max_new_tokens,
            reserved_micros=prices.most_micros(prompt_tokens, max_new_tokens, max_busy_ms),
            resumes=None if continues is None else continues.first_id,
            resumed_tokens=_num_known_tokens(request, sequences[0].prompt_ids) - prompt_tokens,
        )


async def _check_grammar(request: Request, grammar: str) -> None:
    if request.ignore_eos:
        raise InvalidRequest("ignore_eos", f"ignore_eos cannot be combined with {request.grammar_param}")
    await asyncio.to_thread(check_grammar, grammar, request.grammar_param)


def _caused_by(error: Exception) -> EngineError:
    """Return what a client learns of a defect of ours; the admission stays open, and is closed as crashed."""
    failure = EngineError("an internal error occurred")
    failure.__cause__ = error
    return failure


def _refusal(invocation: Invocation, progress: _Progress) -> CapacityError | None:
    """Return what kept an invocation from its first token, if it was want of time or of a replica: it is free.

    An answer that can be continued elsewhere is one, even before its first token.
    """
    if progress.num_completion_tokens:
        return None
    if progress.finish is FinishReason.DEADLINE and (invocation.cut is Cut.TIMEOUT or invocation.request.seal is None):
        return Draining() if invocation.cut is Cut.SHUTDOWN else DeadlineExceeded()
    if progress.finish is FinishReason.ERROR and progress.retry_after_s is not None:
        return StartFailed(progress.stop_detail or "", progress.retry_after_s)
    return None


class _Unobserved:
    """The observer of a function that nobody watches."""

    def token(self, function: str, gap_s: float | None) -> None:
        pass

    def finished(self, record: UsageRecord) -> None:
        pass


def _num_known_tokens(request: Request, prompt_ids: Items[int]) -> int:
    """Return how many tokens stand before the first new one: the prompt, and what a continuation goes on behind."""
    return len(prompt_ids) + (0 if request.continues is None else len(request.continues.emitted_ids))


def _num_new_prompt_tokens(request: Request, prompt_ids: Items[int]) -> int:
    """Return how many tokens are billed as a prompt: none, where the answer was begun and paid for elsewhere."""
    return 0 if request.continues is not None and request.continues.paid else _num_known_tokens(request, prompt_ids)


@contextlib.contextmanager
def _deadline(invocation: Invocation, latest_at: float) -> Iterator[None]:
    """Have the invocation end early at its first deadline, ``latest_at`` at last, if the block is not left before."""
    request = invocation.request
    ends = [(latest_at, Cut.DEADLINE), (request.deadline_at, Cut.DEADLINE), (request.timeout_at, Cut.TIMEOUT)]
    first_at, cut = min((at, cut) for at, cut in ends if at is not None)
    left_s = max(0.0, first_at - time.monotonic())
    timer = asyncio.get_running_loop().call_later(left_s, invocation.end_early, cut)
    try:
        yield
    finally:
        timer.cancel()


def _cancelled() -> TokenStream:
    """Return the end of a sequence that was cancelled before it was submitted."""
    stream = TokenStream()
    stream.put(TokenEvent(None, time.monotonic(), FinishReason.CANCELLED))
    return stream


def _new_replica_id(name: str) -> str:
    return f"{name}-{secrets.token_hex(4)}"


def _usage(invocation: Invocation, progress: _Progress) -> Usage:
    left_early = progress.finish is FinishReason.CANCELLED
    return Usage(
        prompt_tokens=invocation.num_prompt_tokens if progress.prefill_started_at is not None else 0,
        cached_tokens=progress.num_cached_tokens,
        completion_tokens=progress.num_completion_tokens,
        delivered_tokens=invocation.num_delivered_tokens if left_early else progress.num_completion_tokens,
        recomputed_tokens=progress.num_recomputed_tokens,
        migrations=progress.num_migrations,
        busy_ms=progress.busy_ms,
    )


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def _default_sampling(artifact: Artifact) -> dict[str, Any]:
    """Read the sampling defaults that the model's authors recommend; ``do_sample: false`` means greedy."""
    path = artifact.path / GENERATION_CONFIG
    try:
        config = msgspec.json.decode(artifact.optional_text(GENERATION_CONFIG) or "{}", type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(path, f"is not a generation config ({error})") from error
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    defaults = {name: config[name] for name in names if config.get(name) is not None}
    if config.get("do_sample") is False:
        defaults["temperature"] = 0.0
    return defaults
