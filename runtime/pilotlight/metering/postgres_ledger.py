"""The usage ledger on PostgreSQL: the same promises for the processes of many machines.

A writer has a lease, which it renews while it lives. Once that is over, whoever notices first closes as crashed what
the writer left open, and from then on the writer can neither deliver nor record anything of it. A writer that starts
where a killed one ran closes that one's at once, and by its marks to the last token.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec

from pilotlight.errors import ConfigError, LedgerUnavailable
from pilotlight.metering import postgres
from pilotlight.metering.database import FAILURES, Connection, transaction
from pilotlight.metering.idempotency import Claim
from pilotlight.metering.limits import Admitted
from pilotlight.metering.marks import LeftMarks, Mark, Marks
from pilotlight.metering.record import Admission, UsageRecord, crashed_record
from pilotlight.metering.signing import Signer
from pilotlight.metering.sql_ledger import SqlLedger, end, last_seen

logger = logging.getLogger("pilotlight.ledger")

LEASE_S = 60.0
"""Long enough for a machine that is starved of processor time, short enough for one that is gone."""

BEATS_PER_LEASE = 6
_ADMIT = "INSERT INTO invocations (request_id, admission, writer_id) VALUES (?, ?, ?)"
_ENROL = "INSERT INTO writers VALUES (?, clock_timestamp() + make_interval(secs => ?))"
_RENEW = "UPDATE writers SET lease_until = clock_timestamp() + make_interval(secs => ?) WHERE writer_id = ?"
_RETIRE = "UPDATE writers SET lease_until = '-infinity' WHERE writer_id = ?"
_FORGET = """
DELETE FROM writers WHERE lease_until < clock_timestamp() AND NOT EXISTS (
    SELECT 1 FROM invocations WHERE record IS NULL AND invocations.writer_id = writers.writer_id
)
"""
_LEFT = """
SELECT admission, usage FROM invocations LEFT JOIN writers USING (writer_id)
WHERE record IS NULL AND (lease_until IS NULL OR lease_until < clock_timestamp())
"""
_OWN = "SELECT request_id, admission, usage FROM invocations WHERE record IS NULL AND writer_id = ?"


class PostgresLedger(SqlLedger):
    """A ledger in a database of PostgreSQL's."""

    checkpoint_tokens = 32

    def __init__(self, url: str, marks_dir: Path, signer: Signer | None = None, lease_s: float = LEASE_S) -> None:
        """Open the ledger at ``url`` or create it, and close as crashed what writers left open that are gone.

        ``signer`` signs every record that is written; the marks are kept in ``marks_dir``.

        Raises:
            StartupError: a newer version of Pilotlight wrote it.
            ConfigError: it cannot be opened.
        """
        self._left_beside = marks_dir / hashlib.sha256(url.encode()).hexdigest()[:16]
        self._lease_s = lease_s
        self._lease_until = 0.0
        self._lost: set[str] = set()
        self._ended = threading.Event()
        with ExitStack() as opened:
            connection = postgres.connect_writer(url)
            opened.callback(connection.close)
            self._beats = postgres.connect_writer(url)
            opened.callback(self._beats.close)
            marks = Marks(self._left_beside)
            opened.callback(marks.end)
            super().__init__(url, connection, marks, signer)
            opened.callback(super().close)
            try:
                self.beat()
            except (*FAILURES, msgspec.DecodeError, OSError) as error:
                raise ConfigError(f"what a crash left open in the ledger cannot be closed ({error})") from error
            opened.pop_all()
        self._beat_thread = threading.Thread(target=self._run, name="pilotlight-lease", daemon=True)
        self._beat_thread.start()

    async def admit(self, admission: Admission, claim: Claim | None = None) -> Admitted:
        """As ``SqlLedger.admit``; without a lease nothing can be admitted."""
        self._check_lease()
        return await super().admit(admission, claim)

    def note(self, marks: Mapping[str, Mark]) -> None:
        """As ``SqlLedger.note``; what was closed by others may not be delivered any more."""
        self._check_lease()
        if not self._lost.isdisjoint(marks):
            raise LedgerUnavailable("an invocation was closed by another host")
        super().note(marks)

    async def finish(self, record: UsageRecord) -> None:
        """As ``SqlLedger.finish``."""
        await super().finish(record)
        self._lost.discard(record.request_id)

    def beat(self) -> None:
        """Renew the lease, and close what others and this writer itself left open.

        Raises:
            DatabaseError: the server cannot be reached.
        """
        asked_at = time.monotonic()
        with transaction(self._beats) as connection:
            renewed = connection.execute(_RENEW, (self._lease_s, self._marks.owner)).rowcount == 1
            if not renewed:
                connection.execute(_ENROL, (self._marks.owner, self._lease_s))
            marks = self._close_left(connection)
            adrift = self._adrift(connection)
            self._close(connection, adrift, marks)
        if not renewed:
            self._lost.update(self._marks)
        marks.remove()
        self._lease_until = asked_at + self._lease_s

    def close(self) -> None:
        """Make the waiting writes and end the lease."""
        if self._closed:
            return
        self._ended.set()
        self._beat_thread.join()
        super().close()
        try:
            self._beats.execute(_RETIRE, (self._marks.owner,))
            self._beats.execute(_FORGET)
        except FAILURES as error:
            logger.warning("the lease on the usage ledger runs out by itself (%s)", error)
        self._beats.close()

    def _insert(self, connection: Connection, request_id: str, admission: str) -> None:
        connection.execute(_ADMIT, (request_id, admission, self._marks.owner))

    def _run(self) -> None:
        while not self._ended.wait(self._lease_s / BEATS_PER_LEASE):
            try:
                self.beat()
            except (*FAILURES, msgspec.DecodeError, OSError) as error:
                logger.warning("the lease on the usage ledger cannot be renewed (%s)", error)

    def _check_lease(self) -> None:
        if time.monotonic() >= self._lease_until:
            raise LedgerUnavailable("the usage ledger cannot be reached, and the lease on it has run out")

    def _close_left(self, connection: Connection) -> LeftMarks:
        """Close as crashed what writers left open that are gone; return their marks, as far as they are here."""
        marks = LeftMarks(self._left_beside)
        for owner in marks.owners:
            connection.execute(_RETIRE, (owner,))
        self._close(connection, connection.execute(_LEFT).fetchall(), marks)
        connection.execute(_FORGET)
        return marks

    def _adrift(self, connection: Connection) -> list[tuple[str, str | None]]:
        """Return admissions of ours that nobody works on: written, but the answer to that was lost."""
        found = connection.execute(_OWN, (self._marks.owner,)).fetchall()
        return [(admission, usage) for request_id, admission, usage in found if request_id not in self._marks]

    def _close(self, connection: Connection, left: Sequence[tuple[str, str | None]], marks: LeftMarks) -> None:
        for admission, usage in left:
            end(connection, crashed_record(*last_seen(admission, usage, marks)), self._signer)
