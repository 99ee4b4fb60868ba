"""``pilotlight`` with a ledger that meters nothing, for ``metering.py``: what a metered server is compared with."""

from __future__ import annotations

from collections.abc import Mapping

from pilotlight.cli import main
from pilotlight.host import server
from pilotlight.metering.database import Location
from pilotlight.metering.idempotency import Claim
from pilotlight.metering.ledger import Ledger
from pilotlight.metering.limits import Admitted
from pilotlight.metering.marks import Mark
from pilotlight.metering.record import Admission, UsageRecord
from pilotlight.metering.signing import Signer
from pilotlight.metering.usage import Usage


class Unmetered(Ledger):
    """Writes nothing of any invocation."""

    checkpoint_tokens = 1_000_000

    async def admit(self, admission: Admission, claim: Claim | None = None) -> Admitted:
        return Admitted()

    def note(self, marks: Mapping[str, Mark]) -> None:
        pass

    async def checkpoint(self, request_id: str, usage: Usage) -> None:
        pass

    async def finish(self, record: UsageRecord) -> None:
        pass


def open_unmetered(location: Location, signer: Signer | None = None, cache_dir: str = "") -> Ledger:
    """Open a ledger as the server does."""
    assert not isinstance(location, str)
    return Unmetered(location, signer)


if __name__ == "__main__":
    server.open_ledger = open_unmetered
    main()
