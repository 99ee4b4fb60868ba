"""A client for streamed answers that costs little, since it shares the cores with the server that it measures.

Bytes are noted as they arrive, and read as HTTP and as events once all have.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import httptools
import uvloop

from measure import Stream
from peer import PeerFailed

TIMEOUT_S = 300.0
Event = dict[str, Any]


class Exchange(asyncio.Protocol):
    """A request, and what came over its connection until the other side closed it."""

    def __init__(self) -> None:
        self.sent_at = 0.0
        self.received: list[tuple[float, bytes]] = []
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        self.received.append((time.monotonic(), data))

    def connection_lost(self, error: Exception | None) -> None:
        self.closed.set_result(None)


class Response:
    """A response, when its request was sent, and when each piece of its body arrived."""

    def __init__(self, exchange: Exchange) -> None:
        self.sent_at = exchange.sent_at
        self.pieces: list[tuple[float, bytes]] = []
        self.is_complete = False
        self._at = 0.0
        parser = httptools.HttpResponseParser(self)
        for self._at, data in exchange.received:
            parser.feed_data(data)
        self.status: int = parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self.pieces.append((self._at, body))

    def on_message_complete(self) -> None:
        self.is_complete = True


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
        return uvloop.run(ask())
    except (OSError, TimeoutError) as error:
        raise PeerFailed(f"{type(error).__name__}: {error}") from error


async def exchange(port: int, path: str, encoded: bytes) -> Response:
    """Send a request on a connection of its own, and return the response when it is over.

    Raises:
        PeerFailed: it breaks off.
    """
    transport, ours = await asyncio.get_running_loop().create_connection(Exchange, "127.0.0.1", port)
    try:
        ours.sent_at = time.monotonic()
        transport.write(
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(encoded)}\r\n\r\n".encode()
            + encoded
        )
        await ours.closed
    finally:
        transport.close()
    response = Response(ours)
    if not response.is_complete:
        raise PeerFailed("the connection ended early")
    return response


async def _stream(port: int, path: str, content: dict[str, Any], num_tokens_of: Callable[[Event], int]) -> Stream:
    response = await exchange(port, path, json.dumps(content).encode())
    if response.status != 200:
        raise PeerFailed(f"status {response.status}: {b''.join(piece for _, piece in response.pieces)[:500]!r}")
    return Stream(response.sent_at, token_times(response.pieces, num_tokens_of))


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
