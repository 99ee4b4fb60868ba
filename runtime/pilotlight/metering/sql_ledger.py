"""The protocol of the usage ledger: ADMIT, then CHECKPOINTs, then exactly one FINAL for every invocation.

It is written once, for every database that speaks SQL; ``ledger`` and ``postgres_ledger`` say how one is opened, and
who closes what a crash left open.

Source: docs/architecture.md, "Metering".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Self

import msgspec

from pilotlight.errors import ConfigError, PilotlightError, RequestIdInUse, RequestNotFound
from pilotlight.metering import outbox
from pilotlight.metering.database import Connection, Location
from pilotlight.metering.group_commit import GroupCommit
from pilotlight.metering.idempotency import Claim, Claimed, book, keep, next_attempt
from pilotlight.metering.ledger_reader import LedgerReader
from pilotlight.metering.limits import Admitted, reserve, settle
from pilotlight.metering.machine_cost import ReplicaTime
from pilotlight.metering.marks import LeftMarks, Mark, Marks
from pilotlight.metering.prices import PriceTable
from pilotlight.metering.record import Admission, UsageRecord
from pilotlight.metering.signing import Signer
from pilotlight.metering.usage import Usage

_IS_KNOWN = "SELECT 1 FROM invocations WHERE request_id = ?"
_ADMIT = "INSERT INTO invocations (request_id, admission) VALUES (?, ?)"
_CHECKPOINT = "UPDATE invocations SET usage = ? WHERE request_id = ? AND record IS NULL"
_FINISH = "UPDATE invocations SET record = ?, signature = ? WHERE request_id = ? AND record IS NULL"
_IS_FINISHED = "SELECT 1 FROM invocations WHERE request_id = ? AND event_id = ?"
_ADD_REPLICA_TIME = """
INSERT INTO replica_time VALUES (?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (replica_id, function, day, currency, micros_per_hour) DO UPDATE SET
alive_ms = replica_time.alive_ms + excluded.alive_ms, busy_ms = replica_time.busy_ms + excluded.busy_ms
"""
_KEEP_PRICES = "INSERT INTO price_tables (id, prices) VALUES (?, ?) ON CONFLICT (id) DO NOTHING"
_ARE_OTHER_PRICES = "SELECT 1 FROM price_tables WHERE id = ? AND prices <> ?"


MAX_PAUSE_S = 0.02
PAUSE_S_PER_INVOCATION = 0.0002
"""The more invocations are open, the more there is to write together: a hundred of them have at most fifty transactions
a second. Where few are open, nobody waits."""


class SqlLedger:
    """A writer of a ledger, for asyncio callers; ``LedgerReader`` reads beside it, from any process.

    Several processes may write to one ledger. Open it after forking: a child would share its locks and connections.
    """

    checkpoint_tokens = 128
    """What a crash can leave unbilled where the marks are lost, too."""

    def __init__(self, location: Location, connection: Connection, marks: Marks, signer: Signer | None) -> None:
        """Write through ``connection``, and note what is open in ``marks``; ``signer`` signs every record."""
        self.location = location
        self._signer = signer
        self._marks = marks
        self._reader = LedgerReader(location)
        self._commits = GroupCommit(connection, lambda: min(MAX_PAUSE_S, len(marks) * PAUSE_S_PER_INVOCATION))
        self._closed = False

    async def admit(self, admission: Admission, claim: Claim | None = None) -> Admitted:
        """Open an invocation, and reserve what it could use within the limits of its key, if it has one.

        Raises:
            RequestIdInUse: the ledger holds the request id already.
            IdempotencyConflict: the claimed idempotency key was used before.
            LimitExceeded, InvalidRequest, NotPermitted, InvalidKey: the key does not allow it.
            LedgerUnavailable: nothing was written.
        """
        admitted = Admitted()

        def apply(connection: Connection) -> PilotlightError | None:
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
            self._insert(connection, admission.request_id, _json(row))
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

    def note(self, marks: Mapping[str, Mark]) -> None:
        """Note what open invocations have used so far, by request id, for the case that this process is killed.

        Raises:
            LedgerUnavailable: not all of it could be noted, so nothing of it may be delivered.
        """
        self._marks.note(marks)

    async def checkpoint(self, request_id: str, usage: Usage) -> None:
        """Record what an open invocation has used so far, for the case that the machine crashes.

        Raises:
            RequestNotFound: no open invocation has that id.
            LedgerUnavailable: nothing was written.
        """
        row = (_json(usage), request_id)

        def apply(connection: Connection) -> PilotlightError | None:
            return None if connection.execute(_CHECKPOINT, row).rowcount == 1 else _not_open(request_id)

        await self._commits.write(apply)

    async def finish(self, record: UsageRecord) -> None:
        """End an open invocation by its one record. Writing the same record again changes nothing.

        Raises:
            RequestNotFound: no open invocation has that id, or it ended by another record.
            LedgerUnavailable: the record may not have been written; try again.
        """

        def apply(connection: Connection) -> PilotlightError | None:
            if end(connection, record, self._signer):
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

        def apply(connection: Connection) -> None:
            connection.execute(_ADD_REPLICA_TIME, row)

        await self._commits.write(apply)

    async def register_prices(self, tables: Iterable[PriceTable]) -> None:
        """Keep what the ids of price tables mean, for ever.

        Raises:
            ConfigError: an id meant other prices before.
            LedgerUnavailable: nothing was written.
        """
        rows = [(table.id, _json(table)) for table in tables]

        def apply(connection: Connection) -> PilotlightError | None:
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

        def apply(connection: Connection) -> None:
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

        def apply(connection: Connection) -> None:
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
        if not self._closed:
            self._closed = True
            # the writer last: the last connection to close moves SQLite's log into the database, and a reader cannot
            self._reader.close()
            self._commits.close()
            self._marks.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _insert(self, connection: Connection, request_id: str, admission: str) -> None:
        connection.execute(_ADMIT, (request_id, admission))


def last_seen(admission: str, usage: str | None, marks: LeftMarks) -> tuple[Admission, Usage]:
    """Return an open admission with what it had used, by its last checkpoint or its last mark."""
    admitted = msgspec.json.decode(admission, type=Admission)
    checkpoint = Usage() if usage is None else msgspec.json.decode(usage, type=Usage)
    mark = marks.get(admitted.request_id)
    if mark.completion_tokens <= checkpoint.completion_tokens:
        return admitted, checkpoint
    return admitted, msgspec.structs.replace(checkpoint, delivered_tokens=mark.completion_tokens, **mark._asdict())


def end(connection: Connection, record: UsageRecord, signer: Signer | None) -> bool:
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
