"""A client for streamed answers that costs little: pieces are noted as they arrive, and read once all have."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import httptools

from measure import Stream
from peer import PeerFailed

TIMEOUT_S = 300.0
Event = dict[str, Any]


class Body(asyncio.Protocol):
    """One response."""

    def __init__(self) -> None:
        self.sent_at = 0.0
        self.pieces: list[tuple[float, bytes]] = []
        self.status: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._parser = httptools.HttpResponseParser(self)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self.pieces.append((time.monotonic(), body))

    def on_message_complete(self) -> None:
        if not self.status.done():
            self.status.set_result(self._parser.get_status_code())

    def connection_lost(self, error: Exception | None) -> None:
        if not self.status.done():
            self.status.set_exception(PeerFailed(f"the connection ended early: {error}"))


def stream_all(
    port: int, path: str, bodies: list[dict[str, Any]], num_tokens_of: Callable[[Event], int]
) -> list[Stream]:
    """Send requests at the same time, each on a connection of its own.

    Raises:
        PeerFailed: an answer is not 200, or breaks off.
    """

    async def ask() -> list[Stream]:
        async with asyncio.timeout(TIMEOUT_S):
            return list(await asyncio.gather(*(_stream(port, path, body, num_tokens_of) for body in bodies)))

    try:
        return asyncio.run(ask())
    except (OSError, TimeoutError) as error:
        raise PeerFailed(f"{type(error).__name__}: {error}") from error


async def open_stream(port: int, path: str, encoded: bytes) -> tuple[asyncio.Transport, Body]:
    """Send a request on a connection of its own; the caller closes it."""
    transport, body = await asyncio.get_running_loop().create_connection(Body, "127.0.0.1", port)
    body.sent_at = time.monotonic()
    transport.write(
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(encoded)}\r\n\r\n".encode()
        + encoded
    )
    return transport, body


async def _stream(port: int, path: str, content: dict[str, Any], num_tokens_of: Callable[[Event], int]) -> Stream:
    encoded = json.dumps(content).encode()
    transport, body = await open_stream(port, path, encoded)
    try:
        status = await body.status
    finally:
        transport.close()
    if status != 200:
        raise PeerFailed(f"status {status}: {b''.join(piece for _, piece in body.pieces)[:500]!r}")
    return Stream(body.sent_at, token_times(body.pieces, num_tokens_of))


def token_times(pieces: list[tuple[float, bytes]], num_tokens_of: Callable[[Event], int]) -> list[float]:
    """Return when each token arrived: an event, which may come in several pieces, is there with its last one."""
    times: list[float] = []
    rest = b""
    for at, piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data: {"):
                times += [at] * num_tokens_of(json.loads(line[6:]))
    return times
