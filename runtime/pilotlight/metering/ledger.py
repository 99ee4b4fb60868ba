"""The usage ledger: ADMIT, then CHECKPOINTs, then exactly one FINAL for every invocation.

Source: docs/architecture.md, "Metering".
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import msgspec

from pilotlight.errors import ConfigError, PilotlightError, RequestIdInUse, RequestNotFound
from pilotlight.metering import outbox
from pilotlight.metering.group_commit import GroupCommit
from pilotlight.metering.idempotency import Claim, Claimed, book, keep, next_attempt
from pilotlight.metering.ledger_reader import LedgerReader
from pilotlight.metering.limits import Admitted, reserve, settle
from pilotlight.metering.machine_cost import ReplicaTime
from pilotlight.metering.marks import LeftMarks, Mark, Marks
from pilotlight.metering.prices import PriceTable
from pilotlight.metering.record import Admission, UsageRecord, crashed_record
from pilotlight.metering.schema import connect_writer
from pilotlight.metering.signing import Signer
from pilotlight.metering.usage import Usage

_IS_KNOWN = "SELECT 1 FROM invocations WHERE request_id = ?"
_ADMIT = "INSERT INTO invocations (request_id, admission) VALUES (?, ?)"
_CHECKPOINT = "UPDATE invocations SET usage = ? WHERE request_id = ? AND record IS NULL"
_FINISH = "UPDATE invocations SET record = ?, signature = ? WHERE request_id = ? AND record IS NULL"
_IS_FINISHED = "SELECT 1 FROM invocations WHERE request_id = ? AND event_id = ?"
_ADD_REPLICA_TIME = """
INSERT INTO replica_time VALUES (?, ?, ?, ?, ?, ?, ?)
ON CONFLICT DO UPDATE SET alive_ms = alive_ms + excluded.alive_ms, busy_ms = busy_ms + excluded.busy_ms
"""
_KEEP_PRICES = "INSERT INTO price_tables (id, prices) VALUES (?, ?) ON CONFLICT (id) DO NOTHING"
_ARE_OTHER_PRICES = "SELECT 1 FROM price_tables WHERE id = ? AND prices <> ?"
_OPEN = "SELECT admission, usage FROM invocations WHERE record IS NULL"


class Ledger:
    """A writer of a ledger, for asyncio callers; ``LedgerReader`` reads beside it, from any process.

    Several processes may write to one ledger, a server and `pilotlight invoke` say. The one that opens it while nobody
    else has it open closes what a crash left open. Open it after forking: a child would share lock and connection.
    """

    checkpoint_tokens = 128
    """The marks outlive a killed process, so only a crash of the machine can leave so many tokens unbilled."""

    def __init__(self, path: Path, signer: Signer | None = None) -> None:
        """Create or open the ledger at ``path``, and close as crashed what a former process left open.

        ``signer`` signs every record that is written.

        Raises:
            StartupError: a newer version of Pilotlight wrote it.
            ConfigError: it cannot be opened.
        """
        self.path = path
        self._signer = signer
        with ExitStack() as opened:
            lock = _open_lock(path)
            opened.callback(os.close, lock)
            alone = _try_alone(lock)
            connection = connect_writer(path)
            opened.callback(connection.close)
            if alone:
                _close_crashed(connection, path, signer)
            self._marks = Marks(path)
            opened.callback(self._marks.end)
            if alone:
                fcntl.flock(lock, fcntl.LOCK_SH)
            self._reader = LedgerReader(path)
            self._commits = GroupCommit(connection)
            opened.pop_all()
        self._lock: int | None = lock

    async def admit(self, admission: Admission, claim: Claim | None = None) -> Admitted:
        """Open an invocation, and reserve what it could use within the limits of its key, if it has one.

        Raises:
            RequestIdInUse: the ledger holds the request id already.
            IdempotencyConflict: the claimed idempotency key was used before.
            LimitExceeded, InvalidRequest, NotPermitted, InvalidKey: the key does not allow it.
            LedgerUnavailable: nothing was written.
        """
        admitted = Admitted()

        def apply(connection: sqlite3.Connection) -> PilotlightError | None:
            nonlocal admitted
            standing = None
            if connection.execute(_IS_KNOWN, (admission.request_id,)).fetchone():
                return RequestIdInUse(admission.request_id)
            attempt = 1 if claim is None else next_attempt(connection, claim)
            if isinstance(attempt, PilotlightError):
                return attempt
            if admission.key_id is not None:
                outcome = reserve(connection, admission)
                if isinstance(outcome, PilotlightError):
                    return outcome
                standing = outcome
            if claim is not None:
                book(connection, claim, admission.request_id, attempt)
            admitted = Admitted(standing, attempt)
            row = msgspec.structs.replace(admission, attempt=attempt)
            connection.execute(_ADMIT, (admission.request_id, _json(row)))
            return None

        if not self._marks.open(admission.request_id):
            raise RequestIdInUse(admission.request_id)
        try:
            await self._commits.write(apply)
        except PilotlightError:
            self._marks.close(admission.request_id)
            raise
        return admitted

    def claimed(self, claim: Claim) -> Claimed | None:
        """Return what is known of an idempotency key.

        Raises:
            LedgerUnavailable: the ledger cannot be read.
        """
        return self._reader.claimed(claim)

    async def keep_answer(self, request_id: str, answer: bytes) -> None:
        """Keep the complete answer of a request beside its claim.

        Raises:
            LedgerUnavailable: nothing was written.
        """
        await self._commits.write(lambda connection: keep(connection, request_id, answer))

    def note(self, request_id: str, mark: Mark) -> None:
        """Note what an open invocation has used so far, for the case that this process is killed.

        Raises:
            LedgerUnavailable: it could not be noted, so nothing of it may be delivered.
        """
        self._marks.note(request_id, mark)

    async def checkpoint(self, request_id: str, usage: Usage) -> None:
        """Record what an open invocation has used so far, for the case that the machine crashes.

        Raises:
            RequestNotFound: no open invocation has that id.
            LedgerUnavailable: nothing was written.
        """
        row = (_json(usage), request_id)

        def apply(connection: sqlite3.Connection) -> PilotlightError | None:
            return None if connection.execute(_CHECKPOINT, row).rowcount == 1 else _not_open(request_id)

        await self._commits.write(apply)

    async def finish(self, record: UsageRecord) -> None:
        """End an open invocation by its one record. Writing the same record again changes nothing.

        Raises:
            RequestNotFound: no open invocation has that id, or it ended by another record.
            LedgerUnavailable: the record may not have been written; try again.
        """

        def apply(connection: sqlite3.Connection) -> PilotlightError | None:
            if _end(connection, record, self._signer):
                return None
            same = connection.execute(_IS_FINISHED, (record.request_id, record.event_id)).fetchone()
            return None if same else _not_open(record.request_id)

        await self._commits.write(apply)
        self._marks.close(record.request_id)

    async def add_replica_time(self, spent: ReplicaTime) -> None:
        """Add to how long a replica lived and worked.

        Raises:
            LedgerUnavailable: nothing was written.
        """
        row = msgspec.structs.astuple(spent)

        def apply(connection: sqlite3.Connection) -> None:
            connection.execute(_ADD_REPLICA_TIME, row)

        await self._commits.write(apply)

    async def register_prices(self, tables: Iterable[PriceTable]) -> None:
        """Keep what the ids of price tables mean, for ever.

        Raises:
            ConfigError: an id meant other prices before.
            LedgerUnavailable: nothing was written.
        """
        rows = [(table.id, _json(table)) for table in tables]

        def apply(connection: sqlite3.Connection) -> PilotlightError | None:
            for row in rows:
                connection.execute(_KEEP_PRICES, row)
                if connection.execute(_ARE_OTHER_PRICES, row).fetchone():
                    return ConfigError(f"the price table id {row[0]!r} meant other prices before; choose another id")
            return None

        await self._commits.write(apply)

    async def subscribe(self, url: str | None) -> None:
        """Have every record from now on delivered to one receiver, or to none.

        Raises:
            LedgerUnavailable: nothing was written.
        """

        def apply(connection: sqlite3.Connection) -> None:
            outbox.subscribe(connection, url)

        await self._commits.write(apply)

    def due_events(self, url: str, now: float, limit: int) -> list[outbox.DueEvent]:
        """Return what has to be delivered now.

        Raises:
            LedgerUnavailable: the ledger cannot be read.
        """
        return self._reader.due_events(url, now, limit)

    async def settle_events(self, outcomes: Sequence[outbox.Outcome]) -> None:
        """Note what became of deliveries.

        Raises:
            LedgerUnavailable: nothing was written.
        """

        def apply(connection: sqlite3.Connection) -> None:
            outbox.settle(connection, outcomes)

        await self._commits.write(apply)

    def get(self, request_id: str) -> UsageRecord | None:
        """Return the record of a finished invocation.

        Raises:
            LedgerUnavailable: the ledger cannot be read.
        """
        return self._reader.get(request_id)

    def receipt(self, request_id: str) -> str | None:
        """Return the signed record of a finished invocation; None when it was not signed.

        Raises:
            LedgerUnavailable: the ledger cannot be read.
        """
        return self._reader.receipt(request_id)

    def close(self) -> None:
        """Make the waiting writes and let go of the ledger."""
        if self._lock is not None:
            # the writer last: the last connection to close moves the log into the database, and a reader cannot
            self._reader.close()
            self._commits.close()
            self._marks.end()
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _open_lock(path: Path) -> int:
    lock_path = path.with_name(f"{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"{lock_path}: cannot be opened ({error.strerror})") from error


def _try_alone(lock: int) -> bool:
    """Take the lock for ourselves and return True, or share it with the processes that hold it already."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fcntl.flock(lock, fcntl.LOCK_SH)  # waits while another process closes what a crash left open
        return False
    return True


