"""What this process knows of the replicas: which there are, what each has to do, and which had better be spared.

Serve copies the module of a router into what it deploys, by value and with its globals. What a router shares with the
rest of its process therefore lies here, in a module that both import. Knows nothing of Ray.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import takewhile

from pilotlight.host.routing import Choice

CROWDED_TOKENS = 1_000_000
"""A replica without a free slot comes after all others, whatever it knows."""

SUSPECT_S = 5.0
"""How long nothing is sent to a replica that could not be reached: by then Ray knows whether it is dead."""

MAX_REMEMBERED_BLOCKS = 4096
MAX_REMEMBERED_LEAVING = 1024


class SentPrefixes:
    """The blocks of prompts that a replica was sent lately. Serve's replicas do not tell which they still keep."""

    def __init__(self) -> None:
        self._blocks: dict[bytes, None] = {}

    def add(self, blocks: Iterable[bytes]) -> None:
        for block in blocks:
            self._blocks.pop(block, None)
            self._blocks[block] = None
        while len(self._blocks) > MAX_REMEMBERED_BLOCKS:
            del self._blocks[next(iter(self._blocks))]

    def num_known(self, blocks: Iterable[bytes]) -> int:
        """Return how many of a prompt's blocks, from its beginning, are among them."""
        return sum(1 for _ in takewhile(self._blocks.__contains__, blocks))


@dataclass(eq=False)
class Known:
    """One replica, as this process sees it. ``work`` is the tokens of each request that it has and has not ended."""

    max_ongoing: int
    work: dict[str, int] = field(default_factory=dict)
    prefixes: SentPrefixes = field(default_factory=SentPrefixes)
    suspect_until: float = 0.0

    def choice(self, blocks: Iterable[bytes], block_tokens: int) -> Choice:
        """Return what routing has to know, for a prompt with these blocks."""
        outstanding = sum(list(self.work.values()))
        if len(self.work) >= self.max_ongoing:
            outstanding += CROWDED_TOKENS
        return Choice(outstanding, self.prefixes.num_known(blocks) * block_tokens)


_known: dict[str, dict[str, Known]] = {}
_leaving: deque[str] = deque(maxlen=MAX_REMEMBERED_LEAVING)


def present(deployment: str, replicas: Mapping[str, int]) -> None:
    """Say which replicas a deployment has, and how many requests each takes; called by its router."""
    known = _known.get(deployment, {})
    _known[deployment] = {key: known.get(key) or Known(most) for key, most in replicas.items()}


def staying(deployment: str) -> dict[str, Known]:
    """Return the replicas of a deployment that may be sent something."""
    return {key: one for key, one in _known.get(deployment, {}).items() if not is_spared(deployment, key)}


def known(deployment: str, key: str) -> Known | None:
    return _known.get(deployment, {}).get(key)


def forget(deployment: str, key: str) -> None:
    """A replica is dead."""
    _known.get(deployment, {}).pop(key, None)


def suspect(deployment: str, key: str) -> None:
    """A replica could not be reached: it may be dead, which Ray takes a while to find out."""
    if (one := known(deployment, key)) is not None:
        one.suspect_until = time.monotonic() + SUSPECT_S


def leave_out(replica_id: str) -> None:
    """Send nothing more to a replica that hands over; ``replica_id`` ends with Serve's own id of it."""
    key = replica_id.rpartition("-")[2]
    if key not in _leaving:
        _leaving.append(key)


def is_spared(deployment: str, key: str) -> bool:
    """Say whether a replica is leaving, or could not be reached just now."""
    one = known(deployment, key)
    return key in _leaving or (one is not None and time.monotonic() < one.suspect_until)
