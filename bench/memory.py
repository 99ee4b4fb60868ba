"""Memory, of processes and of the machine, from Linux's own counters."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

INTERVAL_S = 0.1
KIB_PER_MIB = 1024
NUM_PASSES = 4


@dataclass(frozen=True)
class Memory:
    """Resident memory in MiB: anonymous, and mapped from files."""

    anonymous_mib: float
    mapped_mib: float


class PeakMemory:
    """Watches a process and its children from its start to its end, ten times a second, for some 50 µs each."""

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
        while not self._ended.wait(INTERVAL_S):
            now = resident(self._pid)
            self._peak = Memory(
                max(self._peak.anonymous_mib, now.anonymous_mib), max(self._peak.mapped_mib, now.mapped_mib)
            )


def resident(pid: int) -> Memory:
    """Return what a process and its children hold now; pages that they share are counted in each."""
    pids = [pid, *_children(pid)]
    anonymous, mapped = 0, 0
    for each in pids:
        fields = _status(each)
        anonymous += fields.get("RssAnon", 0)
        mapped += fields.get("RssFile", 0) + fields.get("RssShmem", 0)
    return Memory(anonymous / KIB_PER_MIB, mapped / KIB_PER_MIB)


def _children(pid: int) -> list[int]:
    try:
        direct = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:  # it has ended, or the kernel does not say
        return []
    return [each for child in direct for each in (child, *_children(child))]


def _status(pid: int) -> dict[str, int]:
    """Return the resident sizes of a process in KiB, nothing of one that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines) if "Rss" in name}


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
