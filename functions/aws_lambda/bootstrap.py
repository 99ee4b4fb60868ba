"""The entry point of the Lambda function's image: ``python bootstrap.py``, with PILOTLIGHT_ARTIFACT set.

Everything that takes time is imported and opened inside ``_start``, so that whatever fails there reaches the platform
as an init error and not as a process that ended without a word.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from logs import log_as_json, write_line
from runtime_client import Failure, RuntimeClient
from stages import Stages

if TYPE_CHECKING:
    from lambda_settings import LambdaSettings
    from service import Service


logger = logging.getLogger("pilotlight.aws_lambda")


def main() -> int:
    """Serve invocations until the platform ends the process. Returns the exit status."""
    address = os.environ.get("AWS_LAMBDA_RUNTIME_API")
    if address is None:
        print("bootstrap: AWS_LAMBDA_RUNTIME_API is not set; this program runs inside AWS Lambda", file=sys.stderr)
        return 1
    log_as_json()
    return asyncio.run(_serve(RuntimeClient(address)))


async def _serve(client: RuntimeClient) -> int:
    try:
        settings, service = await _start(client)
    except Exception as error:  # noqa: BLE001 - the platform has to learn of every failure
        await client.report_init_error(_logged(error))
        return 1
    if settings.has_snapshots and not await _restore(client, service):
        return 1
    await _run_until_terminated(service)
    return 0


async def _start(client: RuntimeClient) -> tuple[LambdaSettings, Service]:
    stages = Stages()
    from lambda_settings import load_lambda_settings
    from service import Service

    stages.end("import")
    settings = load_lambda_settings()
    service = Service(settings, client, stages)
    if settings.has_snapshots:
        await service.warm_up()
        stages.end("warm_up")
    total_ms = service.function.cold_start_ms
    write_line({"event": "started", "function": settings.name, **stages.durations_ms, "total_ms": total_ms})
    return settings, service


async def _restore(client: RuntimeClient, service: Service) -> bool:
    """Have the snapshot taken, then go on as the copy that was restored from it; False when that failed."""
    await client.wait_for_restore()
    try:
        service.restored()
    except Exception as error:  # noqa: BLE001 - as above
        await client.report_restore_error(_logged(error))
        return False
    write_line({"event": "restored", "replica_id": service.function.replica_id})
    return True


async def _run_until_terminated(service: Service) -> None:
    task = asyncio.ensure_future(service.run())
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    with suppress(asyncio.CancelledError):
        await task


def _logged(error: Exception) -> Failure:
    """Log why nothing can be served, in one line where it is no defect of ours."""
    from pilotlight.errors import PilotlightError

    logger.error("%s", error, exc_info=None if isinstance(error, PilotlightError) else error)
    return Failure(f"Pilotlight.{type(error).__name__}", str(error))


if __name__ == "__main__":
    sys.exit(main())
