"""A toy function behind a real socket, in a thread of its own, and what a man in the middle can do to its bodies."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pilotlight.artifact import Artifact
from support import PATIENCE_S, serving

Wrap = Callable[[ASGIApp], ASGIApp]
Change = Callable[[list[bytes]], list[bytes]]


def frames_of(body: bytes) -> list[bytes]:
    """Cut a body into frames with their lengths."""
    found = []
    while body:
        size = 4 + int.from_bytes(body[:4])
        found.append(body[:size])
        body = body[size:]
    return found


def flipped(number: int, at: int = 10) -> Change:
    """Return what flips one bit of one frame."""

    def change(frames: list[bytes]) -> list[bytes]:
        place = number % len(frames)
        altered = bytearray(frames[place])
        altered[at] ^= 4
        return [*frames[:place], bytes(altered), *frames[place + 1 :]]

    return change


@dataclass
class Middle:
    """Middleware that sees everything that goes over the wire, and changes the frames of encrypted bodies.

    ``flipped_header`` names one, of the request or of the response, in which one bit is changed.
    """

    change_request: Change = lambda frames: frames
    change_response: Change = lambda frames: frames
    flipped_header: str = ""
    requests: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    responses: list[bytes] = field(default_factory=list)

    def around(self, app: ASGIApp) -> ASGIApp:
        async def handle(scope: Scope, receive: Receive, send: Send) -> None:
            headers = {name.decode(): value.decode() for name, value in scope.get("headers", ())}
            if scope["type"] != "http" or "ehbp-encapsulated-key" not in headers:
                await app(scope, receive, send)
                return
            body = await _read(receive)
            self.requests.append((headers, body))
            changed = [b"".join(self.change_request(frames_of(body)))]

            async def give() -> Message:
                if changed:
                    return {"type": "http.request", "body": changed.pop(), "more_body": False}
                return await receive()

            await app({**scope, "headers": self._flipped(scope["headers"])}, give, self._answering(send))

        return handle

    def _flipped(self, headers: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """Change one hex digit of a header: 0 and 1 are one bit apart."""
        flip = self.flipped_header.encode()
        return [(name, (b"0" if v[:1] != b"0" else b"1") + v[1:] if name == flip else v) for name, v in headers]

    def _answering(self, send: Send) -> Send:
        kept: list[bytes] = []
        sealed: list[bool] = []

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                sealed.append(any(name == b"ehbp-response-nonce" for name, _ in message["headers"]))
                message = {**message, "headers": self._flipped(message["headers"])}
            elif sealed[0]:
                kept.append(message.get("body", b""))
                if message.get("more_body", False):
                    return
                whole = b"".join(kept)
                self.responses.append(whole)
                message = {**message, "body": b"".join(self.change_response(frames_of(whole)))}
            await send(message)

        return answer


async def _read(receive: Receive) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return bytes(body)


@contextmanager
def served(
    artifact: Artifact, directory: Path, middleware: Sequence[Wrap], outside: Wrap = lambda app: app
) -> Iterator[str]:
    """Serve a toy function until the block is left; yields the base URL. ``outside`` is between it and the network."""
    ready: list[str] = []
    started = threading.Event()
    loop_of: list[tuple[asyncio.AbstractEventLoop, uvicorn.Server]] = []

    async def main() -> None:
        async with serving(artifact, directory, middleware=middleware) as running:
            config = uvicorn.Config(outside(running.app), port=0, log_config=None, lifespan="off")
            server = uvicorn.Server(config)
            loop_of.append((asyncio.get_running_loop(), server))
            serve = asyncio.create_task(server.serve())
            while not server.started:
                await asyncio.sleep(0.01)
            ready.append(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}")
            started.set()
            await serve

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    assert started.wait(PATIENCE_S)
    try:
        yield ready[0]
    finally:
        loop, server = loop_of[0]
        loop.call_soon_threadsafe(setattr, server, "should_exit", True)
        thread.join(PATIENCE_S)
