"""Reading the usage ledger, also while a server writes it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import msgspec

from pilotlight.errors import LedgerUnavailable
from pilotlight.metering.idempotency import Claim, Claimed, find
from pilotlight.metering.record import UsageRecord, utc_text
from pilotlight.metering.schema import connect_reader

_RECORD = "SELECT record FROM invocations WHERE request_id = ? AND record IS NOT NULL"
_RECORDS = """
SELECT record FROM invocations
WHERE record IS NOT NULL AND (:function IS NULL OR function = :function)
    AND (:since IS NULL OR started_at_utc >= :since)
ORDER BY number DESC LIMIT :limit
"""
_TOTALS = """
SELECT function, currency, count(*), sum(prompt_tokens), sum(cached_tokens), sum(completion_tokens), sum(cost_micros)
FROM invocations WHERE record IS NOT NULL AND (:since IS NULL OR started_at_utc >= :since)
GROUP BY function, currency ORDER BY function, currency
"""


class FunctionTotals(msgspec.Struct, frozen=True):
    """The sums over a function's records in one currency."""

    function: str
    currency: str
    num_invocations: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    cost_micros: int


class LedgerReader:
    """A read-only view of a ledger; every call sees what was committed before it."""

    def __init__(self, path: Path) -> None:
        """Open the ledger at ``path``.

        Raises:
            StartupError: a newer version of Pilotlight wrote it.
            ConfigError: there is none, it cannot be opened or it is not a ledger.
        """
        self._connection = connect_reader(path)

    def get(self, request_id: str) -> UsageRecord | None:
        """Return the record of a finished invocation.

        Raises:
            LedgerUnavailable: the ledger cannot be read.
        """
        return next((_record(row) for row in self._rows(_RECORD, (request_id,))), None)

    def claimed(self, claim: Claim) -> Claimed | None:
        """Return what is known of an idempotency key.

        Raises:
            LedgerUnavailable: the ledger cannot be read.
        """
        try:
            return find(self._connection, claim)
        except sqlite3.Error as error:
            raise LedgerUnavailable(f"the usage ledger cannot be read ({error})") from error

    def records(
        self, function: str | None = None, since: datetime | None = None, limit: int | None = None
    ) -> Iterator[UsageRecord]:
        """Yield records, the latest admitted first: of one function, started at or after ``since``, at most ``limit``.

        Raises:
            LedgerUnavailable: the ledger cannot be read.
        """
        filters = {"function": function, "since": _since(since), "limit": -1 if limit is None else limit}
        for row in self._rows(_RECORDS, filters):
            yield _record(row)

    def totals(self, since: datetime | None = None) -> list[FunctionTotals]:
        """Return the sums of each function, by name.

        Raises:
            LedgerUnavailable: the ledger cannot be read.
        """
        return [FunctionTotals(*row) for row in self._rows(_TOTALS, {"since": _since(since)})]

    def close(self) -> None:
        """Close the ledger."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _rows(self, statement: str, parameters: tuple[object, ...] | Mapping[str, object]) -> Iterator[tuple[Any, ...]]:
        try:
            yield from self._connection.execute(statement, parameters)
        except sqlite3.Error as error:
            raise LedgerUnavailable(f"the usage ledger cannot be read ({error})") from error


def _record(row: tuple[Any, ...]) -> UsageRecord:
    return msgspec.json.decode(row[0], type=UsageRecord)


def _since(instant: datetime | None) -> str | None:
    return None if instant is None else utc_text(instant)
