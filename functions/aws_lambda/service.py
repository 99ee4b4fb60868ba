"""The one function that a Lambda process serves, from its artifact to its application."""

from __future__ import annotations

import logging
import random
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from emf import EmfMetrics
from handler import Handler, poll_all
from lambda_settings import LambdaSettings
from pilotlight.api.app import Api
from pilotlight.api.response_store import ResponseStore
from pilotlight.api.resumption import resume_tokens
from pilotlight.config import FunctionSettings
from pilotlight.function import UsageLedger
from pilotlight.host.inprocess import open_function
from pilotlight.metering.dynamodb_ledger import DynamoDbLedger
from pilotlight.request import Sequence
from runtime_client import RuntimeClient
from stages import Stages

if TYPE_CHECKING:
    from pilotlight.metering.dynamodb_keys import DynamoDbKeyring

logger = logging.getLogger("pilotlight.aws_lambda")

IN_S3 = "s3://"
WARM_UP = Sequence("warm-up", prompt_ids=(0,), max_new_tokens=2)


class Service:
    """A loaded function and what answers for it."""

    def __init__(self, settings: LambdaSettings, client: RuntimeClient, stages: Stages) -> None:
        """Open the ledger and load the function, on the running event loop.

        Raises:
            StartupError: the ledger or the artifact cannot be opened, or a setting does not fit.
        """
        metrics = EmfMetrics()
        function = _with_artifact_here(settings.function)
        stages.end("fetch")
        ledger = self._ledger = _open_ledger(settings)
        stages.end("ledger")
        self.function = open_function(settings.name, function, settings.host, ledger, metrics)
        stages.end("function")
        metrics.watch({settings.name: self.function})
        responses = ResponseStore.open(settings.host)
        self._keyring = _open_keyring(settings)
        app = Api(
            {settings.name: self.function},
            ledger,
            metrics,
            settings.host.max_body_bytes,
            responses,
            self._keyring,
            resume_tokens=resume_tokens(settings.host),
        ).app()
        self._handler = Handler(client, app, self.function, settings.url_reading)
        self._num_pollers = settings.num_pollers

    async def warm_up(self) -> None:
        """Generate something unmetered, so that a snapshot holds every page that generating touches."""
        async for _ in self.function.backend.submit(WARM_UP):
            pass

    def restored(self) -> None:
        """Go on in a copy that was restored from a snapshot.

        Raises:
            ConfigError: the ledger cannot be used.
        """
        random.seed()  # no copy may draw what another one draws; seeds of answers come from the system anyway
        self.function.restored()
        if isinstance(self._ledger, DynamoDbLedger):
            self._ledger.reconnect()
        if self._keyring is not None:
            self._keyring.reconnect()

    async def run(self) -> None:
        """Answer invocations until the task is cancelled, and then end what runs, with its records.

        Raises:
            ExceptionGroup: the Runtime API is gone.
        """
        try:
            await poll_all(self._handler, self._num_pollers)
        finally:
            await self.function.close()


def _with_artifact_here(function: FunctionSettings) -> FunctionSettings:
    """Return the function with its artifact in this sandbox: that of the image, or one that is fetched now."""
    if not function.artifact.startswith(IN_S3):
        return function
    from s3_artifact import Place, fetch

    here = fetch(Place.parse(function.artifact), Path(tempfile.gettempdir()) / "pilotlight-artifacts")
    return msgspec.structs.replace(function, artifact=str(here))


def _open_keyring(settings: LambdaSettings) -> DynamoDbKeyring | None:
    """Return where keys are looked up; None where the platform alone decides who may call."""
    if not settings.requires_keys:
        return None
    from pilotlight.metering.dynamodb_keys import DynamoDbKeyring

    assert settings.ledger_table is not None
    return DynamoDbKeyring(settings.ledger_table)


def _open_ledger(settings: LambdaSettings) -> UsageLedger:
    if settings.ledger_table is not None:
        return DynamoDbLedger(settings.ledger_table, settings.name, settings.environment)
    logger.warning("PILOTLIGHT_LEDGER_TABLE is not set: the usage records are lost together with this sandbox")
    from pilotlight.metering.ledger import Ledger

    return Ledger(Path(settings.host.ledger))
