"""A process that writes a ledger until it is killed: ``doomed_host.py LEDGER [open|checkpoint|work]``.

It prints a line for every step that the ledger has acknowledged.
"""

import asyncio
import os
import signal
import sys

from pilotlight.metering.database import located
from pilotlight.metering.opening import open_ledger
from pilotlight.metering.prices import PriceTable
from pilotlight.metering.record import Admission, final_record
from pilotlight.metering.sql_ledger import SqlLedger
from pilotlight.metering.usage import Timings, Usage
from pilotlight.request import FinishReason

NUM_WORKERS = 16


def admission(request_id: str) -> Admission:
    return Admission(
        request_id=request_id,
        function="demo",
        artifact_digest="sha256:1",
        precision="fp32",
        provider="cpu",
        replica_id="replica-1",
        started_at_utc="2026-11-22T12:00:00.000000Z",
        prices=PriceTable.from_config({"completion_per_million_tokens": "1000000"}),
    )


async def die_after_checkpoints(ledger: SqlLedger) -> None:
    await ledger.admit(admission("early"))
    await ledger.admit(admission("late"))
    await ledger.checkpoint("late", Usage(4, completion_tokens=1))
    await ledger.checkpoint("late", Usage(4, completion_tokens=2))
    os.kill(os.getpid(), signal.SIGKILL)


async def work_for_ever(ledger: SqlLedger) -> None:
    await asyncio.gather(*(_invoke_for_ever(ledger, worker) for worker in range(NUM_WORKERS)))


async def _invoke_for_ever(ledger: SqlLedger, worker: int) -> None:
    number = 0
    while True:
        admitted = admission(f"{worker}-{number}")
        await ledger.admit(admitted)
        _print("admitted", admitted)
        await ledger.finish(final_record(admitted, Usage(), Timings(), FinishReason.STOP))
        _print("finished", admitted)
        number += 1


def _print(step: str, admitted: Admission) -> None:
    os.write(sys.stdout.fileno(), f"{step} {admitted.request_id}\n".encode())


def main(location: str, mode: str) -> None:
    ledger = open_ledger(located(location), cache_dir=os.environ["TEST_CACHE_DIR"])
    if mode == "checkpoint":
        asyncio.run(die_after_checkpoints(ledger))
    elif mode == "work":
        asyncio.run(work_for_ever(ledger))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
