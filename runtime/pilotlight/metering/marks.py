"""How far each open invocation is, token by token, in a file that outlives a killed process.

A token is noted here before it is delivered. The note is one small write into the system's page cache, without a sync:
it survives the process, though not the machine, for which the ledger's checkpoints are. A file belongs to one process,
and the next one that has the ledger to itself reads it and takes it away.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from pilotlight.errors import ConfigError, LedgerUnavailable

_SLOT = struct.Struct("<16sQQQQ")
_COUNTS = struct.Struct("<QQQQ")
_EMPTY = bytes(_SLOT.size)
_COUNTS_OFFSET = _SLOT.size - _COUNTS.size


class Mark(NamedTuple):
    """What an invocation has used so far."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    busy_ms: int = 0


class Marks:
    """The marks of this process's invocations. A slot is written in full before it is used: noting needs no space."""

    def __init__(self, ledger: Path) -> None:
        """Create a file beside the ledger.

        Raises:
            ConfigError: it cannot be created.
        """
        self._path = ledger.with_name(f"{ledger.name}.marks-{secrets.token_hex(8)}")
        try:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"{self._path}: cannot be created ({error.strerror})") from error
        self._slots: dict[str, int] = {}
        self._free: list[int] = []
        self._num_slots = 0
        self._ended = False

    def open(self, request_id: str) -> bool:
        """Make a slot for an invocation; False when it has one already.

        Raises:
            LedgerUnavailable: there is no space for it.
        """
        if request_id in self._slots:
            return False
        if not self._free:
            self._free.append(self._num_slots)
            self._num_slots += 1
        self._write(self._free[-1] * _SLOT.size, _SLOT.pack(_digest(request_id), *Mark()))
        self._slots[request_id] = self._free.pop()
        return True

    def note(self, request_id: str, mark: Mark) -> None:
        """Note how far an open invocation is.

        Raises:
            LedgerUnavailable: it could not be noted.
        """
        self._write(self._slots[request_id] * _SLOT.size + _COUNTS_OFFSET, _COUNTS.pack(*mark))

    def close(self, request_id: str) -> None:
        """Forget an invocation, whose record is written or which was not admitted."""
        if (slot := self._slots.pop(request_id, None)) is not None:
            with suppress(LedgerUnavailable):  # what is not open in the ledger is not looked for here
                self._write(slot * _SLOT.size, _EMPTY)
            self._free.append(slot)

    def end(self) -> None:
        """Close the file, and remove it unless an invocation is still open."""
        self._ended = True  # the file's number may soon be that of another file
        os.close(self._file)
        if not self._slots:
            self._path.unlink(missing_ok=True)

    def _write(self, offset: int, content: bytes) -> None:
        if self._ended:
            raise LedgerUnavailable("the usage ledger is closed")
        try:
            written = os.pwrite(self._file, content, offset)
        except OSError as error:
            raise LedgerUnavailable(f"the usage ledger cannot be written ({error.strerror})") from error
        if written < len(content):
            raise LedgerUnavailable("the usage ledger cannot be written (the disk is full)")


class LeftMarks:
    """The marks that former processes left beside a ledger."""

    def __init__(self, ledger: Path) -> None:
        self._paths = sorted(ledger.parent.glob(f"{ledger.name}.marks-*"))
        self._marks = {digest: mark for path in self._paths for digest, mark in _slots(path.read_bytes())}

    def get(self, request_id: str) -> Mark:
        """Return how far an invocation was; nothing was noted before its first token."""
        return self._marks.get(_digest(request_id), Mark())

    def remove(self) -> None:
        """Remove the files."""
        for path in self._paths:
            path.unlink(missing_ok=True)


def _slots(content: bytes) -> Iterator[tuple[bytes, Mark]]:
    whole = len(content) - len(content) % _SLOT.size
    for digest, *counts in _SLOT.iter_unpack(content[:whole]):
        if digest != bytes(16):
            yield digest, Mark(*counts)


def _digest(request_id: str) -> bytes:
    return hashlib.sha256(request_id.encode()).digest()[:16]
