"""The queue of a function: fair between tenants, first come first served within one. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from pilotlight.host.journal import Entry


class FairQueue:
    """Serves the tenant that was served the fewest tokens.

    A tenant that comes back starts level with those who are waiting: being away saves nothing up. Between two tenants
    that both wait all the time, the tokens served never differ by more than one request's.
    Source: start-time fair queueing (Goyal, Vin and Cheng 1996).
    """

    def __init__(self) -> None:
        self._waiting: dict[str, deque[Entry]] = {}
        self._served_tokens: dict[str, float] = {}
        self._level = 0.0
        self._returned: deque[Entry] = deque()
        self._num_entries = 0
        self.num_tokens = 0

    def __len__(self) -> int:
        return self._num_entries

    def __iter__(self) -> Iterator[Entry]:
        yield from self._returned
        for waiting in self._waiting.values():
            yield from waiting

    def push(self, entry: Entry) -> None:
        """Queue a sequence behind the others of its tenant."""
        tenant = entry.sequence.tenant or ""
        if tenant not in self._waiting:
            self._waiting[tenant] = deque()
            self._served_tokens[tenant] = max(self._level, self._served_tokens.get(tenant, 0.0))
        self._waiting[tenant].append(entry)
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
        elif self._waiting:
            tenant = min(self._waiting, key=lambda name: self._served_tokens[name])
            self._level = self._served_tokens[tenant]
            entry = self._waiting[tenant].popleft()
            self.charge(tenant, len(entry.sequence.prompt_ids))
            self._forget_if_empty(tenant)
        else:
            raise IndexError("pop from an empty queue")
        self._count(entry, -1)
        return entry

    def charge(self, tenant: str, num_tokens: int) -> None:
        """Note that a tenant was served so many tokens."""
        self._served_tokens[tenant] = self._served_tokens.get(tenant, self._level) + num_tokens
        if len(self._served_tokens) > 2 * len(self._waiting) + 64:
            self._served_tokens = {
                name: served
                for name, served in self._served_tokens.items()
                if name in self._waiting or served > self._level
            }

    def remove(self, entry: Entry) -> bool:
        """Take a sequence out, wherever it stands; False when it does not wait here."""
        tenant = entry.sequence.tenant or ""
        if entry in self._returned:
            self._returned.remove(entry)
        elif entry in self._waiting.get(tenant, ()):
            self._waiting[tenant].remove(entry)
            self._forget_if_empty(tenant)
        else:
            return False
        self._count(entry, -1)
        return True

    def _forget_if_empty(self, tenant: str) -> None:
        if not self._waiting[tenant]:
            del self._waiting[tenant]

    def _count(self, entry: Entry, sign: int) -> None:
        self._num_entries += sign
        self.num_tokens += sign * entry.num_prefill_tokens
