"""Sums by any grouping are those of the ledger, and the machines' cost is shared out to the last micro-unit."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from itertools import combinations
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from admissions import NOON, admission
from ledgers import KINDS, fresh, writer
from pilotlight.errors import ConfigError
from pilotlight.metering.ledger_reader import LedgerReader
from pilotlight.metering.machine_cost import MS_PER_HOUR, ReplicaTime, micros_per_hour, share_out
from pilotlight.metering.record import UsageRecord, final_record
from pilotlight.metering.sql_ledger import SqlLedger
from pilotlight.metering.totals import GROUPS, Margin
from pilotlight.metering.usage import Timings, Usage
from pilotlight.request import FinishReason

GROUPINGS = [by for size in range(1, 4) for by in combinations(GROUPS, size)]
COUNTS = ("prompt_tokens", "cached_tokens", "completion_tokens", "cost_micros")


@given(st.integers(0, 10**15), st.lists(st.integers(0, 10**9), max_size=20))
def test_shares_add_up_and_are_proportional(micros: int, weights: list[int]) -> None:
    shares = share_out(micros, weights)
    total = sum(weights)
    assert sum(shares) == (micros if total else 0)
    assert all(
        abs(share * total - micros * weight) < max(total, 1) for share, weight in zip(shares, weights, strict=True)
    )


class Invoked(msgspec.Struct, frozen=True):
    function: str
    tenant: str | None
    model: str | None
    currency: str
    hours: int
    tokens: int
    busy_ms: int


invocations = st.lists(
    st.builds(
        Invoked,
        st.sampled_from("ab"),
        st.sampled_from(["x", "y", None]),
        st.sampled_from(["m", "n", None]),
        st.sampled_from(["USD", "EUR"]),
        st.integers(0, 60),
        st.integers(0, 9),
        st.integers(0, 5000),
    ),
    max_size=12,
)
spent = st.lists(
    st.builds(
        ReplicaTime,
        st.sampled_from(["r1", "r2"]),
        st.sampled_from("ab"),
        st.sampled_from(["2026-11-22", "2026-11-23", "2026-11-24", "2026-11-25"]),
        st.sampled_from(["USD", "EUR"]),
        st.integers(0, 10**8),
        st.integers(5_000, 10**7),
        st.integers(0, 5_000),
    ),
    max_size=8,
    unique_by=lambda s: (s.replica_id, s.function, s.day, s.currency),
)


async def fill(ledger: SqlLedger, invoked: list[Invoked], times: list[ReplicaTime]) -> list[UsageRecord]:
    records = []
    for number, one in enumerate(invoked):
        admitted = msgspec.structs.replace(
            admission(f"{number}", None, NOON + timedelta(hours=one.hours), one.currency),
            function=one.function,
            tenant=one.tenant,
            model=one.model,
        )
        usage = Usage(prompt_tokens=one.tokens, completion_tokens=one.tokens, busy_ms=one.busy_ms)
        records.append(final_record(admitted, usage, Timings(), FinishReason.STOP))
        await ledger.admit(admitted)
        await ledger.finish(records[-1])
    for time in times:
        await ledger.add_replica_time(time)
    return records


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=30)
@given(invoked=invocations, times=spent, since_hours=st.none() | st.integers(0, 60))
def test_every_grouping_sums_up_to_the_ledger(
    kind: str, invoked: list[Invoked], times: list[ReplicaTime], since_hours: int | None
) -> None:
    since = None if since_hours is None else NOON + timedelta(hours=since_hours)
    with fresh(kind) as path, writer(path) as ledger, LedgerReader(path) as reader:
        asyncio.run(fill(ledger, invoked, times))
        records = list(reader.records(since=since))
        expected = _sums([msgspec.structs.asdict(record) for record in records], "USD")
        machine = None
        for by in GROUPINGS:
            rows = reader.totals(by, since)
            assert _sums([msgspec.structs.asdict(row) for row in rows], "USD") == expected, by
            assert sum(row.num_invocations for row in rows) == len(records)
            assert len({(row.currency, *row.group.values()) for row in rows}) == len(rows)
            found = sum(row.machine_micros for row in rows)
            assert machine in (None, found), by
            machine = found
        margins = reader.margins(since)
        assert sum(margin.busy_micros for margin in margins) == machine
        assert sum(margin.cost_micros for margin in margins) == sum(record.cost_micros for record in records)


def _sums(rows: list[dict[str, Any]], currency: str) -> list[int]:
    return [sum(row[name] for row in rows if row["currency"] == currency) for name in COUNTS]


@pytest.mark.parametrize("kind", KINDS)
def test_a_replica_costs_while_it_works_and_while_it_waits(kind: str) -> None:
    invoked = [Invoked("a", t, None, "USD", 0, 0, ms) for t, ms in (("x", 1000), ("y", 3000))]
    hour = ReplicaTime("r", "a", "2026-11-22", "USD", 900_000, MS_PER_HOUR, MS_PER_HOUR // 9)
    with fresh(kind) as path, writer(path) as ledger, LedgerReader(path) as reader:
        asyncio.run(fill(ledger, invoked, [hour]))
        by_tenant = {row.group["tenant"]: row.machine_micros for row in reader.totals(("tenant",))}
        assert by_tenant == {"x": 25_000, "y": 75_000}
        assert reader.margins() == [Margin("a", "USD", 2, 0, 100_000, 800_000, -900_000)]
        asyncio.run(ledger.add_replica_time(hour))
        assert reader.margins()[0].warm_micros == 1_600_000


def test_a_price_of_a_replica_is_a_decimal() -> None:
    assert micros_per_hour("0.096", "here") == 96_000
    with pytest.raises(ConfigError, match=r"^here = '1e3': expected an amount"):
        micros_per_hour("1e3", "here")
