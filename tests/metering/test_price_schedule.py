"""Prices over time: which table holds when, and what another one would have changed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from admissions import admission, ended
from pilotlight.errors import ConfigError
from pilotlight.metering.ledger import Ledger
from pilotlight.metering.price_schedule import PriceSchedule, repriced_micros
from pilotlight.metering.prices import PriceTable

OLD = {"completion_per_million_tokens": "1"}
NEW = {"completion_per_million_tokens": "2", "valid_from": "2026-12-01"}


def test_one_table_holds_for_ever() -> None:
    schedule = PriceSchedule.from_config(OLD, "prices")
    assert schedule.at("2020-01-01T00:00:00.000000Z") == schedule.at("2040-01-01T00:00:00.000000Z")
    assert schedule.tables == (PriceTable.from_config(OLD),)


@pytest.mark.parametrize("given", [[OLD, NEW], [NEW, OLD]], ids=["in order", "out of order"])
def test_the_table_is_that_of_the_instant(given: list[dict[str, str]]) -> None:
    schedule = PriceSchedule.from_config(given, "prices")
    found = [
        schedule.at(f"{instant}Z").completion_micros_per_million_tokens
        for instant in ("2026-11-30T23:59:59.999999", "2026-12-01T00:00:00.000000", "2027-01-01T00:00:00.000000")
    ]
    assert found == [1_000_000, 2_000_000, 2_000_000]


def test_an_instant_may_have_an_offset() -> None:
    schedule = PriceSchedule.from_config([OLD, {**NEW, "valid_from": "2026-12-01T02:00:00+02:00"}], "prices")
    assert schedule.at("2026-11-30T23:59:59.000000Z").completion_micros_per_million_tokens == 1_000_000
    assert schedule.at("2026-12-01T00:00:00.000000Z").completion_micros_per_million_tokens == 2_000_000


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ([NEW], "prices: one table has to hold from the beginning; leave out its valid_from"),
        ([OLD, OLD], "prices: two tables are valid from the same instant"),
        ([OLD, {**NEW, "valid_from": "soon"}], "prices.valid_from = 'soon': expected a date or an instant, such as "
         "2026-12-01"),
        ([{**OLD, "id": "a"}, {**NEW, "id": "a"}], "prices: two different tables have the id 'a'"),
        ([{"per_token": "1"}], "prices.per_token is not a setting; expected one of id, currency, "
         "prompt_per_million_tokens, cached_prompt_per_million_tokens, completion_per_million_tokens, per_invocation, "
         "per_second"),
    ],
)  # fmt: skip
def test_a_bad_schedule_says_why(given: list[dict[str, str]], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PriceSchedule.from_config(given, "prices")
    assert caught.value.message == problem


def test_another_table_reprices_a_record_and_leaves_it_alone() -> None:
    record = ended(admission("a", None), completion_tokens=3)
    assert record.cost_micros == 7_000_000
    assert repriced_micros(record, PriceTable.from_config({"completion_per_million_tokens": "2000000"})) == 6_000_000
    assert record.cost_micros == 7_000_000


def test_an_id_means_the_same_prices_for_ever(tmp_path: Path) -> None:
    before, after = ({"id": "2026", "per_invocation": amount} for amount in ("1", "2"))
    with Ledger(tmp_path / "usage.db") as ledger:
        asyncio.run(ledger.register_prices([PriceTable.from_config(before)]))
        asyncio.run(ledger.register_prices([PriceTable.from_config(before)]))
    with (
        Ledger(tmp_path / "usage.db") as ledger,
        pytest.raises(ConfigError, match="the price table id '2026' meant other prices before; choose another id"),
    ):
        asyncio.run(ledger.register_prices([PriceTable.from_config(after)]))
