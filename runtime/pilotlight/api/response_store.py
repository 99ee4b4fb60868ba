"""Answers that clients may come back to: ``/v1/responses`` keeps them for a while, within bounds, for their owner only.

One SQLite database, in memory unless a file is given, written by one thread. What has expired is as good as gone at
once, and really gone with the next answer that is kept.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec

from pilotlight.config import HostSettings
from pilotlight.errors import ConfigError, ResponseStoreUnavailable
from pilotlight.metering.schema import create_private

logger = logging.getLogger("pilotlight.api")

IN_MEMORY = ":memory:"
TABLES = """
    CREATE TABLE IF NOT EXISTS responses (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        owner TEXT NOT NULL,
        id TEXT NOT NULL,
        expires_at REAL NOT NULL,
        num_bytes INTEGER NOT NULL,
        response BLOB NOT NULL,
        input_items BLOB NOT NULL,
        conversation BLOB NOT NULL,
        UNIQUE (owner, id)
    );
    CREATE INDEX IF NOT EXISTS by_expiry ON responses (expires_at);
"""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """An answer as JSON, what it answered as JSON, and the whole conversation with it, as chat templates know it."""

    response: bytes
    input_items: bytes
    conversation: list[dict[str, Any]]


class ResponseStore:
    """Keeps answers for ``ttl_s`` seconds and ``max_bytes`` in all; whoever has most in it loses the oldest first."""

    def __init__(self, path: str, ttl_s: float, max_bytes: int, clock: Callable[[], float] = time.time) -> None:
        """Open or create the database.

        Raises:
            ConfigError: it cannot be opened.
        """
        self._ttl_s = ttl_s
        self._max_bytes = max_bytes
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, "responses")
        if path != IN_MEMORY:
            create_private(Path(path))
        try:
            self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA secure_delete = ON")
            self._database.executescript(TABLES)
            sizes = self._database.execute("SELECT owner, SUM(num_bytes) FROM responses GROUP BY owner").fetchall()
        except sqlite3.Error as error:
            raise ConfigError(f"{path}: cannot be used to keep responses ({error})") from error
        self._num_bytes = Counter(dict(sizes))

    @classmethod
    def open(cls, host: HostSettings) -> Self:
        """Open the store that the settings describe.

        Raises:
            ConfigError: it cannot be opened.
        """
        return cls(host.response_store, host.response_ttl_s, host.max_stored_response_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._thread.shutdown()
        self._database.close()

    async def put(self, owner: str, response_id: str, stored: StoredResponse) -> bool:
        """Keep an answer; False when it cannot be kept, which is no reason not to give it."""
        if self._ttl_s == 0:
            return False
        try:
            return await self._run(lambda: self._put(owner, response_id, stored))
        except ResponseStoreUnavailable as error:
            logger.warning("a response was not kept: %s", error.__cause__)
            return False

    async def get(self, owner: str, response_id: str) -> StoredResponse | None:
        """Return an answer of that owner, unless it has expired or was evicted.

        Raises:
            ResponseStoreUnavailable: the database cannot be read.
        """
        return await self._run(lambda: self._get(owner, response_id))

    async def delete(self, owner: str, response_id: str) -> bool:
        """Forget an answer; False when there is none.

        Raises:
            ResponseStoreUnavailable: the database cannot be written.
        """
        return await self._run(lambda: self._delete(owner, response_id))

    async def _run(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except sqlite3.Error as error:
            raise ResponseStoreUnavailable from error

    def _put(self, owner: str, response_id: str, stored: StoredResponse) -> bool:
        now = self._clock()
        conversation = msgspec.json.encode(stored.conversation)
        num_bytes = len(stored.response) + len(stored.input_items) + len(conversation)
        if num_bytes > self._max_bytes:
            return False
        self._forget("expires_at <= ?", now)
        self._forget("owner = ? AND id = ?", owner, response_id)
        self._database.execute(
            "INSERT INTO responses (owner, id, expires_at, num_bytes, response, input_items, conversation) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            (owner, response_id, now + self._ttl_s, num_bytes, stored.response, stored.input_items, conversation),
        )
        self._num_bytes[owner] += num_bytes
        while self._num_bytes.total() > self._max_bytes:
            (largest, _), *_ = self._num_bytes.most_common(1)
            self._forget("number = (SELECT MIN(number) FROM responses WHERE owner = ?)", largest)
        return True

    def _get(self, owner: str, response_id: str) -> StoredResponse | None:
        row = self._database.execute(
            "SELECT response, input_items, conversation FROM responses WHERE owner = ? AND id = ? AND expires_at > ?",
            (owner, response_id, self._clock()),
        ).fetchone()
        return None if row is None else StoredResponse(row[0], row[1], msgspec.json.decode(row[2]))

    def _delete(self, owner: str, response_id: str) -> bool:
        return self._forget("owner = ? AND id = ? AND expires_at > ?", owner, response_id, self._clock()) > 0

    def _forget(self, which: str, *values: object) -> int:
        """Delete rows, and take them off their owners' accounts. Returns how many there were."""
        query = f"DELETE FROM responses WHERE {which} RETURNING owner, num_bytes"  # noqa: S608 - ours, no input
        gone = self._database.execute(query, values).fetchall()
        for owner, num_bytes in gone:
            self._num_bytes[owner] -= num_bytes
            if not self._num_bytes[owner]:
                del self._num_bytes[owner]
        return len(gone)
