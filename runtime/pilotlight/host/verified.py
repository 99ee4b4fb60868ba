"""Which artifacts' checksums were compared before, so that an unchanged gigabyte is not read again at each start."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

import msgspec

from pilotlight.artifact import Artifact

FILE = "verified.json"
_PRIVATE = 0o700


class _Seen(msgspec.Struct, array_like=True, frozen=True):
    """What a file was like when its checksum was right. Any write to it changes at least one of these."""

    sha256: str
    size_bytes: int
    modified_ns: int
    changed_ns: int
    inode: int
    device: int


class Verified:
    """Remembers, in a directory that only this user can write to, which files were found to be right."""

    def __init__(self, cache_dir: Path | None) -> None:
        self._path = cache_dir / FILE if cache_dir is not None else None
        self._seen = self._read()

    def verify(self, artifact: Artifact) -> None:
        """Compare an artifact's files with their checksums, except for those that were compared and not changed since.

        Raises:
            ArtifactError: a file was altered.
        """
        if (
            artifact.contents is not None
        ):  # sealed for machines whose disk is not trusted, and so neither are notes on it
            artifact.verify()
            return
        fresh = {}
        for name, entry in artifact.manifest.files.items():
            path = artifact.path / name
            before = _look(path, entry.sha256)
            if before is None or self._seen.get(str(path.absolute())) != before:
                artifact.verify_file(name)
                if before is not None and before == _look(path, entry.sha256):
                    fresh[str(path.absolute())] = before
        if fresh:
            there = {path: seen for path, seen in self._seen.items() if Path(path).exists()}
            self._seen = there | fresh
            self._write()

    def _read(self) -> dict[str, _Seen]:
        if self._path is None:
            return {}
        try:
            status = self._path.lstat()
            if status.st_uid != os.getuid() or status.st_mode & 0o022:
                return {}
            return msgspec.json.decode(self._path.read_bytes(), type=dict[str, _Seen])
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):
            return {}

    def _write(self) -> None:
        """Keep what was seen; a directory that cannot be written costs the next start some time, and nothing else."""
        if self._path is None:
            return
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(mode=_PRIVATE, parents=True, exist_ok=True)
            # always the same name: what a killed process leaves, the next one overwrites
            new = self._path.with_suffix(".new")
            with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600), "wb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                file.truncate()
                file.write(msgspec.json.encode(self._seen))
                file.flush()
                new.rename(self._path)


def _look(path: Path, sha256: str) -> _Seen | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return _Seen(sha256, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev)
