"""Limits: nothing is spent twice, nothing beyond, whatever happens at the same time and whatever crashes."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from admissions import MAX_NEW, NOON, PROMPT, RESERVED, admission, ended
from ledgers import KINDS, fresh, writer
from pilotlight.errors import (
    InvalidKey,
    InvalidRequest,
    LimitExceeded,
    NotPermitted,
    PilotlightError,
    RequestIdInUse,
)
from pilotlight.metering.database import Location, connect_reader
from pilotlight.metering.keyring import KeyDesk
from pilotlight.metering.keys import Limits
from pilotlight.metering.ledger_reader import LedgerReader
from pilotlight.metering.limits import Span, Use, periods, refusal
from pilotlight.metering.record import Admission, utc_text
from pilotlight.metering.sql_ledger import SqlLedger
from pilotlight.metering.usage import Usage


def make_key(path: Location, limits: Limits) -> str:
    with KeyDesk(path) as desk:
        return desk.create("app", "acme", None, limits)[0].key_id


@pytest.fixture(params=KINDS)
def path(request: pytest.FixtureRequest) -> Iterator[Location]:
    with fresh(request.param) as location:
        yield location


@pytest.fixture
def ledger(path: Location) -> Iterator[SqlLedger]:
    with writer(path) as ledger:
        yield ledger


async def outcomes(ledger: SqlLedger, admissions: list[Admission]) -> Counter[str]:
    found = await asyncio.gather(*(ledger.admit(each) for each in admissions), return_exceptions=True)
    return Counter(type(outcome).__name__ for outcome in found)


@pytest.mark.parametrize(
    "limits",
    [
        Limits(tokens_per_minute=100 * RESERVED),
        Limits(tokens_per_day=100 * RESERVED + RESERVED - 1),
        Limits(tokens_per_month=100 * RESERVED),
        Limits(micros_per_day=100 * RESERVED * 1_000_000),
        Limits(micros_per_month=101 * RESERVED * 1_000_000 - 1),
        Limits(requests_per_minute=100),
        Limits(max_concurrent=100),
        Limits(max_concurrent=500, tokens_per_day=1000 * RESERVED, requests_per_minute=100),
    ],
    ids=str,
)
def test_of_1000_at_once_exactly_100_are_admitted(ledger: SqlLedger, path: Location, limits: Limits) -> None:
    key_id = make_key(path, limits)
    found = asyncio.run(outcomes(ledger, [admission(f"{number}", key_id) for number in range(1000)]))
    assert found == {"Admitted": 100, "LimitExceeded": 900}


def test_two_processes_share_one_budget(path: Location) -> None:
    with writer(path) as one, writer(path) as two:
        key_id = make_key(path, Limits(tokens_per_day=10 * RESERVED))

        async def both() -> Counter[str]:
            first = outcomes(one, [admission(f"a{number}", key_id) for number in range(50)])
            second = outcomes(two, [admission(f"b{number}", key_id) for number in range(50)])
            a, b = await asyncio.gather(first, second)
            return a + b

        assert asyncio.run(both()) == {"Admitted": 10, "LimitExceeded": 90}


def test_what_was_reserved_and_not_used_is_free_again(ledger: SqlLedger, path: Location) -> None:
    key_id = make_key(path, Limits(tokens_per_day=2 * RESERVED))

    async def spend() -> None:
        first = admission("a", key_id)
        await ledger.admit(first)
        await ledger.admit(admission("b", key_id))
        with pytest.raises(LimitExceeded, match="20 are used or reserved, 10 are asked for"):
            await ledger.admit(admission("c", key_id))
        await ledger.finish(ended(first, completion_tokens=0))
        with pytest.raises(LimitExceeded, match="14 are used or reserved"):
            await ledger.admit(admission("c", key_id))

    asyncio.run(spend())


def test_a_restart_forgets_neither_use_nor_limits_and_releases_what_crashed(path: Location) -> None:
    key_id = make_key(path, Limits(tokens_per_day=2 * RESERVED, max_concurrent=1))
    with writer(path) as ledger:
        asyncio.run(ledger.admit(admission("a", key_id)))
        asyncio.run(ledger.checkpoint("a", Usage(prompt_tokens=PROMPT, completion_tokens=3)))
    with writer(path) as ledger:
        asyncio.run(ledger.admit(admission("b", key_id)))
        asyncio.run(ledger.finish(ended(admission("b", key_id), completion_tokens=6)))
        with pytest.raises(LimitExceeded, match="17 are used or reserved"):
            asyncio.run(ledger.admit(admission("c", key_id)))


def test_another_minute_is_another_limit_and_old_minutes_are_forgotten(ledger: SqlLedger, path: Location) -> None:
    key_id = make_key(path, Limits(requests_per_minute=1))

    async def minutes() -> None:
        await ledger.admit(admission("a", key_id))
        with pytest.raises(LimitExceeded) as caught:
            await ledger.admit(admission("b", key_id))
        assert caught.value.retry_after_s == 45
        await ledger.admit(admission("b", key_id, NOON + timedelta(minutes=1)))
        await ledger.finish(ended(admission("a", key_id), completion_tokens=1))

    asyncio.run(minutes())
    assert [period for period in rows(path) if len(period) == 16] == ["2026-11-22T12:01"]


def test_what_can_never_fit_is_a_bad_request(ledger: SqlLedger, path: Location) -> None:
    key_id = make_key(path, Limits(tokens_per_minute=RESERVED - 1))
    with pytest.raises(InvalidRequest, match="may use up to 10 tokens; its key allows 9 tokens a minute") as caught:
        asyncio.run(ledger.admit(admission("a", key_id)))
    assert caught.value.param == "max_tokens"


def test_budgets_are_a_quota_and_minutes_are_a_rate(ledger: SqlLedger, path: Location) -> None:
    for limits, type, code in (
        (Limits(micros_per_day=RESERVED * 1_000_000), "insufficient_quota", "insufficient_quota"),
        (Limits(tokens_per_minute=RESERVED), "tokens", "rate_limit_exceeded"),
        (Limits(max_concurrent=1), "requests", "rate_limit_exceeded"),
    ):
        key_id = make_key(path, limits)
        asyncio.run(ledger.admit(admission(f"{key_id}-1", key_id)))
        with pytest.raises(LimitExceeded) as caught:
            asyncio.run(ledger.admit(admission(f"{key_id}-2", key_id)))
        assert (caught.value.type, caught.value.code) == (type, code)


def test_a_budget_in_another_currency_buys_nothing(ledger: SqlLedger, path: Location) -> None:
    key_id = make_key(path, Limits(micros_per_day=1, currency="EUR"))
    with pytest.raises(NotPermitted, match="the key's budget is in EUR, and 'demo' costs USD"):
        asyncio.run(ledger.admit(admission("a", key_id)))


def test_a_key_that_was_revoked_after_the_door_is_refused(ledger: SqlLedger, path: Location) -> None:
    key_id = make_key(path, Limits())
    with KeyDesk(path) as desk:
        desk.revoke(key_id)
    with pytest.raises(InvalidKey):
        asyncio.run(ledger.admit(admission("a", key_id)))


def test_the_headers_tell_what_is_left() -> None:
    limits = Limits(requests_per_minute=2, tokens_per_minute=15)
    used = dict.fromkeys(Span, Use()) | {Span.MINUTE: Use(1, 10, 0)}
    refused = refusal(limits, Use(1, 10, 0), used, NOON)
    assert isinstance(refused, LimitExceeded)
    assert refused.headers == {
        "x-ratelimit-limit-requests": "2",
        "x-ratelimit-remaining-requests": "1",
        "x-ratelimit-reset-requests": "45.000s",
        "x-ratelimit-limit-tokens": "15",
        "x-ratelimit-remaining-tokens": "5",
        "x-ratelimit-reset-tokens": "45.000s",
    }


@pytest.mark.parametrize(
    ("span", "limits", "left"),
    [
        (Span.DAY, Limits(tokens_per_day=1), timedelta(hours=11, minutes=59, seconds=45)),
        (Span.MONTH, Limits(tokens_per_month=1), timedelta(days=8, hours=11, minutes=59, seconds=45)),
    ],
)
def test_a_budget_says_when_the_next_one_begins(span: Span, limits: Limits, left: timedelta) -> None:
    used = dict.fromkeys(Span, Use()) | {span: Use(1, 1, 0)}
    refused = refusal(limits, Use(1, 1, 0), used, NOON)
    assert isinstance(refused, LimitExceeded)
    assert refused.retry_after_s == left.total_seconds()


def rows(path: Location) -> dict[str, Use]:
    connection = connect_reader(path)
    query = "SELECT period, num_requests, num_tokens, micros FROM key_use ORDER BY period"
    found = {period: Use(*counts) for period, *counts in connection.execute(query)}
    connection.close()
    return found


class KeyInUse(RuleBasedStateMachine):
    """Any interleaving of admissions, ends and crashes: use and reservations are those of the records, in any limit."""

    opened = Bundle("opened")
    LIMIT = 5 * RESERVED
    kind = "sqlite"

    def __init__(self) -> None:
        super().__init__()
        self.place = fresh(self.kind)
        self.path = self.place.__enter__()
        self.key_id = make_key(self.path, Limits(tokens_per_day=self.LIMIT, max_concurrent=3))
        self.ledger = writer(self.path)
        self.open: set[str] = set()
        self.ended_tokens = 0

    @rule(target=opened, request_id=st.sampled_from("abcdefghij"))
    def admit(self, request_id: str) -> str:
        fits = self.ended_tokens + (len(self.open) + 1) * RESERVED <= self.LIMIT and len(self.open) < 3
        try:
            asyncio.run(self.ledger.admit(admission(request_id, self.key_id)))
        except RequestIdInUse:
            return request_id
        except PilotlightError:
            assert not fits
            return request_id
        assert fits
        self.open.add(request_id)
        return request_id

    @rule(request_id=consumes(opened), completion_tokens=st.integers(0, MAX_NEW))
    def finish(self, request_id: str, completion_tokens: int) -> None:
        if request_id in self.open:
            self.open.remove(request_id)
            asyncio.run(self.ledger.finish(ended(admission(request_id, self.key_id), completion_tokens)))
            self.ended_tokens += PROMPT + completion_tokens

    @rule()
    def crash(self) -> None:
        """A ledger that is closed leaves the same rows as a process that is killed; nothing was checkpointed."""
        self.ledger.close()
        self.ledger = writer(self.path)
        self.open.clear()

    @invariant()
    def use_is_that_of_the_records_and_of_what_is_open(self) -> None:
        found = rows(self.path)
        with LedgerReader(self.path) as reader:
            records = list(reader.records())
        assert sum(record.prompt_tokens + record.completion_tokens for record in records) == self.ended_tokens
        if found:
            spans = periods(utc_text(NOON))
            reserved = len(self.open) * RESERVED
            assert found[spans[Span.OPEN]] == Use(len(self.open), reserved, reserved * 1_000_000)
            today = self.ended_tokens + reserved
            assert found[spans[Span.DAY]] == Use(len(records) + len(self.open), today, today * 1_000_000)
            assert today <= self.LIMIT

    def teardown(self) -> None:
        self.ledger.close()
        self.place.__exit__(None, None, None)


TestKeyInUse = KeyInUse.TestCase
TestKeyInUse.settings = settings(deadline=None, max_examples=20, stateful_step_count=25)


class PostgresKeyInUse(KeyInUse):
    kind = "postgres"


TestPostgresKeyInUse = PostgresKeyInUse.TestCase
TestPostgresKeyInUse.settings = settings(deadline=None, max_examples=6, stateful_step_count=25)
