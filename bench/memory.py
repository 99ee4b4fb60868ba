"""Memory, of processes and of the machine, from Linux's own counters."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

INTERVAL_S = 0.1
FORKED_INTERVAL_S = 0.3
KIB_PER_MIB = 1024
NUM_PASSES = 4


@dataclass(frozen=True)
class Memory:
    """Resident memory in MiB: anonymous, and mapped from files."""

    anonymous_mib: float
    mapped_mib: float


class PeakMemory:
    """Watches a process and its children from its start to its end.

    The counters of one process take microseconds, ten times a second. What forked processes share must be asked of the
    page tables, which takes milliseconds: those are asked less often.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._peak = Memory(0.0, 0.0)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @property
    def peak(self) -> Memory:
        """The highest of each so far."""
        return self._peak

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        interval_s = INTERVAL_S
        while not self._ended.wait(interval_s):
            children = _children(self._pid)
            interval_s = FORKED_INTERVAL_S if children else INTERVAL_S
            now = resident(self._pid)
            self._peak = Memory(
                max(self._peak.anonymous_mib, now.anonymous_mib), max(self._peak.mapped_mib, now.mapped_mib)
            )


def resident(pid: int) -> Memory:
    """Return what a process and its children hold now; a page that several of them share is counted once."""
    children = _children(pid)
    if not children:
        fields = _fields(Path(f"/proc/{pid}/status"))
        anonymous, mapped = fields.get("RssAnon", 0), fields.get("RssFile", 0) + fields.get("RssShmem", 0)
    else:
        family = [_fields(Path(f"/proc/{each}/smaps_rollup")) for each in (pid, *children)]
        anonymous = sum(fields.get("Pss_Anon", 0) for fields in family)
        mapped = sum(fields.get("Pss_File", 0) + fields.get("Pss_Shmem", 0) for fields in family)
    return Memory(anonymous / KIB_PER_MIB, mapped / KIB_PER_MIB)


def _children(pid: int) -> list[int]:
    try:
        direct = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:  # it has ended, or the kernel does not say
        return []
    return [each for child in direct for each in (child, *_children(child))]


def _fields(path: Path) -> dict[str, int]:
    """Return the sizes in KiB that the kernel lists of a process, nothing of one that has ended."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    sizes = ((name, value.split()) for name, _, value in (line.partition(":") for line in lines))
    return {name: int(words[0]) for name, words in sizes if words[-1:] == ["kB"]}


def read_gb_per_s(num_bytes: int, num_threads: int, duration_s: float = 0.3) -> float:
    """Return the best speed at which threads read a buffer of so many bytes, each its own part (10^9 bytes/s).

    A buffer that fits the machine's last cache is read from there, as a model of that size is.
    """
    parts = np.array_split(np.ones(num_bytes // 4, np.int32), num_threads)
    best = 0.0
    end = time.monotonic() + duration_s
    while time.monotonic() < end or not best:
        threads = [threading.Thread(target=_read, args=[part]) for part in parts]
        start = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        best = max(best, NUM_PASSES * num_bytes / (time.monotonic() - start) / 1e9)
    return best


def _read(part: NDArray[np.int32]) -> None:
    for _ in range(NUM_PASSES):
        part.max()
