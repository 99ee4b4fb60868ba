"""Delivers usage records to their receiver over HTTP, at least once, beside everything else that a host does."""

from __future__ import annotations

import asyncio
import http.client
import logging
import random
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Protocol
from urllib.parse import urlsplit

from pilotlight.config import EventSettings
from pilotlight.errors import LedgerUnavailable
from pilotlight.metering.cloud_event import CONTENT_TYPE, cloud_event, delay_s
from pilotlight.metering.outbox import Buried, Delivered, DueEvent, Outcome, Postponed
from pilotlight.metering.record import utc_text

logger = logging.getLogger("pilotlight.courier")

BATCH_EVENTS = 100
IDLE_S = 0.5


class Outbox(Protocol):
    """Where events wait."""

    def due_events(self, url: str, now: float, limit: int) -> list[DueEvent]:
        """Return what has to be delivered now; may block."""

    async def settle_events(self, outcomes: Sequence[Outcome]) -> None:
        """Note what became of deliveries."""


class Courier:
    """One connection to one receiver."""

    def __init__(self, outbox: Outbox, settings: EventSettings) -> None:
        self._outbox = outbox
        self._settings = settings
        self._rng = random.Random()
        self._connection: http.client.HTTPConnection | None = None

    async def run(self) -> None:
        """Deliver what is due, until the task is cancelled. What is under way then is delivered again later."""
        try:
            while True:
                if await self._deliver_or_wait() == 0:
                    await asyncio.sleep(IDLE_S)
        finally:
            self.close()

    async def _deliver_or_wait(self) -> int:
        """Try what is due now; whatever goes wrong, this task must go on, since nobody would notice its end."""
        try:
            return await self.deliver()
        except LedgerUnavailable as error:
            logger.warning("usage events wait: %s", error.message)
        except Exception:
            logger.exception("usage events wait")
        return 0

    async def deliver(self) -> int:
        """Try what is due now, and return how much that was.

        Raises:
            LedgerUnavailable: the outbox cannot be read, or what became of the deliveries cannot be written.
        """
        due = await asyncio.to_thread(self._outbox.due_events, self._settings.url, time.time(), BATCH_EVENTS)
        if due:
            await self._outbox.settle_events(await asyncio.to_thread(self._try_all, due))
        return len(due)

    def _try_all(self, due: Sequence[DueEvent]) -> list[Outcome]:
        return [self._outcome(event, self._try(event)) for event in due]

    def _outcome(self, event: DueEvent, problem: str | None) -> Outcome:
        if problem is None:
            return Delivered(event.number)
        num_attempts = event.num_attempts + 1
        if num_attempts >= self._settings.max_attempts:
            logger.error("a usage event is given up after %s attempts: %s", num_attempts, problem)
            return Buried(event.number, utc_text(datetime.now(UTC)), problem)
        return Postponed(event.number, time.time() + delay_s(num_attempts, self._settings.first_retry_s, self._rng))

    def _try(self, event: DueEvent) -> str | None:
        """Send one event, and return what went wrong, if anything did."""
        body = cloud_event(event.record, self._settings.source)
        headers = {"content-type": CONTENT_TYPE}
        if self._settings.authorization:
            headers["authorization"] = self._settings.authorization
        url = urlsplit(self._settings.url)
        path = f"{url.path or '/'}{f'?{url.query}' if url.query else ''}"
        try:
            connection = self._open()
            connection.request("POST", path, body, headers)
            response = connection.getresponse()
            response.read()
        except (OSError, http.client.HTTPException) as error:
            self.close()
            return f"{type(error).__name__}: {error}"
        return None if 200 <= response.status < 300 else f"status {response.status}"

    def close(self) -> None:
        """Close the connection; the next delivery opens another one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _open(self) -> http.client.HTTPConnection:
        if self._connection is None:
            url = urlsplit(self._settings.url)
            kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
            self._connection = kind(url.hostname or "", url.port, timeout=self._settings.timeout_s)
        return self._connection
