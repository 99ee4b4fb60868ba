"""Graphs as ONNX Runtime has optimized them for this machine, kept from one start to the next.

A kept graph has its weights in the layout that the processor's kernels want. They are mapped from the file, so a
start needs neither the time nor the private memory to lay them out again. Such a file fits one version of ONNX Runtime
and one kind of processor, so it is made where it is used and is never part of an artifact. It is used only when its
stamp says that it was made for this artifact, by this runtime, on this kind of processor, and has not changed since,
and when nobody but this user could have written it.

Making a graph also clears away what nobody would miss: what a process that was killed had begun, and the graphs of
artifacts that were not opened for a month. On a disk that is nearly full none is made.
"""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from pilotlight.artifact import GRAPH, WEIGHTS, Artifact, sha256_of
from pilotlight.scratch import scratch

STAMP = "stamp.json"
PRIVATE = 0o700
BEGUN = ".making-"
UNUSED_S = 30 * 86400
LEFT_FREE_BYTES = 2 * 1024**3


class Stamp(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a kept graph was made from, and what its files were like when it was made."""

    artifact_digest: str
    graph: str
    runtime: str
    processor: str
    graph_sha256: str
    weights_size_bytes: int
    weights_modified_ns: int


class GraphCache:
    """Kept graphs under ``directory``, for one version of the runtime. A cache that cannot be used is no error."""

    def __init__(self, directory: Path, runtime: str) -> None:
        self._directory = directory
        self._runtime = runtime
        self._processor = _processor()

    def find(self, artifact: Artifact, name: str) -> Path | None:
        """Return the path of the kept form of one of an artifact's graphs, or None."""
        entry = self._entry(artifact, name)
        try:
            stamp = msgspec.json.decode((entry / STAMP).read_bytes(), type=Stamp)
            trusted = _is_private(entry) and stamp == self._stamp(artifact, name, entry)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):
            return None
        if not trusted:
            return None
        with suppress(OSError):  # a cache that can only be read has its graphs cleared away by its owner
            os.utime(entry / STAMP)
        return entry / GRAPH

    @contextmanager
    def making(self, artifact: Artifact, name: str) -> Iterator[Path]:
        """Yield the path to write a graph to, its weights beside it; it is kept when the block ends without an error.

        Raises:
            OSError: the cache cannot be written, or its disk is nearly full.
        """
        entry = self._entry(artifact, name)
        entry.parent.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
        self._clear_away()
        _check_room(self._directory, artifact)
        with scratch(BEGUN, self._directory) as workplace:
            made = workplace / "entry"
            made.mkdir(mode=PRIVATE)
            yield made / GRAPH
            (made / STAMP).write_bytes(msgspec.json.encode(self._stamp(artifact, name, made)))
            shutil.rmtree(entry, ignore_errors=True)
            with suppress(OSError):  # another process was quicker; its graph is as good
                made.rename(entry)

    def discard(self, artifact: Artifact, name: str) -> None:
        """Remove a kept graph."""
        shutil.rmtree(self._entry(artifact, name), ignore_errors=True)

    def _clear_away(self) -> None:
        oldest = time.time() - UNUSED_S
        for stamp in self._directory.glob(f"*/*/{STAMP}"):
            with suppress(OSError):  # another process clears away, too
                if stamp.stat().st_mtime < oldest:
                    shutil.rmtree(stamp.parent)
                    stamp.parent.parent.rmdir()

    def _entry(self, artifact: Artifact, name: str) -> Path:
        """One place for each artifact's graph, so that a new runtime replaces what an old one left there."""
        return self._directory / artifact.digest.removeprefix("sha256:")[:32] / Path(name).stem

    def _stamp(self, artifact: Artifact, name: str, entry: Path) -> Stamp:
        weights = (entry / WEIGHTS).stat()
        return Stamp(
            artifact.digest,
            name,
            self._runtime,
            self._processor,
            sha256_of(entry / GRAPH),
            weights.st_size,
            weights.st_mtime_ns,
        )


def _check_room(directory: Path, artifact: Artifact) -> None:
    """Raise an OSError where a graph with all of an artifact's weights would all but fill the disk."""
    needed = LEFT_FREE_BYTES + sum((artifact.path / file).stat().st_size for file in artifact.manifest.files)
    if shutil.disk_usage(directory).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))


def _is_private(entry: Path) -> bool:
    status = entry.lstat()
    return status.st_uid == os.getuid() and status.st_mode & 0o777 == PRIVATE


def _processor() -> str:
    """Return a digest of the processor's name and features, which decide how weights are laid out."""
    features = ""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    described = f"{platform.machine()}\n{platform.processor()}\n{features}"
    return hashlib.sha256(described.encode()).hexdigest()
