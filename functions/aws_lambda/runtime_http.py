"""HTTP/1.1 as the Lambda Runtime API speaks it: one connection a call, requests whole or in chunks with trailers.

The standard library's client blocks and sends no trailers, and every other client would be paid for at a cold start.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import closing
from dataclasses import dataclass

MAX_HEAD_BYTES = 1 << 20
"""An invocation's trace and client context travel in headers, so these are larger than usual."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What the Runtime API answered; header names are lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Upload:
    """A request whose body is sent chunk by chunk while it comes into being."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def write(self, data: bytes) -> None:
        """Send one chunk; empty data is none.

        Raises:
            OSError: the other side has closed the connection.
        """
        if self._reader.at_eof():
            raise ConnectionResetError("the Runtime API has closed the connection")
        if data:
            self._writer.write(b"%x\r\n%b\r\n" % (len(data), data))
            await self._writer.drain()

    async def finish(self, trailers: Mapping[str, str]) -> Reply:
        """End the body, return the answer and close.

        Raises:
            OSError: the connection broke.
        """
        with closing(self._writer):
            self._writer.write(b"0\r\n%b\r\n" % _header_lines(trailers))
            await self._writer.drain()
            return await _read_reply(self._reader)

    def close(self) -> None:
        """Close the connection, wherever the body is."""
        self._writer.close()


async def call(address: str, method: str, path: str, headers: Mapping[str, str], body: bytes = b"") -> Reply:
    """Send a whole request and return the answer, however long that takes to come.

    Raises:
        OSError: the connection could not be made, or it broke.
    """
    reader, writer = await _connect(address)
    with closing(writer):
        writer.write(_head(address, method, path, {**headers, "Content-Length": str(len(body))}) + body)
        await writer.drain()
        return await _read_reply(reader)


async def upload(address: str, path: str, headers: Mapping[str, str]) -> Upload:
    """Begin a POST in chunks.

    Raises:
        OSError: the connection could not be made.
    """
    reader, writer = await _connect(address)
    writer.write(_head(address, "POST", path, {**headers, "Transfer-Encoding": "chunked"}))
    return Upload(reader, writer)


async def _connect(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = address.rpartition(":")
    return await asyncio.open_connection(host, int(port), limit=MAX_HEAD_BYTES)


def _head(address: str, method: str, path: str, headers: Mapping[str, str]) -> bytes:
    fixed = {"Host": address, "Connection": "close"}
    return f"{method} {path} HTTP/1.1\r\n".encode() + _header_lines({**fixed, **headers}) + b"\r\n"


def _header_lines(headers: Mapping[str, str]) -> bytes:
    return "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode("latin-1")


async def _read_reply(reader: asyncio.StreamReader) -> Reply:
    try:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {}
        for line in lines[1:-2]:
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        return Reply(int(lines[0].split()[1]), headers, await _read_body(reader, headers))
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError, IndexError) as error:
        raise ConnectionError(f"the Runtime API broke off its answer ({error})") from error


async def _read_body(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> bytes:
    if headers.get("transfer-encoding", "").lower() == "chunked":
        return b"".join([chunk async for chunk in _chunks(reader)])
    if "content-length" in headers:
        return await reader.readexactly(int(headers["content-length"]))
    return await reader.read()


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while num_bytes := int((await reader.readline()).partition(b";")[0], 16):
        yield (await reader.readexactly(num_bytes + 2))[:-2]
