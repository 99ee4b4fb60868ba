"""The ledger's tables, and how a database is opened to write or to read it.

One row of ``invocations`` is one invocation, so a request id that is unique among rows is unique among admissions and
records alike. An open invocation has no ``record``. The columns after it are extracted from the record by SQLite, so
they cannot disagree with it.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pilotlight.errors import ConfigError, StartupError

LOCK_TIMEOUT_S = 10
"""How long a transaction waits for one of another process."""

_TABLE = """
CREATE TABLE invocations (
    number INTEGER PRIMARY KEY,
    request_id TEXT NOT NULL UNIQUE,
    admission TEXT NOT NULL,
    usage TEXT,
    record TEXT,
    event_id TEXT AS (json_extract(record, '$.event_id')) STORED UNIQUE,
    function TEXT AS (json_extract(record, '$.function')) STORED,
    started_at_utc TEXT AS (json_extract(record, '$.started_at_utc')) STORED,
    currency TEXT AS (json_extract(record, '$.currency')) STORED,
    prompt_tokens INTEGER AS (json_extract(record, '$.prompt_tokens')) STORED,
    cached_tokens INTEGER AS (json_extract(record, '$.cached_tokens')) STORED,
    completion_tokens INTEGER AS (json_extract(record, '$.completion_tokens')) STORED,
    cost_micros INTEGER AS (json_extract(record, '$.cost_micros')) STORED
) STRICT
"""
_OPEN_INDEX = "CREATE INDEX open_invocations ON invocations (number) WHERE record IS NULL"
_RECORD_INDEX = "CREATE INDEX records ON invocations (function, started_at_utc) WHERE record IS NOT NULL"

_KEYS = """
CREATE TABLE keys (
    key_id TEXT PRIMARY KEY,
    key TEXT NOT NULL,
    revoked_at_utc TEXT
) STRICT, WITHOUT ROWID
"""
_KEY_SECRETS = """
CREATE TABLE key_secrets (
    key_id TEXT NOT NULL REFERENCES keys,
    salt BLOB NOT NULL,
    hash BLOB NOT NULL,
    expires_at_utc TEXT,
    PRIMARY KEY (key_id, salt)
) STRICT, WITHOUT ROWID
"""
_KEY_USE = """
CREATE TABLE key_use (
    key_id TEXT NOT NULL,
    period TEXT NOT NULL,
    num_requests INTEGER NOT NULL,
    num_tokens INTEGER NOT NULL,
    micros INTEGER NOT NULL,
    PRIMARY KEY (key_id, period)
) STRICT, WITHOUT ROWID
"""

_ANSWERS = """
CREATE TABLE answers (
    caller TEXT NOT NULL,
    idempotency_key TEXT NOT NULL,
    fingerprint TEXT NOT NULL,
    request_id TEXT NOT NULL,
    attempt INTEGER NOT NULL,
    expires_at REAL NOT NULL,
    answer BLOB,
    UNIQUE (caller, idempotency_key)
) STRICT
"""
_ANSWERS_BY_REQUEST = "CREATE INDEX answers_by_request ON answers (request_id)"
_ANSWERS_BY_END = "CREATE INDEX answers_by_end ON answers (expires_at)"

_REPLICA_TIME = """
CREATE TABLE replica_time (
    replica_id TEXT NOT NULL,
    function TEXT NOT NULL,
    day TEXT NOT NULL,
    currency TEXT NOT NULL,
    micros_per_hour INTEGER NOT NULL,
    alive_ms INTEGER NOT NULL,
    busy_ms INTEGER NOT NULL,
    PRIMARY KEY (replica_id, function, day, currency, micros_per_hour)
) STRICT, WITHOUT ROWID
"""
_PRICE_TABLES = "CREATE TABLE price_tables (id TEXT PRIMARY KEY, prices TEXT NOT NULL) STRICT, WITHOUT ROWID"
_RECORDS_BY_DAY = "CREATE INDEX records_by_start ON invocations (started_at_utc) WHERE record IS NOT NULL"
_SUBSCRIPTIONS = "CREATE TABLE subscriptions (url TEXT PRIMARY KEY) STRICT, WITHOUT ROWID"
_OUTBOX = """
CREATE TABLE outbox (
    number INTEGER PRIMARY KEY,
    url TEXT NOT NULL,
    request_id TEXT NOT NULL,
    num_attempts INTEGER NOT NULL DEFAULT 0,
    due_at REAL NOT NULL DEFAULT 0
) STRICT
"""
_OUTBOX_BY_TIME = "CREATE INDEX outbox_by_time ON outbox (url, due_at)"
_DEAD_LETTERS = """
CREATE TABLE dead_letters (
    number INTEGER PRIMARY KEY,
    url TEXT NOT NULL,
    request_id TEXT NOT NULL,
    num_attempts INTEGER NOT NULL,
    died_at_utc TEXT NOT NULL,
    reason TEXT NOT NULL
) STRICT
"""
_SIGNATURE = "ALTER TABLE invocations ADD COLUMN signature TEXT"

MIGRATIONS = (
    (_TABLE, _OPEN_INDEX, _RECORD_INDEX),
    (_KEYS, _KEY_SECRETS, _KEY_USE),
    (_ANSWERS, _ANSWERS_BY_REQUEST, _ANSWERS_BY_END),
    (_REPLICA_TIME, _PRICE_TABLES, _RECORDS_BY_DAY),
    (_SUBSCRIPTIONS, _OUTBOX, _OUTBOX_BY_TIME, _DEAD_LETTERS, _SIGNATURE),
)
"""What makes each version of the ledger out of the one before it."""
LEDGER_VERSION = len(MIGRATIONS)


def connect_writer(path: Path) -> sqlite3.Connection:
    """Open the ledger to write, and create it where there is none.

    Raises:
        StartupError: a newer version of Pilotlight wrote it.
        ConfigError: it cannot be opened or is not a ledger.
    """
    create_private(path)
    return _connect(path, "rwc", _prepare)


def connect_reader(path: Path) -> sqlite3.Connection:
    """Open the ledger read-only, beside the process that writes it.

    Raises:
        StartupError: a newer version of Pilotlight wrote it.
        ConfigError: there is none, it cannot be opened or it is not a ledger.
    """
    if not path.exists():
        raise ConfigError(f"{path}: there is no usage ledger here; name that of the server with --ledger")
    return _connect(path, "ro", _check_is_ledger)


def create_private(path: Path) -> None:
    """Create an empty database that nobody else can read; SQLite gives the files beside it the same mode.

    One that exists is not even opened: closing it again would take away the locks that this process has on it.
    """
    with suppress(OSError):  # what keeps it from being created, SQLite says as well
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))


def _connect(path: Path, mode: str, check: Callable[[sqlite3.Connection, Path], None]) -> sqlite3.Connection:
    """Open a database in one of SQLite's modes; the connection is closed again where ``check`` refuses it."""
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    try:
        connection = sqlite3.connect(uri, LOCK_TIMEOUT_S, uri=True, isolation_level=None, check_same_thread=False)
    except sqlite3.Error as error:
        raise _unusable(path, error) from error
    try:
        check(connection, path)
    except sqlite3.Error as error:
        connection.close()
        raise _unusable(path, error) from error
    except StartupError:
        connection.close()
        raise
    return connection


def _check_is_ledger(connection: sqlite3.Connection, path: Path) -> None:
    version = _version(connection, path)
    if version == 0:
        raise ConfigError(f"{path}: is not a usage ledger")
    if version < LEDGER_VERSION:  # written before an update, and not opened to write since then
        connect_writer(path).close()


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    if connection.execute("PRAGMA journal_mode = WAL").fetchone() != ("wal",):
        raise ConfigError(f"{path}: cannot be a usage ledger, because its file system has no shared memory for SQLite")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("BEGIN IMMEDIATE")
    for statements in MIGRATIONS[_version(connection, path) :]:
        for statement in statements:
            connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {LEDGER_VERSION}")
    connection.execute("COMMIT")


def _version(connection: sqlite3.Connection, path: Path) -> int:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > LEDGER_VERSION:
        raise StartupError(f"{path}: has ledger version {version}; this version of Pilotlight reads {LEDGER_VERSION}")
    return int(version)


def _unusable(path: Path, error: sqlite3.Error) -> ConfigError:
    return ConfigError(f"{path}: cannot be used as a usage ledger ({error})")
