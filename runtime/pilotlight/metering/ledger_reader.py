"""Reading the usage ledger, also while a server writes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import msgspec

from pilotlight.errors import LedgerUnavailable
from pilotlight.metering import outbox
from pilotlight.metering.database import FAILURES, Connected, Location, connect_reader
from pilotlight.metering.idempotency import Claim, Claimed, find
from pilotlight.metering.record import UsageRecord, utc_text
from pilotlight.metering.signing import receipt
from pilotlight.metering.totals import Margin, Totals, margins, totals

_ALL = 2**63 - 1
_RECORD = "SELECT record FROM invocations WHERE request_id = ? AND record IS NOT NULL"
_RECEIPT = "SELECT record, signature FROM invocations WHERE request_id = ? AND signature IS NOT NULL"
_RECEIPTS = """
SELECT record, signature FROM invocations
WHERE signature IS NOT NULL AND (:since IS NULL OR started_at_utc >= :since) ORDER BY number
"""
_RECORDS = """
SELECT record FROM invocations
WHERE record IS NOT NULL AND (:function IS NULL OR function = :function)
    AND (:since IS NULL OR started_at_utc >= :since)
ORDER BY number DESC LIMIT :limit
"""


class LedgerReader(Connected):
    """A read-only view of a ledger; every call sees what was committed before it."""

    def __init__(self, location: Location) -> None:
        """Open the ledger at ``location``.

        Raises:
            StartupError: a newer version of Pilotlight wrote it.
            ConfigError: there is none, it cannot be opened or it is not a ledger.
        """
        super().__init__(connect_reader(location))

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
        with _readable():
            return find(self._connection, claim)

    def records(
        self, function: str | None = None, since: datetime | None = None, limit: int | None = None
    ) -> Iterator[UsageRecord]:
        """Yield records, the latest admitted first: of one function, started at or after ``since``, at most ``limit``.

        Raises:
            LedgerUnavailable: the ledger cannot be read.
        """
        filters = {"function": function, "since": _since(since), "limit": _ALL if limit is None else limit}
        for row in self._rows(_RECORDS, filters):
            yield _record(row)

    def receipt(self, request_id: str) -> str | None:
        """Return the signed record of a finished invocation; None when it was not signed.

        Raises:
            LedgerUnavailable: the ledger cannot be read.
        """
        rows = list(self._rows(_RECEIPT, (request_id,)))
        return receipt(*rows[0]) if rows else None

    def receipts(self, since: datetime | None = None) -> Iterator[str]:
        """Yield the signed records, the earliest admitted first.

        Raises:
            LedgerUnavailable: the ledger cannot be read.
        """
        for row in self._rows(_RECEIPTS, {"since": _since(since)}):
            yield receipt(*row)

    def due_events(self, url: str, now: float, limit: int) -> list[outbox.DueEvent]:
        """Return what has to be delivered now.

        Raises:
            LedgerUnavailable: the ledger cannot be read.
        """
        with _readable():
            return outbox.due(self._connection, url, now, limit)

    def outbox_counts(self) -> list[tuple[str, int, int]]:
        """Return how many events wait for each receiver and how many are dead letters.

        Raises:
            LedgerUnavailable: the ledger cannot be read.
        """
        with _readable():
            return outbox.counts(self._connection)

    def totals(self, by: Sequence[str] = ("function",), since: datetime | None = None) -> list[Totals]:
        """Return the sums of each group of records; see ``totals.GROUPS``.

        Raises:
            LedgerUnavailable: the ledger cannot be read.
        """
        with _readable():
            return totals(self._connection, by, _since(since))

    def margins(self, since: datetime | None = None) -> list[Margin]:
        """Return what each function earned and cost.

        Raises:
            LedgerUnavailable: the ledger cannot be read.
        """
        with _readable():
            return margins(self._connection, _since(since))

    def _rows(self, statement: str, parameters: tuple[object, ...] | Mapping[str, object]) -> Iterator[tuple[Any, ...]]:
        with _readable():
            yield from self._connection.execute(statement, parameters)


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except FAILURES as error:
        raise LedgerUnavailable(f"the usage ledger cannot be read ({error})") from error


def _record(row: tuple[Any, ...]) -> UsageRecord:
    return msgspec.json.decode(row[0], type=UsageRecord)


def _since(instant: datetime | None) -> str | None:
    return None if instant is None else utc_text(instant)
