"""The memory that all functions of a host share, and the clock tick that they all get."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from enum import Enum
from typing import Protocol

from pilotlight.host.memory import Idle, evictions, machine_bytes

logger = logging.getLogger("pilotlight.host")

TICK_S = 1.0


class Room(Enum):
    """The answer to a wish for memory: taken, or once others have left, or not on this machine."""

    TAKEN = "taken"
    LATER = "later"
    NEVER = "never"


class Tenant(Protocol):
    """Whoever has processes on this machine."""

    def idle(self) -> list[Idle]:
        """Return the processes that could leave."""

    def evict(self, name: str) -> None:
        """Let one of them go."""

    def act(self) -> None:
        """Look again at what can be done."""

    def tick(self) -> None:
        """A second has passed."""


def on_running_loop(callback: Callable[[], None]) -> None:
    asyncio.get_running_loop().call_soon(callback)


class Machine:
    """Admits processes by memory before they are made."""

    def __init__(
        self,
        budget_bytes: int = 0,
        free_bytes: Callable[[], int] = machine_bytes,
        call_soon: Callable[[Callable[[], None]], None] = on_running_loop,
    ) -> None:
        """Take ``budget_bytes`` for all processes together, or most of what is free now where that is 0."""
        self.budget_bytes = budget_bytes or free_bytes()
        self._free_bytes = free_bytes
        self._call_soon = call_soon
        self._taken: dict[str, int] = {}
        self._leaving: set[str] = set()
        self._tenants: list[Tenant] = []

    @property
    def taken_bytes(self) -> int:
        return sum(self._taken.values())

    def join(self, tenant: Tenant) -> None:
        self._tenants.append(tenant)

    def leave(self, tenant: Tenant) -> None:
        self._tenants.remove(tenant)

    def take(self, name: str, num_bytes: int) -> Room:
        """Take memory for a process, or have idle ones leave for it."""
        missing_bytes = num_bytes - min(self.budget_bytes - self.taken_bytes, self._free_bytes())
        if missing_bytes <= 0:
            self._taken[name] = num_bytes
            return Room.TAKEN
        if num_bytes > self.budget_bytes or not self._taken:
            return Room.NEVER
        missing_bytes -= sum(self._taken[leaving] for leaving in self._leaving)
        owners = {one.name: (tenant, one) for tenant in self._tenants for one in tenant.idle()}
        idle = [one for name, (_, one) in owners.items() if name not in self._leaving]
        for one in evictions(missing_bytes, idle) or ():
            self._leaving.add(one.name)
            owners[one.name][0].evict(one.name)
        return Room.LATER

    def fits(self, num_bytes: int) -> bool:
        """Say whether so much could be taken now without anybody leaving."""
        return num_bytes <= min(self.budget_bytes - self.taken_bytes, self._free_bytes())

    def has_room(self, num_bytes: int, beside: Tenant) -> bool:
        """Say whether so much could be taken if everybody idle but ``beside`` left."""
        missing_bytes = num_bytes - min(self.budget_bytes - self.taken_bytes, self._free_bytes())
        idle = [one for tenant in self._tenants if tenant is not beside for one in tenant.idle()]
        return evictions(missing_bytes, idle) is not None

    def release(self, name: str) -> None:
        """Give back what a process took; others may act on it."""
        self._leaving.discard(name)
        if self._taken.pop(name, None) is not None:
            self._call_soon(self._all_act)

    async def run(self) -> None:
        """Tick until cancelled."""
        while True:
            await asyncio.sleep(TICK_S)
            self.tick()

    def tick(self) -> None:
        """Tell every tenant that a second has passed. A defect in one does not stop the clock for the others."""
        for tenant in list(self._tenants):
            try:
                tenant.tick()
            except Exception:
                logger.exception("a function's second was lost")

    def _all_act(self) -> None:
        for tenant in list(self._tenants):
            tenant.act()
