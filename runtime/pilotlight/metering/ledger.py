"""The usage ledger in a file, by SQLite: for the processes of one machine."""

from __future__ import annotations

import fcntl
import os
import sqlite3
from contextlib import ExitStack
from pathlib import Path

import msgspec

from pilotlight.errors import ConfigError
from pilotlight.metering.marks import LeftMarks, Marks
from pilotlight.metering.record import crashed_record
from pilotlight.metering.schema import connect_writer
from pilotlight.metering.signing import Signer
from pilotlight.metering.sql_ledger import SqlLedger, end, last_seen

_OPEN = "SELECT admission, usage FROM invocations WHERE record IS NULL"


class Ledger(SqlLedger):
    """A ledger in a file. The process that opens it while nobody else has it open closes what a crash left open."""

    def __init__(self, path: Path, signer: Signer | None = None) -> None:
        """Create or open the ledger at ``path``, and close as crashed what a former process left open.

        ``signer`` signs every record that is written.

        Raises:
            StartupError: a newer version of Pilotlight wrote it.
            ConfigError: it cannot be opened.
        """
        self.path = path
        with ExitStack() as opened:
            lock = _open_lock(path)
            opened.callback(os.close, lock)
            alone = _try_alone(lock)
            connection = connect_writer(path)
            opened.callback(connection.close)
            if alone:
                _close_crashed(connection, path, signer)
            marks = Marks(path)
            opened.callback(marks.end)
            if alone:
                fcntl.flock(lock, fcntl.LOCK_SH)
            super().__init__(path, connection, marks, signer)
            opened.pop_all()
        self._lock = lock

    def close(self) -> None:
        """Make the waiting writes and let go of the ledger."""
        if not self._closed:
            super().close()
            os.close(self._lock)


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
            end(connection, crashed_record(*last_seen(admission, usage, marks)), signer)
        connection.execute("COMMIT")
        marks.remove()
    except (sqlite3.Error, msgspec.DecodeError, OSError) as error:
        raise ConfigError(f"{path}: what a crash left open cannot be closed ({error})") from error
