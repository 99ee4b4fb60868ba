"""The usage ledger: ADMIT, then CHECKPOINTs, then exactly one FINAL for every invocation.

Source: docs/architecture.md, "Metering".
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import msgspec

from pilotlight.errors import ConfigError, PilotlightError, RequestIdInUse, RequestNotFound
from pilotlight.metering.group_commit import GroupCommit
from pilotlight.metering.idempotency import Claim, Claimed, book, keep, next_attempt
from pilotlight.metering.ledger_reader import LedgerReader
from pilotlight.metering.limits import Admitted, reserve, settle
from pilotlight.metering.marks import LeftMarks, Mark, Marks
from pilotlight.metering.record import Admission, UsageRecord, crashed_record
from pilotlight.metering.schema import connect_writer
from pilotlight.metering.usage import Usage

_IS_KNOWN = "SELECT 1 FROM invocations WHERE request_id = ?"
_ADMIT = "INSERT INTO invocations (request_id, admission) VALUES (?, ?)"
_CHECKPOINT = "UPDATE invocations SET usage = ? WHERE request_id = ? AND record IS NULL"
_FINISH = "UPDATE invocations SET record = ? WHERE request_id = ? AND record IS NULL"
_IS_FINISHED = "SELECT 1 FROM invocations WHERE request_id = ? AND event_id = ?"
_OPEN = "SELECT admission, usage FROM invocations WHERE record IS NULL"


class Ledger:
    """A writer of a ledger, for asyncio callers; ``LedgerReader`` reads beside it, from any process.

    Several processes may write to one ledger, a server and `pilotlight invoke` say. The one that opens it while nobody
    else has it open closes what a crash left open. Open it after forking: a child would share lock and connection.
    """

    def __init__(self, path: Path) -> None:
        """Create or open the ledger at ``path``, and close as crashed what a former process left open.

        Raises:
            StartupError: a newer version of Pilotlight wrote it.
            ConfigError: it cannot be opened.
        """
        with ExitStack() as opened:
            lock = _open_lock(path)
            opened.callback(os.close, lock)
            alone = _try_alone(lock)
            connection = connect_writer(path)
            opened.callback(connection.close)
            if alone:
                _close_crashed(connection, path)
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
            if _end(connection, record):
                return None
            same = connection.execute(_IS_FINISHED, (record.request_id, record.event_id)).fetchone()
            return None if same else _not_open(record.request_id)

        await self._commits.write(apply)
        self._marks.close(record.request_id)

    def get(self, request_id: str) -> UsageRecord | None:
        """Return the record of a finished invocation.

        Raises:
            LedgerUnavailable: the ledger cannot be read.
        """
        return self._reader.get(request_id)

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


def _close_crashed(connection: sqlite3.Connection, path: Path) -> None:
    try:
        marks = LeftMarks(path)
        connection.execute("BEGIN IMMEDIATE")
        for admission, usage in connection.execute(_OPEN).fetchall():
            _end(connection, crashed_record(*_last_seen(admission, usage, marks)))
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


def _end(connection: sqlite3.Connection, record: UsageRecord) -> bool:
    """End an open invocation and settle with its key; False when it is not open."""
    if connection.execute(_FINISH, (_json(record), record.request_id)).rowcount == 0:
        return False
    settle(connection, record)
    return True


def _not_open(request_id: str) -> RequestNotFound:
    return RequestNotFound(f"no open invocation has the request id {request_id!r}")


def _json(struct: Admission | Usage | UsageRecord) -> str:
    return msgspec.json.encode(struct).decode()
