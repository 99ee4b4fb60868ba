"""One thread that writes to a database: whatever waits goes into one transaction, and so into one sync of the disk."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from queue import Empty, SimpleQueue
from threading import Thread

from pilotlight.errors import LedgerUnavailable, PilotlightError
from pilotlight.metering.database import FAILURES, Connection

MAX_GROUP_WRITES = 1_000

Apply = Callable[[Connection], PilotlightError | None]


@dataclass(frozen=True, slots=True, eq=False)
class _Write:
    apply: Apply
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[None]


class GroupCommit:
    """Writes for asyncio callers. The thread owns ``connection``, which is in autocommit mode, until ``close``.

    A transaction costs much beside what it writes, so one begins at least ``pause_s()`` after the one before it began.
    After a time without any, it begins at once.
    """

    def __init__(self, connection: Connection, pause_s: Callable[[], float] = lambda: 0.0) -> None:
        self._connection = connection
        self._pause_s = pause_s
        self._began_at = 0.0
        self._inbox: SimpleQueue[_Write | None] = SimpleQueue()
        self._closed = False
        self._thread = Thread(target=self._run, name="pilotlight-ledger", daemon=True)
        self._thread.start()

    async def write(self, apply: Apply) -> None:
        """Run ``apply`` in a transaction and return once that is on disk.

        ``apply`` runs on the thread; an error that it returns is raised here, and is no failure of the others in the
        transaction. A caller that is cancelled stops waiting; its write is made all the same.

        Raises:
            LedgerUnavailable: nothing was written, or the database is closed.
        """
        if self._closed:
            raise LedgerUnavailable("the usage ledger is closed")
        loop = asyncio.get_running_loop()
        write = _Write(apply, loop, loop.create_future())
        self._inbox.put(write)
        await write.done

    def close(self) -> None:
        """Make the waiting writes, end the thread and close the connection."""
        if not self._closed:
            self._closed = True
            self._inbox.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (first := self._inbox.get()) is not None:
            self._pause()
            group = self._gather(first)
            _settle(group, self._commit(group))
        self._connection.close()

    def _pause(self) -> None:
        """Let others come, too, if the transaction before began only just now."""
        left_s = 0.0 if self._closed else self._began_at + self._pause_s() - time.monotonic()
        if left_s > 0:
            time.sleep(left_s)
        self._began_at = time.monotonic()

    def _gather(self, first: _Write) -> list[_Write]:
        group = [first]
        with suppress(Empty):
            while len(group) < MAX_GROUP_WRITES:
                write = self._inbox.get_nowait()
                if write is None:
                    self._inbox.put(None)
                    break
                group.append(write)
        return group

    def _commit(self, group: Sequence[_Write]) -> list[PilotlightError | None]:
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            outcomes = [write.apply(self._connection) for write in group]
            self._connection.execute("COMMIT")
        except Exception as error:  # noqa: BLE001 - the thread must outlive whatever went wrong in one transaction
            self._roll_back()
            return [_unavailable(error) for _ in group]
        return outcomes

    def _roll_back(self) -> None:
        if self._connection.in_transaction:
            with suppress(*FAILURES):
                self._connection.execute("ROLLBACK")


def _unavailable(cause: Exception) -> LedgerUnavailable:
    error = LedgerUnavailable(f"the usage ledger cannot be written ({cause})")
    error.__cause__ = cause
    return error


def _settle(group: Sequence[_Write], outcomes: Sequence[PilotlightError | None]) -> None:
    for loop, settled in groupby(zip(group, outcomes, strict=True), key=lambda pair: pair[0].loop):
        with suppress(RuntimeError):  # the loop was closed: nobody waits any more
            loop.call_soon_threadsafe(_wake, list(settled))


def _wake(settled: Sequence[tuple[_Write, PilotlightError | None]]) -> None:
    for write, error in settled:
        if write.done.done():
            continue
        if error is None:
            write.done.set_result(None)
        else:
            write.done.set_exception(error)
