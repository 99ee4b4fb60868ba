"""Which processes may be made, and which have to go for them. Pure, but for reading how much memory there is."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

SHARE_OF_MACHINE = 0.8
REPLICA_OVERHEAD_BYTES = 48 * 1024 * 1024
"""A replica's own memory beside weights and KV cache, before one was measured."""

HALF_LIFE_S = 600.0
"""A function that was not called for so long is half as likely to be called next."""


@dataclass(frozen=True, slots=True)
class Idle:
    """A replica or template that could leave: what that frees, and what it costs."""

    name: str
    num_bytes: int
    restart_ms: float
    idle_s: float

    @property
    def regret(self) -> float:
        """The expected cost of letting it go: cost to restart × likelihood of use."""
        return self.restart_ms * math.exp2(-self.idle_s / HALF_LIFE_S)


def evictions(missing_bytes: int, idle: Iterable[Idle]) -> list[Idle] | None:
    """Return who should leave so that so much is freed, the least regretted first; None where that is not enough."""
    chosen: list[Idle] = []
    for candidate in sorted(idle, key=lambda one: one.regret):
        if missing_bytes <= 0:
            break
        chosen.append(candidate)
        missing_bytes -= candidate.num_bytes
    return chosen if missing_bytes <= 0 else None


def estimated_bytes(weights_bytes: int, kv_bytes: int, measured_bytes: int | None) -> int:
    """Return what a replica may come to need. Its KV cache counts whole: any slot can be written to its end."""
    own = measured_bytes if measured_bytes is not None else weights_bytes + REPLICA_OVERHEAD_BYTES
    return own + kv_bytes


def machine_bytes() -> int:
    """Return the memory that this machine, or this container, has for us now."""
    found = [_available_bytes()]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = _read(path).strip()
        if text.isdigit():
            found.append(int(text))
    return int(min(found) * SHARE_OF_MACHINE)


def private_bytes(pid: int) -> int | None:
    """Return a process's anonymous resident memory, or None when it is gone."""
    for line in _read(f"/proc/{pid}/status").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return None


def resident_bytes(pid: int) -> int | None:
    """Return a process's resident memory, mapped files included, or None when it is gone."""
    for line in _read(f"/proc/{pid}/status").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return None


def _available_bytes() -> int:
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 4 * 1024**3


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
