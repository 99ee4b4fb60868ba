"""Many streaming clients in one process, on plain sockets: a client library would be the bottleneck."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit


@dataclass
class Stream:
    """What one client got."""

    request_id: str
    status: int = 0
    retry_after: str | None = None
    token_ids: list[int] = field(default_factory=list)
    usage: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    done: bool = False


async def stream(url: str, request_id: str, body: dict[str, Any]) -> Stream:
    """Send one streamed request on a connection of its own and read its answer to the end."""
    found = Stream(request_id)
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        payload = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: test\r\nconnection: close\r\ncontent-type: application/json\r\n"
            + f"x-request-id: {request_id}\r\ncontent-length: {len(payload)}\r\n\r\n".encode()
            + payload
        )
        await _read(reader, found)
    finally:
        writer.close()
    return found


async def _read(reader: asyncio.StreamReader, found: Stream) -> None:
    found.status = int((await reader.readline()).split()[1])
    while line := (await reader.readline()).strip():
        name, _, value = line.decode().partition(":")
        if name.lower() == "retry-after":
            found.retry_after = value.strip()
    while line := await reader.readline():
        if line == b"data: [DONE]\n":
            found.done = True
        elif line.startswith(b"data: {"):
            event = json.loads(line[6:])
            found.error = event.get("error", found.error)
            found.usage = event.get("usage") or found.usage
            for choice in event.get("choices", ()):
                found.token_ids += choice.get("token_ids", ())
