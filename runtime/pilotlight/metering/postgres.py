"""PostgreSQL under the ledger: its tables, and a connection that understands the statements that SQLite does.

``psycopg`` is loaded here and nowhere else. One transaction writes at a time, as with SQLite: it begins by taking a
lock of the whole ledger, so whatever is checked in it still holds when it is committed, on whichever machine.

Source: the PostgreSQL manual, "Explicit Locking" (advisory locks) and "Client Connection Defaults".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, NoReturn, cast

from pilotlight.errors import ConfigError, StartupError
from pilotlight.metering.database import DatabaseError, Rows, shown, transaction
from pilotlight.metering.schema import LOCK_TIMEOUT_S

try:
    import psycopg
    from psycopg.conninfo import make_conninfo
    from psycopg.pq import TransactionStatus
    from psycopg.types.numeric import IntLoader
except ImportError as error:
    raise ConfigError("a ledger on PostgreSQL needs psycopg: pip install 'pilotlight[postgres]'") from error

CONNECT_TIMEOUT_S = 5
LOST_AFTER_MS = 10_000
"""How long a server may be silent, and a transaction of a machine that is gone may hold the lock."""

_LOCK = 0x70_6C_6C_65_64_67_65_72  # "plledger"
_BEGIN_IMMEDIATE = f"BEGIN; SELECT pg_advisory_xact_lock({_LOCK})"
_ESCAPED_NUL = r"(?<!\\)((?:\\\\)*)\\u0000"

# A text of PostgreSQL's cannot hold a NUL, not even one that comes out of an escape in JSON.
_JSON_EXTRACT = rf"""
CREATE FUNCTION json_extract(document TEXT, path TEXT) RETURNS TEXT IMMUTABLE PARALLEL SAFE LANGUAGE SQL AS $$
    SELECT CASE WHEN position('\u0000' IN document) = 0 THEN document
        ELSE regexp_replace(document, '{_ESCAPED_NUL}', '\1\\ufffd', 'g') END::json ->> substr(path, 3)
