"""How far each open invocation is, token by token, in a file that outlives a killed process.

A token is noted here before it is delivered, together with the other tokens of its step: by one write into the system's
page cache, without a sync. It survives the process, though not the machine, for which the ledger's checkpoints are. A
file belongs to one process, which holds a lock on it; whoever closes what that process left open reads it and takes it
away.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import struct
from collections.abc import Iterator, Mapping
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
    """The marks of this process's invocations. A slot is written in full before it is used: noting needs no space.

    The whole content is in memory, too, so that one write brings every slot between the first and the last of a step.
    A process that is killed in the middle of it leaves some slots as they were before: none of them was delivered yet.
    """

    def __init__(self, ledger: Path) -> None:
        """Create a file beside the ledger.

        Raises:
            ConfigError: it cannot be created.
        """
        self.owner = secrets.token_hex(8)
        self._path = ledger.with_name(f"{ledger.name}.marks-{self.owner}")
        try:
            self._file = _create_locked(self._path)
        except OSError as error:
            raise ConfigError(f"{self._path}: cannot be created ({error.strerror})") from error
        self._slots: dict[str, int] = {}
        self._free: list[int] = []
        self._content = bytearray()
        self._ended = False

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._slots

    def __len__(self) -> int:
        """Return how many invocations are open."""
        return len(self._slots)

    def __iter__(self) -> Iterator[str]:
        """Yield the ids of the open invocations."""
        return iter(list(self._slots))

    def open(self, request_id: str) -> bool:
        """Make a slot for an invocation; False when it has one already.

        Raises:
            LedgerUnavailable: there is no space for it.
        """
        if request_id in self._slots:
            return False
        if not self._free:
            self._free.append(len(self._content) // _SLOT.size)
            self._content += _EMPTY
        slot = self._free[-1]
        _SLOT.pack_into(self._content, slot * _SLOT.size, _digest(request_id), *Mark())
        self._write(slot, slot)
        self._slots[request_id] = self._free.pop()
        return True

    def note(self, marks: Mapping[str, Mark]) -> None:
        """Note how far open invocations are, by request id.

        Raises:
            LedgerUnavailable: some of it could not be noted.
        """
        try:
            slots = [self._slots[request_id] for request_id in marks]
        except KeyError as error:
            raise LedgerUnavailable(f"no open invocation has the request id {error.args[0]!r}") from error
        for slot, mark in zip(slots, marks.values(), strict=True):
            _COUNTS.pack_into(self._content, slot * _SLOT.size + _COUNTS_OFFSET, *mark)
        self._write(min(slots), max(slots))

    def close(self, request_id: str) -> None:
        """Forget an invocation, whose record is written or which was not admitted."""
        if (slot := self._slots.pop(request_id, None)) is not None:
            self._content[slot * _SLOT.size : (slot + 1) * _SLOT.size] = _EMPTY
            with suppress(LedgerUnavailable):  # what is not open in the ledger is not looked for here
                self._write(slot, slot)
            self._free.append(slot)

    def end(self) -> None:
        """Close the file, and remove it unless an invocation is still open."""
        self._ended = True  # the file's number may soon be that of another file
        os.close(self._file)
        if not self._slots:
            self._path.unlink(missing_ok=True)

    def _write(self, first: int, last: int) -> None:
        """Write the slots from the first to the last."""
        if self._ended:
            raise LedgerUnavailable("the usage ledger is closed")
        content = self._content[first * _SLOT.size : (last + 1) * _SLOT.size]
        try:
            written = os.pwrite(self._file, content, first * _SLOT.size)
        except OSError as error:
            raise LedgerUnavailable(f"the usage ledger cannot be written ({error.strerror})") from error
        if written < len(content):
            raise LedgerUnavailable("the usage ledger cannot be written (the disk is full)")


class LeftMarks:
    """The marks that former processes left beside a ledger. ``owners`` are those processes."""

    def __init__(self, ledger: Path) -> None:
        found = {path: _left(path) for path in sorted(ledger.parent.glob(f"{ledger.name}.marks-*"))}
        self._paths = [path for path, content in found.items() if content is not None]
        self._marks = {digest: mark for content in found.values() for digest, mark in _slots(content or b"")}
        self.owners = [path.name.rpartition("-")[2] for path in self._paths]

    def get(self, request_id: str) -> Mark:
        """Return how far an invocation was; nothing was noted before its first token."""
        return self._marks.get(_digest(request_id), Mark())

    def remove(self) -> None:
        """Remove the files."""
        for path in self._paths:
            path.unlink(missing_ok=True)


def _create_locked(path: Path) -> int:
    """Create a file that has a lock as long as it has its name, until this process ends."""
    unlocked = path.with_name(f"new-{path.name}")
    file = os.open(unlocked, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    fcntl.flock(file, fcntl.LOCK_EX)
    unlocked.rename(path)
    return file


def _left(path: Path) -> bytes | None:
    """Return the content of a file whose process is gone; None where it lives, or another one was quicker."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return file.read()
    except (BlockingIOError, FileNotFoundError):
        return None


def _slots(content: bytes) -> Iterator[tuple[bytes, Mark]]:
    whole = len(content) - len(content) % _SLOT.size
    for digest, *counts in _SLOT.iter_unpack(content[:whole]):
        if digest != bytes(16):
            yield digest, Mark(*counts)


def _digest(request_id: str) -> bytes:
    return hashlib.sha256(request_id.encode()).digest()[:16]
