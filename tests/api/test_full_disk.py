"""A ledger that cannot be written: nothing new is served, nothing goes on unmetered, and no record is lost."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pilotlight.artifact import Artifact
from pilotlight.engine.fake import FakeSession
from pilotlight.errors import LedgerUnavailable
from pilotlight.metering.ledger_reader import LedgerReader
from pilotlight.metering.marks import Mark
from pilotlight.request import FinishReason
from support import VOCAB_SIZE, Serving, serving

FULL = LedgerUnavailable("the usage ledger cannot be written (database or disk is full)")


class Disk:
    """Lets a ledger's writes fail while it is full."""

    def __init__(self, api: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = False
        write, pwrite = api.ledger._commits.write, api.ledger._marks._write

        async def commit(apply: Any) -> None:
            if self.full:
                raise FULL
            await write(apply)

        def mark(first: int, last: int) -> None:
            if self.full:
                raise FULL
            pwrite(first, last)

        monkeypatch.setattr(api.ledger._commits, "write", commit)
        monkeypatch.setattr(api.ledger._marks, "_write", mark)


def test_new_requests_are_refused_with_503(
    toy_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as api:
            disk = Disk(api, monkeypatch)
            disk.full = True
            refused = await api.complete("hi", max_tokens=2)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "ledger_unavailable")
            assert int(refused.headers["retry-after"]) >= 1
            disk.full = False
            assert (await api.complete("hi", max_tokens=2)).status_code == 200

    asyncio.run(scenario())


def test_a_running_stream_ends_and_its_record_is_written_later(
    toy_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = threading.Semaphore(5)
    session = FakeSession(VOCAB_SIZE, max_context_tokens=4000, before_run=steps.acquire)
    monkeypatch.setattr("pilotlight.function.run.RETRY_DELAYS_S", (0.001,))

    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path, session) as api:
            disk = Disk(api, monkeypatch)
            body = {"model": "toy", "prompt": [1], "max_tokens": 3000, "ignore_eos": True, "stream": True,
                    "return_token_ids": True}  # fmt: skip
            asking = asyncio.create_task(api.client.post("/v1/completions", json=body, headers={"x-request-id": "cut"}))
            while session.num_runs < 5:
                await asyncio.sleep(0)
            disk.full = True
            for _ in range(4000):
                steps.release()
            frames = [json.loads(line.removeprefix("data: ")) for line in (await asking).text.split("\n\n") if line]
            assert frames[-1]["error"]["code"] == "ledger_unavailable"
            received = sum(len(choice["token_ids"]) for frame in frames[:-1] for choice in frame["choices"])
            assert received < 3000
            assert api.ledger.get("cut") is None
            disk.full = False
            await api.function.settled("cut")
            record = api.ledger.get("cut")
            assert record is not None
            assert record.finish_reason is FinishReason.ERROR
            assert received <= record.completion_tokens < 3000

    asyncio.run(scenario())


def test_no_token_is_delivered_that_could_not_be_noted(
    toy_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted: list[int] = []

    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as api:
            note = api.ledger.note

            def note_three(marks: Mapping[str, Mark]) -> None:
                (mark,) = marks.values()
                if mark.completion_tokens > 3:
                    raise FULL
                note(marks)
                noted.append(mark.completion_tokens)

            monkeypatch.setattr(api.ledger, "note", note_three)
            stream = await api.complete([1], max_tokens=9, ignore_eos=True, stream=True, return_token_ids=True)
            *frames, error = [json.loads(line.removeprefix("data: ")) for line in stream.text.split("\n\n") if line]
            assert error["error"]["code"] == "ledger_unavailable"
            received = sum(len(choice["token_ids"]) for frame in frames for choice in frame["choices"])
            assert received == max(noted, default=0)

    asyncio.run(scenario())


def test_what_cannot_be_written_until_the_end_is_closed_as_crashed_by_the_next_start(
    toy_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as api:
            disk = Disk(api, monkeypatch)
            finish = api.ledger.finish

            async def finish_on_a_full_disk(record: Any) -> None:
                disk.full = True
                await finish(record)

            monkeypatch.setattr(api.ledger, "finish", finish_on_a_full_disk)
            failed = await api.complete([1, 2, 3], max_tokens=7, ignore_eos=True)
            assert (failed.status_code, failed.json()["error"]["code"]) == (503, "ledger_unavailable")
        async with serving(toy_artifact, tmp_path):
            pass
        with LedgerReader(tmp_path / "usage.db") as reader:
            (record,) = reader.records()
        assert (record.finish_reason, record.prompt_tokens, record.completion_tokens) == (FinishReason.CRASHED, 3, 7)

    asyncio.run(scenario())
