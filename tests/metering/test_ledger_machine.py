"""All that a ledger keeps, through random interleavings of its operations and crashes: nothing is lost or doubled."""

from __future__ import annotations

import asyncio
import sqlite3
from collections import Counter
from pathlib import Path

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from admissions import MAX_NEW, PROMPT, admission, ended
from ledgers import fresh, writer
from pilotlight.errors import IdempotencyConflict, RequestIdInUse, RequestNotFound
from pilotlight.metering.idempotency import Claim
from pilotlight.metering.ledger_reader import LedgerReader
from pilotlight.metering.marks import Mark
from pilotlight.metering.outbox import Buried, Delivered, Postponed
from pilotlight.metering.record import UsageRecord
from pilotlight.metering.schema import LEDGER_VERSION, MIGRATIONS
from pilotlight.request import FinishReason

URL = "http://127.0.0.1:1/"
CLAIM = Claim("", "", "f", now=0.0, expires_at=1000.0)

request_ids = st.sampled_from("abcdef")
claim_keys = st.sampled_from(["k1", "k2", None])


class LedgerMachine(RuleBasedStateMachine):
    """The model: what is open and how far, how each record ended, who holds which claim, and which events arrived."""

    kind = "sqlite"

    def __init__(self) -> None:
        super().__init__()
        self.place = fresh(self.kind)
        self.path = self.place.__enter__()
        self.ledger = writer(self.path)
        asyncio.run(self.ledger.subscribe(URL))
        self.open: dict[str, int] = {}
        self.ends: dict[str, tuple[FinishReason, int]] = {}
        self.claims: dict[str, tuple[str, int]] = {}
        self.received: Counter[str] = Counter()
        self.buried = 0

    @rule(request_id=request_ids, key=claim_keys)
    def admit(self, request_id: str, key: str | None) -> None:
        claim = None if key is None else CLAIM._replace(idempotency_key=key)
        holder, attempt = self.claims.get(key or "", ("", 0))
        blocked = holder != "" and self.ends.get(holder, (None, 0))[0] is not FinishReason.CRASHED
        try:
            admitted = asyncio.run(self.ledger.admit(admission(request_id, None), claim))
        except RequestIdInUse:
            assert request_id in self.open or request_id in self.ends
            return
        except IdempotencyConflict:
            assert blocked
            return
        assert not blocked
        assert request_id not in self.open
        assert request_id not in self.ends
        self.open[request_id] = 0
        if key is not None:
            assert admitted.attempt == attempt + 1
            self.claims[key] = (request_id, attempt + 1)

    @rule(request_id=request_ids, num_tokens=st.integers(1, MAX_NEW))
    def note(self, request_id: str, num_tokens: int) -> None:
        if request_id in self.open:
            self.ledger.note({request_id: Mark(PROMPT, 0, num_tokens, 0)})
            self.open[request_id] = num_tokens

    @rule(request_id=request_ids, num_tokens=st.integers(0, MAX_NEW))
    def finish(self, request_id: str, num_tokens: int) -> None:
        record = ended(admission(request_id, None), num_tokens)
        try:
            asyncio.run(self.ledger.finish(record))
            asyncio.run(self.ledger.finish(record))  # again: its answer may have been lost
        except RequestNotFound:
            assert request_id not in self.open
            return
        del self.open[request_id]
        self.ends[request_id] = (FinishReason.STOP, num_tokens)

    @rule(outcome=st.sampled_from(["delivered", "lost answer", "failed", "given up"]))
    def deliver(self, outcome: str) -> None:
        for event in self.ledger.due_events(URL, now=1.0, limit=2):
            record = event.record
            if outcome in ("delivered", "lost answer"):
                self.received[record] += 1
            if outcome == "delivered":
                asyncio.run(self.ledger.settle_events([Delivered(event.number)]))
            elif outcome == "given up":
                self.buried += 1
                asyncio.run(self.ledger.settle_events([Buried(event.number, "now", "why")]))
            else:
                asyncio.run(self.ledger.settle_events([Postponed(event.number, 0.5)]))

    @rule()
    def crash(self) -> None:
        """A ledger that is closed leaves the same rows and marks as a process that is killed."""
        self.ledger.close()
        self.ledger = writer(self.path)
        self.ends |= {request_id: (FinishReason.CRASHED, tokens) for request_id, tokens in self.open.items()}
        self.open.clear()

    @invariant()
    def every_end_is_one_record(self) -> None:
        with LedgerReader(self.path) as reader:
            found = list(reader.records())
        assert {record.request_id: _end(record) for record in found} == self.ends
        assert len(found) == len(self.ends)

    def teardown(self) -> None:
        """In the end every record has arrived, or is a dead letter."""
        self.crash()
        while due := self.ledger.due_events(URL, now=1.0, limit=100):
            for event in due:
                self.received[event.record] += 1
            asyncio.run(self.ledger.settle_events([Delivered(event.number) for event in due]))
        with LedgerReader(self.path) as reader:
            assert len(self.received) >= len(self.ends) - self.buried
            assert sum(num_dead for _, _, num_dead in reader.outbox_counts()) == self.buried
            assert all(num_waiting == 0 for _, num_waiting, _ in reader.outbox_counts())
        self.ledger.close()
        self.place.__exit__(None, None, None)


def _end(record: UsageRecord) -> tuple[FinishReason, int]:
    return record.finish_reason, record.completion_tokens


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(deadline=None, max_examples=20, stateful_step_count=25)


class PostgresMachine(LedgerMachine):
    kind = "postgres"


TestPostgresMachine = PostgresMachine.TestCase
TestPostgresMachine.settings = settings(deadline=None, max_examples=6, stateful_step_count=25)


@pytest.mark.parametrize("version", range(1, LEDGER_VERSION))
def test_a_ledger_of_any_earlier_version_goes_on(tmp_path: Path, version: int) -> None:
    path = tmp_path / "usage.db"
    with sqlite3.connect(path) as old:
        old.execute("PRAGMA journal_mode = WAL")
        for statements in MIGRATIONS[:version]:
            for statement in statements:
                old.execute(statement)
        old.execute(f"PRAGMA user_version = {version}")
        record = ended(admission("old", None), 2)
        texts = [msgspec.json.encode(struct).decode() for struct in (admission("old", None), record)]
        old.execute("INSERT INTO invocations (request_id, admission, record) VALUES ('old', ?, ?)", texts)
    old.close()
    with LedgerReader(path) as reader:
        assert [found.request_id for found in reader.records()] == ["old"]
        assert reader.totals(("key", "day"))[0].completion_tokens == 2
    with writer(path) as ledger:
        asyncio.run(ledger.admit(admission("new", None)))
        asyncio.run(ledger.finish(ended(admission("new", None), 1)))
        assert ledger.get("old") == record
