"""The prices of a function over time: which table holds for an invocation follows from its start."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from pilotlight.errors import ConfigError
from pilotlight.metering.prices import PriceTable
from pilotlight.metering.record import UsageRecord, price, utc_text
from pilotlight.metering.usage import Usage

ALWAYS = ""
"""Sorts before every instant as records write it."""


@dataclass(frozen=True, slots=True)
class PriceSchedule:
    """Price tables in order of the instants from which they hold; the first one holds from the beginning."""

    valid_from_utc: tuple[str, ...]
    tables: tuple[PriceTable, ...]

    @classmethod
    def from_config(cls, prices: Mapping[str, str] | Iterable[Mapping[str, str]], where: str) -> PriceSchedule:
        """Read one table, or several of which all but one have a ``valid_from``, a date or an instant in UTC.

        Raises:
            ConfigError: see ``PriceTable.from_config``; or the tables do not follow one another.
        """
        given: list[Mapping[str, str]] = [prices] if isinstance(prices, Mapping) else [*prices] or [{}]
        dated = sorted(
            ((_instant(table.get("valid_from"), where), _table(table, where)) for table in given), key=lambda d: d[0]
        )
        starts = tuple(start for start, _ in dated)
        if starts[0] != ALWAYS:
            raise ConfigError(f"{where}: one table has to hold from the beginning; leave out its valid_from")
        if len(set(starts)) < len(starts):
            raise ConfigError(f"{where}: two tables are valid from the same instant")
        tables = tuple(table for _, table in dated)
        _refuse_ambiguous_ids(tables, where)
        return cls(starts, tables)

    def at(self, started_at_utc: str) -> PriceTable:
        """Return the table that holds at an instant, as records write it."""
        return self.tables[bisect_right(self.valid_from_utc, started_at_utc) - 1]


def repriced_micros(record: UsageRecord, table: PriceTable) -> int:
    """Return what an invocation would cost by another table."""
    usage = Usage(
        prompt_tokens=record.prompt_tokens,
        cached_tokens=record.cached_tokens,
        completion_tokens=record.completion_tokens,
        busy_ms=record.busy_ms,
    )
    return price(table, usage, record.finish_reason, None)


def _table(given: Mapping[str, str], where: str) -> PriceTable:
    return PriceTable.from_config({key: value for key, value in given.items() if key != "valid_from"}, where)


def _instant(valid_from: str | None, where: str) -> str:
    if valid_from is None:
        return ALWAYS
    try:
        instant = datetime.fromisoformat(valid_from)
    except ValueError as error:
        problem = f"{where}.valid_from = {valid_from!r}: expected a date or an instant, such as 2026-12-01"
        raise ConfigError(problem) from error
    return utc_text(instant if instant.tzinfo is not None else instant.replace(tzinfo=UTC))


def _refuse_ambiguous_ids(tables: Iterable[PriceTable], where: str) -> None:
    by_id: dict[str, PriceTable] = {}
    for table in tables:
        if by_id.setdefault(table.id, table) != table:
            raise ConfigError(f"{where}: two different tables have the id {table.id!r}")
