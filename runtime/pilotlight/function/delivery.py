"""What tokens add to answers, on its way to clients: held back until one write has noted all tokens of their step."""

from __future__ import annotations

import asyncio
from typing import Protocol

from pilotlight.errors import LedgerUnavailable
from pilotlight.function.contracts import UsageLedger
from pilotlight.metering.marks import Mark


class HeldBack(Protocol):
    """An invocation with something that has to be noted before it is delivered."""

    @property
    def mark(self) -> Mark:
        """What the invocation has used, with what is held back."""

    def deliver(self) -> None:
        """Pass on what is held back: it is noted."""

    def end_unmetered(self, error: LedgerUnavailable) -> None:
        """End the invocation, since what is held back cannot be noted."""


class Deliveries:
    """What is held back of a function's answers. Source: docs/decisions/0011-marks-before-delivery.md."""

    def __init__(self, ledger: UsageLedger) -> None:
        self._ledger = ledger
        self._held: dict[str, HeldBack] = {}

    def hold(self, request_id: str, held: HeldBack) -> None:
        """Deliver this once it is noted, together with all that is held back before the event loop goes on."""
        if not self._held:
            asyncio.get_running_loop().call_soon(self.release)
        self._held[request_id] = held

    def release(self) -> None:
        """Note what is held back, by one write, and deliver it."""
        held, self._held = self._held, {}
        if not held:
            return
        try:
            self._ledger.note({request_id: one.mark for request_id, one in held.items()})
        except LedgerUnavailable:
            for request_id, one in held.items():
                self._release_alone(request_id, one)
        else:
            for one in held.values():
                one.deliver()

    def _release_alone(self, request_id: str, held: HeldBack) -> None:
        """Deliver what can be noted by itself: what cannot may be the fault of one invocation."""
        try:
            self._ledger.note({request_id: held.mark})
        except LedgerUnavailable as error:
            held.end_unmetered(error)
        else:
            held.deliver()
