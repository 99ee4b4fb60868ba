"""What a step emitted is noted at once, and nothing of it is delivered before."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from pilotlight.artifact import Artifact
from pilotlight.engine.fake import FakeSession
from pilotlight.errors import LedgerUnavailable
from pilotlight.function import Request
from pilotlight.metering.marks import Mark
from pilotlight.request import FinishReason
from support import VOCAB_SIZE, Serving, serving

NUM_STREAMS = 4
NUM_TOKENS = 30


class Notes:
    """What was noted, request by request, and how often; one request's notes can be made to fail."""

    def __init__(self, toy: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_writes = 0
        self.noted: dict[str, int] = {}
        self.fails_for = ""
        write = toy.ledger.note

        def note(marks: Mapping[str, Mark]) -> None:
            self.num_writes += 1
            if self.fails_for in marks:
                raise LedgerUnavailable("closed by another host")
            write(marks)
            self.noted |= {request_id: mark.completion_tokens for request_id, mark in marks.items()}

        monkeypatch.setattr(toy.ledger, "note", note)


async def listen(toy: Serving, notes: Notes, request_id: str, on_delta: Callable[[], None] = lambda: None) -> int:
    """Read one answer, and return how many tokens came; each must have been noted when it came."""
    invocation = await toy.function.invoke(
        Request(request_id, token_ids=(7, 8), max_new_tokens=NUM_TOKENS, ignore_eos=True)
    )
    num_tokens = 0
    try:
        async for delta in invocation:
            num_tokens += len(delta.token_ids)
            assert notes.noted[request_id] >= num_tokens
            on_delta()
    except LedgerUnavailable:
        assert request_id == notes.fails_for
    return num_tokens


def test_a_step_is_one_note_and_comes_before_its_deltas(
    toy_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_run = threading.Event()
    session = FakeSession(VOCAB_SIZE, NUM_STREAMS, before_run=may_run.wait)

    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path, session) as toy:
            notes = Notes(toy, monkeypatch)
            reading = [asyncio.create_task(listen(toy, notes, f"{number}")) for number in range(NUM_STREAMS)]
            while toy.function.num_running < NUM_STREAMS:
                await asyncio.sleep(0)
            may_run.set()
            assert await asyncio.gather(*reading) == [NUM_TOKENS] * NUM_STREAMS
            assert notes.num_writes <= session.num_runs < NUM_STREAMS * NUM_TOKENS
            records = [toy.ledger.get(f"{number}") for number in range(NUM_STREAMS)]
            assert [record and record.completion_tokens for record in records] == [NUM_TOKENS] * NUM_STREAMS

    asyncio.run(scenario())


def test_what_cannot_be_noted_does_not_end_the_others_of_its_step(
    toy_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:
            notes = Notes(toy, monkeypatch)
            notes.fails_for = "bad"
            counts = await asyncio.gather(*(listen(toy, notes, name) for name in ("one", "bad", "two")))
            assert counts == [NUM_TOKENS, 0, NUM_TOKENS]
            record = toy.ledger.get("bad")
            assert record is not None
            assert record.finish_reason is FinishReason.ERROR
            assert 1 <= record.completion_tokens <= NUM_TOKENS

    asyncio.run(scenario())


def test_a_checkpoint_is_written_at_the_first_token_and_now_and_then(
    toy_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_run = threading.Semaphore(1)
    session = FakeSession(VOCAB_SIZE, before_run=may_run.acquire)

    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path, session) as toy:
            notes = Notes(toy, monkeypatch)
            monkeypatch.setattr(toy.ledger, "checkpoint_tokens", 10)
            written: list[int] = []

            async def checkpoint(request_id: str, usage: object) -> None:
                written.append(notes.noted[request_id])

            monkeypatch.setattr(toy.ledger, "checkpoint", checkpoint)
            await listen(toy, notes, "one", on_delta=may_run.release)
            assert written == [1, 11, 21]

    asyncio.run(scenario())
