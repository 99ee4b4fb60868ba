"""The outbox: which records have still to be told to whom. A row is written in the transaction that ends an invocation.

Delivery is at least once: a row goes when its receiver has acknowledged it, or into the dead letters after too many
attempts. A receiver removes repetitions by the event's source and id.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from pilotlight.metering.database import Connection

_SUBSCRIBED = "SELECT url FROM subscriptions"
_PUT = "INSERT INTO outbox (url, request_id) SELECT url, ? FROM subscriptions"
_DUE = """
SELECT outbox.number, record, num_attempts FROM outbox JOIN invocations USING (request_id)
WHERE url = ? AND due_at <= ? ORDER BY due_at, outbox.number LIMIT ?
"""
_BURY = """
INSERT INTO dead_letters (url, request_id, num_attempts, died_at_utc, reason)
SELECT url, request_id, num_attempts + 1, ?, ? FROM outbox WHERE number = ?
"""
_REVIVE = "INSERT INTO outbox (url, request_id) SELECT url, request_id FROM dead_letters"
_COUNT = """
SELECT url, sum(waiting), sum(dead) FROM (
    SELECT url, 1 AS waiting, 0 AS dead FROM outbox UNION ALL SELECT url, 0, 1 FROM dead_letters
) AS counted GROUP BY url ORDER BY url
"""


class DueEvent(NamedTuple):
    """A record to deliver now; ``number`` is that of its row."""

    number: int
    record: str
    num_attempts: int


class Delivered(NamedTuple):
    """The receiver has acknowledged an event."""

    number: int


class Postponed(NamedTuple):
    """An event was not acknowledged; it is due again at an instant in seconds since 1970."""

    number: int
    due_at: float


class Buried(NamedTuple):
    """An event was not acknowledged too often."""

    number: int
    died_at_utc: str
    reason: str


Outcome = Delivered | Postponed | Buried


def subscribe(connection: Connection, url: str | None) -> None:
    """Have every record from now on delivered to one receiver, or to none."""
    connection.execute("DELETE FROM subscriptions")
    if url is not None:
        connection.execute("INSERT INTO subscriptions VALUES (?)", (url,))


def put(connection: Connection, request_id: str) -> None:
    """Note that the record of an invocation has to be delivered, if anybody wants it."""
    connection.execute(_PUT, (request_id,))


def due(connection: Connection, url: str, now: float, limit: int) -> list[DueEvent]:
    """Return what has to be delivered now, the longest due first."""
    return [DueEvent(*row) for row in connection.execute(_DUE, (url, now, limit))]


def settle(connection: Connection, outcomes: Iterable[Outcome]) -> None:
    """Note what became of deliveries."""
    for outcome in outcomes:
        match outcome:
            case Postponed(number, due_at):
                later = "UPDATE outbox SET num_attempts = num_attempts + 1, due_at = ? WHERE number = ?"
                connection.execute(later, (due_at, number))
            case Buried(number, died_at_utc, reason):
                connection.execute(_BURY, (died_at_utc, reason, number))
                connection.execute("DELETE FROM outbox WHERE number = ?", (number,))
            case Delivered(number):
                connection.execute("DELETE FROM outbox WHERE number = ?", (number,))


def revive(connection: Connection) -> int:
    """Put all dead letters back, and return how many they are."""
    revived = connection.execute(_REVIVE).rowcount
    connection.execute("DELETE FROM dead_letters")
    return revived


def counts(connection: Connection) -> list[tuple[str, int, int]]:
    """Return how many events wait for each receiver and how many are dead letters."""
    return connection.execute(_COUNT).fetchall()
