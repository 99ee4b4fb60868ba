"""What waits for a replica: what has lost its own comes first, then one tenant after the other. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from pilotlight.engine.fair_queue import FairQueue
from pilotlight.host.journal import Entry


class Backlog:
    """A function's waiting sequences, and how many tokens they are."""

    def __init__(self) -> None:
        self._fair: FairQueue[Entry] = FairQueue()
        self._returned: deque[Entry] = deque()
        self._num_entries = 0
        self.num_tokens = 0

    def __len__(self) -> int:
        return self._num_entries

    def __iter__(self) -> Iterator[Entry]:
        yield from self._returned
        yield from self._fair

    def push(self, entry: Entry) -> None:
        """Queue a sequence behind the others of its tenant."""
        self._fair.add(entry)
        self._count(entry, 1)

    def push_front(self, entry: Entry) -> None:
        """Queue a sequence before all others: it has been served already, and its replica is gone."""
        self._returned.append(entry)
        self._count(entry, 1)

    def pop(self) -> Entry:
        """Return the next sequence; its tenant is charged for its prompt.

        Raises:
            IndexError: nobody waits.
        """
        if self._returned:
            entry = self._returned.popleft()
        else:
            entry = self._fair.pop()
            self._fair.charge(entry.tenant, len(entry.sequence.prompt_ids))
        self._count(entry, -1)
        return entry

    def charge(self, tenant: str | None, num_tokens: int) -> None:
        """Note that a tenant was served so many tokens."""
        self._fair.charge(tenant, num_tokens)

    def remove(self, entry: Entry) -> bool:
        """Take a sequence out, wherever it stands; False when it does not wait here."""
        try:
            (self._returned if entry in self._returned else self._fair).remove(entry)
        except ValueError:
            return False
        self._count(entry, -1)
        return True

    def _count(self, entry: Entry, sign: int) -> None:
        self._num_entries += sign
        self.num_tokens += sign * entry.num_prefill_tokens
