"""What a function needs of the world: where sequences run, where records are kept, what they cost, who looks on."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items
from typing import Protocol

from pilotlight.mailbox import TokenStream
from pilotlight.metering.idempotency import Claim
from pilotlight.metering.limits import Admitted
from pilotlight.metering.marks import Mark
from pilotlight.metering.prices import PriceTable
from pilotlight.metering.record import Admission, UsageRecord
from pilotlight.metering.usage import Usage
from pilotlight.request import Sequence, Signals


class Backend(Protocol):
    """Where sequences are generated: the engine in this process, or a pool of replicas."""

    def submit(self, sequence: Sequence) -> TokenStream:
        """Reserve a place at once and return the events; the last one carries a finish reason."""

    def abort(self, sequence_id: str) -> None:
        """Have a sequence end as cancelled before the next step."""

    def signals(self) -> Signals:
        """Return the load after the last step."""

    async def close(self) -> None:
        """Cancel what runs and deliver the last events."""


class UsageLedger(Protocol):
    """Where admissions, checkpoints and records are kept: SQLite on a host, DynamoDB on Lambda."""

    checkpoint_tokens: int
    """About how many tokens lie between two checkpoints: what a crash can leave unbilled, unless notes outlive it."""

    async def admit(self, admission: Admission, claim: Claim | None = None) -> Admitted:
        """Open an invocation, whose request id and claim must be new, within the limits of its key."""

    def note(self, marks: Mapping[str, Mark]) -> None:
        """Note what open invocations have used so far, before any of it is delivered; must not block."""

    async def checkpoint(self, request_id: str, usage: Usage) -> None:
        """Note what an open invocation has used so far."""

    async def finish(self, record: UsageRecord) -> None:
        """End an open invocation by its one record."""

    def get(self, request_id: str) -> UsageRecord | None:
        """Return the record of a finished invocation; may block."""

    def receipt(self, request_id: str) -> str | None:
        """Return the signed record of a finished invocation, where records are signed; may block."""


class Prices(Protocol):
    """What a function costs over time: a table, or a schedule of them."""

    @property
    def tables(self) -> Items[PriceTable]:
        """All tables, in the order in which they hold."""

    def at(self, started_at_utc: str) -> PriceTable:
        """Return the table that holds at an instant, as records write it."""


class Observer(Protocol):
    """Told what happens, for metrics; it must not block."""

    def token(self, function: str, gap_s: float | None) -> None:
        """One token was generated, ``gap_s`` after its predecessor (None for the first)."""

    def finished(self, record: UsageRecord) -> None:
        """An invocation's record was committed."""


class Unobserved:
    """The observer of a function that nobody watches."""

    def token(self, function: str, gap_s: float | None) -> None:
        pass

    def finished(self, record: UsageRecord) -> None:
        pass