$$
"""


def _extracted(name: str, kind: str = 'TEXT COLLATE "C"') -> str:
    value = f"json_extract(record, '$.{name}')"
    value = f"CAST({value} AS BIGINT)" if kind == "BIGINT" else value
    return f"{name} {kind} GENERATED ALWAYS AS ({value}) STORED"


_NUMBER = "number BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY"
_TEXT = 'TEXT COLLATE "C" NOT NULL'
_TABLES = (
    _JSON_EXTRACT,
    "CREATE TABLE writers (writer_id TEXT PRIMARY KEY, lease_until TIMESTAMPTZ NOT NULL)",
    f"""
    CREATE TABLE invocations (
        {_NUMBER}, request_id TEXT NOT NULL UNIQUE, writer_id TEXT, admission TEXT NOT NULL,
        usage TEXT, record TEXT, signature TEXT, {_extracted("event_id")} UNIQUE, {_extracted("function")},
        {_extracted("started_at_utc")}, {_extracted("currency")}, {_extracted("prompt_tokens", "BIGINT")},
        {_extracted("cached_tokens", "BIGINT")}, {_extracted("completion_tokens", "BIGINT")},
        {_extracted("cost_micros", "BIGINT")}
    )
    """,
    "CREATE INDEX open_invocations ON invocations (writer_id) WHERE record IS NULL",
    "CREATE INDEX records ON invocations (function, started_at_utc) WHERE record IS NOT NULL",
    "CREATE INDEX records_by_start ON invocations (started_at_utc) WHERE record IS NOT NULL",
    "CREATE TABLE keys (key_id TEXT PRIMARY KEY, key TEXT NOT NULL, revoked_at_utc TEXT)",
    """
    CREATE TABLE key_secrets (
        key_id TEXT NOT NULL REFERENCES keys, salt BYTEA NOT NULL, hash BYTEA NOT NULL,
        expires_at_utc TEXT COLLATE "C", PRIMARY KEY (key_id, salt)
    )
    """,
    f"""
    CREATE TABLE key_use (
        key_id TEXT NOT NULL, period {_TEXT}, num_requests BIGINT NOT NULL, num_tokens BIGINT NOT NULL,
        micros BIGINT NOT NULL, PRIMARY KEY (key_id, period)
    )
    """,
    """
    CREATE TABLE answers (
        caller TEXT NOT NULL, idempotency_key TEXT NOT NULL, fingerprint TEXT NOT NULL, request_id TEXT NOT NULL,
        attempt BIGINT NOT NULL, expires_at DOUBLE PRECISION NOT NULL, answer BYTEA, UNIQUE (caller, idempotency_key)
    )
    """,
    "CREATE INDEX answers_by_request ON answers (request_id)",
    "CREATE INDEX answers_by_end ON answers (expires_at)",
    f"""
    CREATE TABLE replica_time (
        replica_id TEXT NOT NULL, function TEXT NOT NULL, day {_TEXT}, currency TEXT NOT NULL,
        micros_per_hour BIGINT NOT NULL, alive_ms BIGINT NOT NULL, busy_ms BIGINT NOT NULL,
        PRIMARY KEY (replica_id, function, day, currency, micros_per_hour)
    )
    """,
    "CREATE TABLE price_tables (id TEXT PRIMARY KEY, prices TEXT NOT NULL)",
    "CREATE TABLE subscriptions (url TEXT PRIMARY KEY)",
    f"""
    CREATE TABLE outbox (
        {_NUMBER}, url TEXT NOT NULL, request_id TEXT NOT NULL, num_attempts BIGINT NOT NULL DEFAULT 0,
        due_at DOUBLE PRECISION NOT NULL DEFAULT 0
    )
    """,
    "CREATE INDEX outbox_by_time ON outbox (url, due_at)",
    f"""
    CREATE TABLE dead_letters (
        {_NUMBER}, url TEXT NOT NULL, request_id TEXT NOT NULL, num_attempts BIGINT NOT NULL,
        died_at_utc TEXT NOT NULL, reason TEXT NOT NULL
    )
    """,
)
MIGRATIONS = (_TABLES,)
"""What makes each version of the ledger out of the one before it. The numbers are not those of SQLite's."""
LEDGER_VERSION = len(MIGRATIONS)


class PostgresConnection:
    """A connection that looks like SQLite's. It comes back by itself after the server was away."""

    def __init__(self, url: str, *settings: str) -> None:
        """Connect to ``url``; ``settings`` hold for this session and those that come after it."""
        self.url = url
        self._settings = settings
        self._connection = self._connect()

    @property
    def in_transaction(self) -> bool:
        return self._connection.info.transaction_status not in (TransactionStatus.IDLE, TransactionStatus.UNKNOWN)

    def execute(self, statement: str, parameters: Any = (), /) -> Rows:
        """Run one statement. Outside a transaction, it is run again if the connection turns out to be lost."""
        alone = not self.in_transaction
        try:
            return self._execute(statement, parameters)
        except DatabaseError:
            if not (alone and self._connection.closed):
                raise
        return self._execute(statement, parameters)

    def executemany(self, statement: str, parameters: Iterable[Any], /) -> Rows:
        for row in parameters:
            found = self._execute(statement, row)
        return found

    def close(self) -> None:
        self._connection.close()

    def _execute(self, statement: str, parameters: Any) -> Rows:
        try:
            if self._connection.closed:
                self._connection = self._connect()
            return cast(Rows, self._connection.execute(_translated(statement, bool(parameters)), parameters or None))
        except psycopg.Error as error:
            raise DatabaseError(_one_line(error)) from error

    def _connect(self) -> psycopg.Connection[Any]:
        conninfo = make_conninfo(
            self.url,
            connect_timeout=CONNECT_TIMEOUT_S,
            application_name="pilotlight",
            keepalives_idle=5,
            keepalives_interval=2,
            keepalives_count=2,
            tcp_user_timeout=LOST_AFTER_MS,
        )
        # parameters are put in on this side, so that a parameter of NULL needs no type
        connection: psycopg.Connection[Any] = psycopg.connect(
            conninfo, autocommit=True, cursor_factory=psycopg.ClientCursor
        )
        connection.adapters.register_loader("numeric", IntLoader)  # sums; the ledger has no fractions
        settings = (
            f"lock_timeout = '{LOCK_TIMEOUT_S}s'",
            f"idle_in_transaction_session_timeout = {LOST_AFTER_MS}",
            "synchronous_commit = on",
            "default_transaction_isolation = 'read committed'",
            *self._settings,
        )
        connection.execute("".join(f"SET {setting};" for setting in settings).encode())
        return connection


