"""Sequences on replicas of other machines: whatever is lost, late, doubled or handed over, the answer is the same."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import AsyncGenerator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotlight.engine.fake import next_token
from pilotlight.errors import Draining, QueueFull
from pilotlight.host import remote
from pilotlight.host.attempt import Attempt, FromAttempt, HandOver, Part, read_answer, read_attempt
from pilotlight.host.journal import MAX_FRUITLESS_MOVES
from pilotlight.host.remote import RemoteBackend, RemoteSettings, ReplicaLost
from pilotlight.host.wire import Stages, encode
from pilotlight.request import FinishReason, SamplingParams, Sequence, TokenEvent

VOCAB_SIZE = 258
SETTINGS = RemoteSettings("f", max_open=10, max_waiting_tokens=100)
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(autouse=True)
def _without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "RETRY_S", 0.0)


def expected(prompt: tuple[int, ...], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, VOCAB_SIZE))
    return tokens[len(prompt) :]


class Faulty:
    """A place whose replicas follow a script, one fate an attempt, and messages take the way over the encoding.

    ``late`` holds parts of former epochs, which come again at the worst time.
    """

    def __init__(self, *fates: str, seed: int = 0) -> None:
        self.fates = deque(fates)
        self.attempts: list[Attempt] = []
        self.left: list[str] = []
        self.closed = 0
        self.late: list[Part] = []
        self._random = random.Random(seed)

    def leaving(self, replica_id: str) -> None:
        self.left.append(replica_id)

    async def attempt(self, attempt: Attempt) -> AsyncGenerator[FromAttempt, None]:
        arrived = read_attempt(encode(attempt))
        self.attempts.append(arrived)
        fate = self.fates.popleft() if self.fates else "finishes"
        try:
            async for answer in self._answers(arrived, fate, f"r{len(self.attempts)}"):
                for late in self.late:
                    yield late
                yield read_answer(encode(answer))
        finally:
            self.closed += 1

    async def _answers(self, attempt: Attempt, fate: str, replica_id: str) -> AsyncGenerator[FromAttempt, None]:
        sequence = attempt.sequence
        tokens = [*sequence.prompt_ids, *sequence.emitted_ids]
        position = len(sequence.emitted_ids)
        left = sequence.max_new_tokens - position
        breaks_after = left if fate == "finishes" else self._random.randrange(left)
        sent: list[Part] = []
        while position - len(sequence.emitted_ids) < breaks_after:
            await asyncio.sleep(0)
            size = min(self._random.randint(1, 3), breaks_after - (position - len(sequence.emitted_ids)))
            events = []
            for _ in range(size):
                tokens.append(next_token(tokens, VOCAB_SIZE))
                done = len(tokens) - len(sequence.prompt_ids) == sequence.max_new_tokens
                finish = FinishReason.LENGTH if done else None
                begun = 6.0 if len(tokens) - len(sequence.prompt_ids) == 1 else None
                events.append(TokenEvent(tokens[-1], 7.0, finish, begun))
            sent.append(Part(attempt.epoch, position, replica_id, 7.0, events, Stages("zygote", 1.0, 2.0, 3.0, 4.0)))
            position += size
            yield sent[-1]
        if fate == "doubles" and sent:
            yield sent[-1]
        self.late += sent
        if fate == "hands over":
            yield HandOver(attempt.epoch, replica_id)
        elif fate == "skips":
            yield Part(attempt.epoch, position + 1, replica_id, 7.0, [TokenEvent(3, 7.0)])
        elif fate == "dies":
            raise ReplicaLost("its machine is gone")


async def collect(backend: RemoteBackend, sequence: Sequence) -> list[TokenEvent]:
    return [event async for event in backend.submit(sequence)]


def tokens_of(events: list[TokenEvent]) -> list[int]:
    return [event.token_id for event in events if event.token_id is not None]


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.sampled_from(["hands over", "dies", "skips", "doubles", "goes silent"]), max_size=4),
    st.integers(1, 12),
    st.integers(0, 1000),
)
def test_whatever_happens_to_replicas_no_token_is_lost_or_doubled(fates: list[str], count: int, seed: int) -> None:
    place = Faulty(*fates, seed=seed)
    backend = RemoteBackend(SETTINGS, place)
    events = asyncio.run(collect(backend, Sequence("s", (1, 2), count, sampling=GREEDY)))
    assert tokens_of(events) == expected((1, 2), count)
    assert [event.finish for event in events if event.finish] == [FinishReason.LENGTH]
    assert place.closed == len(place.attempts)
    assert [attempt.epoch for attempt in place.attempts] == list(range(len(place.attempts)))
    assert backend.signals().num_running + backend.signals().num_waiting == 0


def test_the_next_replica_is_asked_for_the_rest_and_what_it_computes_again_is_counted() -> None:
    place = Faulty("hands over", "dies", seed=3)
    events = asyncio.run(collect(RemoteBackend(SETTINGS, place), Sequence("s", (1, 2), 12, sampling=GREEDY)))
    emitted = [len(attempt.sequence.emitted_ids) for attempt in place.attempts]
    assert emitted == sorted(emitted)
    assert emitted[-1] > 0
    assert place.left == ["r1"], "the one that said so gets nothing more; the dead one is the router's business"
    again = sum(event.num_recomputed_tokens for event in events)
    assert again == sum(2 + count for count in emitted if count)
    assert {event.replica_id for event in events if event.replica_id} <= {"r1", "r2", "r3"}


def test_instants_are_those_of_this_machine() -> None:
    times = iter([1000.0, 1000.5, *[1000.2] * 20])  # the first part is slow to arrive
    backend = RemoteBackend(SETTINGS, Faulty("dies", seed=1), clock=lambda: next(times))
    events = asyncio.run(collect(backend, Sequence("s", (1, 2), 12, sampling=GREEDY)))
    instants = [event.at for event in events]
    assert instants == sorted(instants)
    assert 1000.0 <= instants[0] <= instants[-1] <= 1000.5
    assert events[0].prefill_started_at is not None
    assert events[0].prefill_started_at <= events[0].at
    assert events[0].start is not None
    assert events[0].start.session_ms == 3.0


def test_a_sequence_that_is_lost_again_and_again_without_a_token_fails() -> None:
    class Grave(Faulty):
        async def attempt(self, attempt: Attempt) -> AsyncGenerator[FromAttempt, None]:
            self.attempts.append(attempt)
            raise ReplicaLost("out of memory")
            yield

    place = Grave()
    (event,) = asyncio.run(collect(RemoteBackend(SETTINGS, place), Sequence("s", (1,), 3)))
    assert event.finish is FinishReason.ERROR
    assert len(place.attempts) == MAX_FRUITLESS_MOVES


def test_failing_attempts_outlast_the_finding_that_a_machine_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    pauses = [remote.retry_s(count) for count in range(1, MAX_FRUITLESS_MOVES)]
    assert pauses == sorted(pauses)
    assert sum(pauses) > 15.0
    assert max(pauses) == remote.MAX_RETRY_S


class Unwilling(Faulty):
    """Replicas that all hand over at once, until one of them does not."""

    async def _answers(self, attempt: Attempt, fate: str, replica_id: str) -> AsyncGenerator[FromAttempt, None]:
        if len(self.attempts) < 20:
            yield HandOver(attempt.epoch, replica_id)
            return
        async for answer in super()._answers(attempt, "finishes", replica_id):
            yield answer


def test_whoever_is_turned_away_again_and_again_waits_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[int] = []

    def retry_s(count: int) -> float:
        pauses.append(count)
        return 0.0

    monkeypatch.setattr(remote, "retry_s", retry_s)
    place = Unwilling()
    events = asyncio.run(collect(RemoteBackend(SETTINGS, place), Sequence("s", (1, 2), 3, sampling=GREEDY)))
    assert tokens_of(events) == expected((1, 2), 3)
    assert pauses == list(range(2, 20)), "the first time it goes on at once"


def test_a_defect_in_the_place_ends_the_stream_as_an_error() -> None:
    class Broken(Faulty):
        async def attempt(self, attempt: Attempt) -> AsyncGenerator[FromAttempt, None]:
            raise KeyError("a bug")
            yield

    (event,) = asyncio.run(collect(RemoteBackend(SETTINGS, Broken()), Sequence("s", (1,), 3)))
    assert event.finish is FinishReason.ERROR


class Endless(Faulty):
    """Replicas that answer the first token and then nothing."""

    async def attempt(self, attempt: Attempt) -> AsyncGenerator[FromAttempt, None]:
        try:
            yield Part(attempt.epoch, 0, "r", 0.0, [TokenEvent(5, 0.0, None, 0.0)])
            await asyncio.Event().wait()
        finally:
            self.closed += 1


def test_an_abort_ends_the_stream_and_the_attempt() -> None:
    place = Endless()

    async def scenario() -> list[TokenEvent]:
        backend = RemoteBackend(SETTINGS, place)
        events = []
        async for event in backend.submit(Sequence("s", (1,), 3)):
            events.append(event)
            backend.abort("s")
        backend.abort("s")
        await asyncio.sleep(0)
        return events

    events = asyncio.run(scenario())
    assert [event.finish for event in events] == [None, FinishReason.CANCELLED]
    assert place.closed == 1


def test_room_is_bounded_in_sequences_and_in_tokens_and_ends_with_closing() -> None:
    async def scenario() -> None:
        backend = RemoteBackend(RemoteSettings("f", max_open=2, max_waiting_tokens=10), Endless())
        first = collect(backend, Sequence("a", tuple(range(8)), 3))
        reading = asyncio.create_task(first)
        await asyncio.sleep(0)
        with pytest.raises(QueueFull, match="10 prompt tokens"):
            backend.submit(Sequence("b", (1, 2, 3), 3))
        backend.submit(Sequence("b", (1,), 3))
        with pytest.raises(QueueFull, match="2 requests"):
            backend.submit(Sequence("c", (1,), 3))
        await backend.close()
        assert (await reading)[-1].finish is FinishReason.CANCELLED
        with pytest.raises(Draining):
            backend.submit(Sequence("d", (1,), 3))

    asyncio.run(scenario())
