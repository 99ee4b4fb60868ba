"""Looking at real processes: who is whose child, and who is still there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from support import PATIENCE_S

LOOK_AGAIN_S = 0.005
"""Whoever looks without a pause takes a core from what it waits for."""


def descendants(pid: int) -> list[int]:
    """Return all living processes below ``pid``, parents first."""
    by_parent: dict[int, list[int]] = {}
    for child, parent, state in _processes():
        if state != "Z":
            by_parent.setdefault(parent, []).append(child)
    found, fresh = [], [pid]
    while fresh:
        fresh = [child for parent in fresh for child in by_parent.get(parent, [])]
        found += fresh
    return found


def name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def named(pid: int, name: str) -> list[int]:
    """Return the living processes below ``pid`` of that name."""
    return [child for child in descendants(pid) if name_of(child) == name]


def is_alive(pid: int) -> bool:
    return any(child == pid and state != "Z" for child, _, state in _processes())


def wait_for(condition: Callable[[], object]) -> None:
    """Wait until a condition holds; the time is only there to end a test that fails."""
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until, "in vain"
        time.sleep(LOOK_AGAIN_S)


def _processes() -> Iterator[tuple[int, int, str]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            yield int(entry.name), int(fields[1]), fields[0]