def connect_writer(url: str) -> PostgresConnection:
    """Open the ledger to write, and create its tables where there are none.

    Raises:
        StartupError: a newer version of Pilotlight wrote it.
        ConfigError: the server cannot be reached, or the database is not a ledger.
    """
    return _open(url, _prepare)


def connect_reader(url: str) -> PostgresConnection:
    """Open the ledger to read, beside those who write it.

    Raises:
        StartupError: a newer version of Pilotlight wrote it.
        ConfigError: the server cannot be reached, or there is no ledger.
    """
    return _open(url, _check_is_ledger, "default_transaction_read_only = on")


def _open(url: str, check: Callable[[PostgresConnection], None], *settings: str) -> PostgresConnection:
    try:
        connection = PostgresConnection(url, *settings)
    except psycopg.Error as error:
        _unusable(url, _one_line(error), error)
    try:
        check(connection)
    except DatabaseError as error:
        connection.close()
        _unusable(url, str(error), error)
    except StartupError:
        connection.close()
        raise
    return connection


def _prepare(connection: PostgresConnection) -> None:
    (encoding,) = connection.execute("SHOW server_encoding").fetchone()
    if encoding != "UTF8":
        raise ConfigError(f"{shown(connection.url)}: the database's encoding is {encoding}; a ledger needs UTF8")
    with transaction(connection):
        version = _version(connection)
        for statements in MIGRATIONS[version:]:
            for statement in statements:
                connection.execute(statement)
        if version == 0:
            connection.execute("CREATE TABLE ledger_version (version BIGINT NOT NULL)")
            connection.execute("INSERT INTO ledger_version VALUES (?)", (LEDGER_VERSION,))
        elif version < LEDGER_VERSION:
            connection.execute("UPDATE ledger_version SET version = ?", (LEDGER_VERSION,))


def _check_is_ledger(connection: PostgresConnection) -> None:
    version = _version(connection)
    if version == 0:
        raise ConfigError(f"{shown(connection.url)}: there is no usage ledger here")
    if version < LEDGER_VERSION:  # written before an update, and not opened to write since then
        connect_writer(connection.url).close()


def _version(connection: PostgresConnection) -> int:
    (table,) = connection.execute("SELECT to_regclass('ledger_version')::text").fetchone()
    version = connection.execute("SELECT version FROM ledger_version").fetchone()[0] if table is not None else 0
    if version > LEDGER_VERSION:
        raise StartupError(
            f"{shown(connection.url)}: has ledger version {version}; this version of Pilotlight reads {LEDGER_VERSION}"
        )
    return int(version)


def _unusable(url: str, problem: str, cause: Exception) -> NoReturn:
    raise ConfigError(f"{shown(url)}: cannot be used as a usage ledger ({problem})") from cause


@cache
def _translated(statement: str, has_parameters: bool) -> Any:
    """Return a statement of ours in the words of PostgreSQL and psycopg. None of ours has such signs in its texts."""
    if not has_parameters:
        return _BEGIN_IMMEDIATE if statement == "BEGIN IMMEDIATE" else statement
    return re.sub(r"(?<![:\w]):([a-z_]+)", r"%(\1)s", statement).replace("?", "%s")


def _one_line(error: Exception) -> str:
    lines: Sequence[str] = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
