"""Who is served next: deficit round robin over tenants by tokens, first come first served within one. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

QUANTUM_TOKENS = 512
"""What each waiting tenant's balance grows by in a round."""


class Queued(Protocol):
    @property
    def tenant(self) -> str | None: ...


Q = TypeVar("Q", bound=Queued)


class FairQueue(Generic[Q]):
    """Waiting sequences by tenant.

    A tenant pays for its tokens after the fact, so its balance may become negative; it is served again when rounds have
    paid that back. Every waiting tenant's balance grows each round, so nobody starves. Being away saves nothing up, and
    what is used while nobody waits costs nothing.

    Source: Shreedhar and Varghese 1995, in the surplus form, which needs no cost ahead.
    """

    def __init__(self) -> None:
        self._queues: dict[str | None, deque[Q]] = {}
        self._turns: deque[str | None] = deque()
        self._balance_tokens: dict[str | None, int] = {}

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    def __bool__(self) -> bool:
        return bool(self._turns)

    def __iter__(self) -> Iterator[Q]:
        for tenant in self._turns:
            yield from self._queues[tenant]

    def add(self, item: Q) -> None:
        """Queue behind the others of the tenant."""
        self._queue(item.tenant).append(item)

    def add_front(self, item: Q) -> None:
        """Queue before the others of the tenant."""
        self._queue(item.tenant).appendleft(item)

    def peek(self) -> Q | None:
        """Return the one whose turn it is, None when nobody waits. It stays the same until somebody pays."""
        if not self._turns:
            return None
        richest = max(self._balance_tokens.get(tenant, 0) for tenant in self._turns)
        if richest <= 0:
            self._grant((-richest // QUANTUM_TOKENS + 1) * QUANTUM_TOKENS)
        while self._balance_tokens.get(self._turns[0], 0) <= 0:
            self._turns.rotate(-1)
        return self._queues[self._turns[0]][0]

    def pop(self) -> Q:
        """Take out the one whose turn it is."""
        item = self.peek()
        assert item is not None
        self.remove(item)
        return item

    def remove(self, item: Q) -> None:
        queue = self._queues[item.tenant]
        queue.remove(item)
        if not queue:
            del self._queues[item.tenant]
            self._turns.remove(item.tenant)
            self._balance_tokens[item.tenant] = min(0, self._balance_tokens.get(item.tenant, 0))

    def charge(self, tenant: str | None, num_tokens: int) -> None:
        """Note that a tenant was served so many tokens while others waited."""
        if not self._turns:
            self._balance_tokens.clear()
            return
        self._balance_tokens[tenant] = self._balance_tokens.get(tenant, 0) - num_tokens

    def _grant(self, num_tokens: int) -> None:
        balances = {tenant: balance + num_tokens for tenant, balance in self._balance_tokens.items()}
        owing = {tenant: balance for tenant, balance in balances.items() if balance < 0}
        self._balance_tokens = owing | {tenant: balances.get(tenant, num_tokens) for tenant in self._turns}

    def _queue(self, tenant: str | None) -> deque[Q]:
        if tenant not in self._queues:
            self._queues[tenant] = deque()
            self._turns.append(tenant)
        return self._queues[tenant]
