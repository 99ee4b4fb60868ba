"""Server-sent events, and what happens when their reader leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pilotlight.api.errors import error_body
from pilotlight.errors import PilotlightError
from pilotlight.function import Invocation

DONE = b"data: [DONE]\n\n"
_encoder = msgspec.json.Encoder()


def frame(payload: dict[str, Any]) -> bytes:
    """Return one data frame."""
    return b"data: %b\n\n" % _encoder.encode(payload)


def error_frame(error: PilotlightError) -> bytes:
    """Return the frame after which a broken stream is closed, without the terminator."""
    return b"data: %b\n\n" % error_body(error)


@asynccontextmanager
async def cancelled_on_disconnect(invocation: Invocation, receive: Receive) -> AsyncIterator[None]:
    """Cancel the invocation when its client leaves, or when the block is left in any other way before its end."""
    watcher = asyncio.create_task(_cancel_when_gone(invocation, receive))
    try:
        yield
    finally:
        watcher.cancel()
        invocation.cancel()


async def _cancel_when_gone(invocation: Invocation, receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    invocation.cancel()


class EventStream(Response):
    """Streams an invocation's frames; a client that leaves ends the generation, not the metering.

    What made the invocation fail is left in the scope's state, for a server that has more than frames to tell it.
    """

    media_type = "text/event-stream"

    def __init__(self, invocation: Invocation, frames: AsyncIterator[bytes]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._invocation = invocation
        self._frames = frames

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with cancelled_on_disconnect(self._invocation, receive):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for body in self._frames:
                await send({"type": "http.response.body", "body": body, "more_body": True})
            scope.setdefault("state", {})["failure"] = self._invocation.failure
            await send({"type": "http.response.body", "body": b"", "more_body": False})