def _close_crashed(connection: sqlite3.Connection, path: Path, signer: Signer | None) -> None:
    try:
        marks = LeftMarks(path)
        connection.execute("BEGIN IMMEDIATE")
        for admission, usage in connection.execute(_OPEN).fetchall():
            _end(connection, crashed_record(*_last_seen(admission, usage, marks)), signer)
        connection.execute("COMMIT")
        marks.remove()
    except (sqlite3.Error, msgspec.DecodeError, OSError) as error:
        raise ConfigError(f"{path}: what a crash left open cannot be closed ({error})") from error


def _last_seen(admission: str, usage: str | None, marks: LeftMarks) -> tuple[Admission, Usage]:
    """Return an open admission with what it had used, by its last checkpoint or its last mark."""
    admitted = msgspec.json.decode(admission, type=Admission)
    checkpoint = Usage() if usage is None else msgspec.json.decode(usage, type=Usage)
    mark = marks.get(admitted.request_id)
    if mark.completion_tokens <= checkpoint.completion_tokens:
        return admitted, checkpoint
    return admitted, msgspec.structs.replace(checkpoint, delivered_tokens=mark.completion_tokens, **mark._asdict())


def _end(connection: sqlite3.Connection, record: UsageRecord, signer: Signer | None) -> bool:
    """End an open invocation, settle with its key and tell whoever wants to know; False when it is not open."""
    text = _json(record)
    signature = None if signer is None else signer.sign(text)
    if connection.execute(_FINISH, (text, signature, record.request_id)).rowcount == 0:
        return False
    settle(connection, record)
    outbox.put(connection, record.request_id)
    return True


def _not_open(request_id: str) -> RequestNotFound:
    return RequestNotFound(f"no open invocation has the request id {request_id!r}")


def _json(struct: Admission | Usage | UsageRecord | PriceTable) -> str:
    return msgspec.json.encode(struct).decode()
