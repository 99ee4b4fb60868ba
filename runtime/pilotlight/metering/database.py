"""Which database a ledger is in: a file of SQLite's, or PostgreSQL by its URL. The SQL is the same for both.

Both have ``json_extract``, ``ON CONFLICT`` and partial indexes. Statements are written as SQLite takes them, and
``postgres`` puts its own words in their place. "BEGIN IMMEDIATE" begins the one transaction that writes at a time.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, Self

from pilotlight.errors import ConfigError
from pilotlight.metering import schema

DYNAMODB_SCHEME = "dynamodb://"
URL_SCHEMES = ("postgresql://", "postgres://")

Location = Path | str
"""Where a ledger is: the path of a file, or a URL."""

Parameters = Sequence[Any] | Mapping[str, Any]


class DatabaseError(Exception):
    """What a database other than SQLite refuses or cannot do."""


FAILURES = (sqlite3.Error, DatabaseError)


class Rows(Protocol):
    """What a statement gave."""

    @property
    def rowcount(self) -> int:
        """How many rows were changed."""

    def fetchone(self) -> Any:
        """Return the next row, or None."""

    def fetchall(self) -> list[Any]:
        """Return all rows that are left."""

    def __iter__(self) -> Iterator[Any]: ...


class Connection(Protocol):
    """What ``sqlite3.Connection`` and ``postgres.PostgresConnection`` have in common."""

    @property
    def in_transaction(self) -> bool:
        """Whether there is something to commit or to roll back."""

    def execute(self, statement: str, parameters: Any = ..., /) -> Rows:
        """Run one statement with ``?`` or ``:name`` in the places of its parameters."""

    def executemany(self, statement: str, parameters: Any, /) -> Rows:
        """Run one statement for each of several rows."""

    def close(self) -> None:
        """Let go of the database."""


class Connected:
    """Has a ledger open while its block runs, or until it is closed."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def close(self) -> None:
        """Close the ledger."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def located(ledger: str) -> Location:
    """Return where a ledger is that was named in a setting."""
    return ledger if ledger.startswith((*URL_SCHEMES, DYNAMODB_SCHEME)) else Path(ledger)


def shown(ledger: str) -> str:
    """Return how a ledger may be shown: a URL without its password."""
    return re.sub(r"(?<=//)([^/@:]*):[^/@]*@", r"\1@", ledger) if ledger.startswith(URL_SCHEMES) else ledger


def connect_writer(location: Location) -> Connection:
    """Open a ledger's database to write, and create its tables where there are none.

    Raises:
        StartupError: a newer version of Pilotlight wrote it.
        ConfigError: it cannot be opened or is not a ledger.
    """
    if isinstance(location, Path):
        location.parent.mkdir(parents=True, exist_ok=True)
        return schema.connect_writer(location)
    if location.startswith(DYNAMODB_SCHEME):
        raise ConfigError(f"{location}: only the Lambda function writes a ledger on DynamoDB")
    from pilotlight.metering import postgres

    return postgres.connect_writer(location)


def connect_reader(location: Location) -> Connection:
    """Open a ledger's database to read, beside those who write it.

    Raises:
        StartupError: a newer version of Pilotlight wrote it.
        ConfigError: there is none, it cannot be opened or it is not a ledger.
    """
    if isinstance(location, Path):
        return schema.connect_reader(location)
    if location.startswith(DYNAMODB_SCHEME):
        from pilotlight.metering.dynamodb_snapshot import connect_snapshot

        return connect_snapshot(location)
    from pilotlight.metering import postgres

    return postgres.connect_reader(location)


@contextmanager
def transaction(connection: Connection) -> Iterator[Connection]:
    """Make what happens in the block one transaction, the only one that writes; an error undoes all of it."""
    try:
        connection.execute("BEGIN IMMEDIATE")
        yield connection
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
