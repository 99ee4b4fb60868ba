"""Who is served next: the tenant that was served the fewest tokens, first come first served within one. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar


class Queued(Protocol):
    @property
    def tenant(self) -> str | None: ...


Q = TypeVar("Q", bound=Queued)


class FairQueue(Generic[Q]):
    """What waits, by tenant.

    A tenant that comes back starts level with those who are waiting, so being away saves nothing up; and what is used
    while nobody waits costs nothing. Between two tenants that both wait all the time, the tokens served never differ by
    more than one request's. What a tenant's requests generate may be charged after they were taken out.

    Source: start-time fair queueing (Goyal, Vin and Cheng 1996).
    """

    def __init__(self) -> None:
        self._waiting: dict[str | None, deque[Q]] = {}
        self._served_tokens: dict[str | None, int] = {}

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._waiting.values())

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def __iter__(self) -> Iterator[Q]:
        for queue in self._waiting.values():
            yield from queue

    def add(self, item: Q) -> None:
        """Queue behind the others of the tenant."""
        self._queue(item.tenant).append(item)

    def add_front(self, item: Q) -> None:
        """Queue before the others of the tenant."""
        self._queue(item.tenant).appendleft(item)

    def peek(self) -> Q | None:
        """Return the one whose turn it is, None when nobody waits."""
        return self._waiting[min(self._waiting, key=self._served)][0] if self._waiting else None

    def pop(self) -> Q:
        """Take out the one whose turn it is.

        Raises:
            IndexError: nobody waits.
        """
        if (item := self.peek()) is None:
            raise IndexError("pop from an empty queue")
        self.remove(item)
        return item

    def remove(self, item: Q) -> None:
        """Take one out, wherever it stands.

        Raises:
            ValueError: it does not wait here.
        """
        queue = self._waiting.get(item.tenant, deque())
        queue.remove(item)
        if not queue:
            del self._waiting[item.tenant]
        if not self._waiting:
            self._served_tokens.clear()

    def charge(self, tenant: str | None, num_tokens: int) -> None:
        """Note that a tenant was served so many tokens, if anybody waits meanwhile."""
        if self._waiting:
            self._served_tokens[tenant] = self._served(tenant) + num_tokens

    def _served(self, tenant: str | None) -> int:
        return self._served_tokens.get(tenant, 0)

    def _queue(self, tenant: str | None) -> deque[Q]:
        if tenant not in self._waiting:
            level = min(map(self._served, self._waiting), default=0)
            self._served_tokens[tenant] = max(level, self._served(tenant))
            self._waiting[tenant] = deque()
        return self._waiting[tenant]
