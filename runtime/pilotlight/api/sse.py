"""Server-sent events, and what happens when their reader leaves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pilotlight.api.errors import error_body
from pilotlight.errors import PilotlightError
from pilotlight.function import Invocation

TERMINATOR = "[DONE]"
DONE = f"data: {TERMINATOR}\n\n".encode()
COMMENT = b": ping\n\n"
PING_AFTER_S = 15.0
PING_BEFORE_FIRST_TOKEN_S = 1.0
"""Proxies close connections on which nothing happens; while nothing is generated, a ping does."""

STRAIGHT_SEND = "pilotlight.send"
"""Where a scope has the server's own ``send``, which middleware has not wrapped: frames need nothing that they do."""

_encoder = msgspec.json.Encoder()


def frame(payload: msgspec.Struct) -> bytes:
    """Return one data frame."""
    return b"data: %b\n\n" % _encoder.encode(payload)


def event_frame(event: msgspec.Struct) -> bytes:
    """Return the frame of a typed event, under its own name."""
    return b"event: %b\ndata: %b\n\n" % (str(event.__struct_config__.tag).encode(), _encoder.encode(event))


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

    def __init__(self, invocation: Invocation, frames: AsyncIterator[bytes], ping: bytes = COMMENT) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._invocation = invocation
        self._frames = frames
        self._ping = ping
        self._sending = False
        self._sent_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with cancelled_on_disconnect(self._invocation, receive):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            send_frame: Send = scope.get(STRAIGHT_SEND, send)
            pinging = asyncio.create_task(self._keep_alive(send_frame))
            try:
                async for body in self._frames:
                    self._sending = True
                    await send_frame({"type": "http.response.body", "body": body, "more_body": True})
                    self._sending = False
                    self._sent_at = time.monotonic()
            finally:
                pinging.cancel()
            scope.setdefault("state", {})["failure"] = self._invocation.failure
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _keep_alive(self, send: Send) -> None:
        while True:
            # A start may take long, and clients and proxies give up on a connection that says nothing.
            pause_s = PING_AFTER_S if self._invocation.num_delivered_tokens else PING_BEFORE_FIRST_TOKEN_S
            await asyncio.sleep(pause_s)
            if time.monotonic() - self._sent_at >= pause_s and not self._sending:
                await send({"type": "http.response.body", "body": self._ping, "more_body": True})
                self._sent_at = time.monotonic()
