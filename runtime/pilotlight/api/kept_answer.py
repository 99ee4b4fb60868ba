"""An answer that outlives its connection: written once, read by any number of clients, now or a little later."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import AsyncIterator, Mapping
from typing import Self

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pilotlight.api.sse import PING_AFTER_S
from pilotlight.errors import IdempotencyConflict


class Head(msgspec.Struct, frozen=True):
    """The start of a response; the pieces of a stream are events, which get ids when they are sent.

    A stream on which nothing happens sends ``ping`` now and then.
    """

    status: int
    headers: dict[str, str]
    is_stream: bool
    ping: bytes = b""


class _Whole(msgspec.Struct, frozen=True, array_like=True):
    head: Head
    pieces: list[bytes]


class KeptAnswer:
    """Pieces in order, and their end. Piece numbers begin with 1; what is read may be dropped when memory is short."""

    def __init__(self, request_id: str, fingerprint: str, key_id: str | None) -> None:
        self.request_id = request_id
        self.fingerprint = fingerprint
        self.key_id = key_id
        self.head: Head | None = None
        self.ended = False
        self.num_bytes = 0
        self.num_dropped = 0
        self._pieces: list[bytes] = []
        self._positions: dict[object, int] = {}
        self._changed = asyncio.Event()

    @property
    def is_stream(self) -> bool:
        return self.head is not None and self.head.is_stream

    @property
    def num_readers(self) -> int:
        return len(self._positions)

    def begin(self, head: Head) -> None:
        self.head = head

    def add(self, piece: bytes) -> None:
        self._pieces.append(piece)
        self.num_bytes += len(piece)
        self._wake()

    def end(self) -> None:
        self.ended = True
        self._wake()

    def drop_read(self) -> int:
        """Drop what every present reader has, and return how many bytes that were; nobody can read them any more."""
        num_read = min(self._positions.values(), default=self.num_dropped) - self.num_dropped
        num_bytes = sum(map(len, self._pieces[:num_read]))
        self.num_bytes -= num_bytes
        self.num_dropped += num_read
        del self._pieces[:num_read]
        return num_bytes

    async def read(self, after: int) -> AsyncIterator[tuple[int, bytes]]:
        """Yield the pieces after the ``after``-th with their numbers, as they come.

        Raises:
            IdempotencyConflict: some of them were dropped.
        """
        reader = object()
        self.check(after)
        self._positions[reader] = after
        try:
            while True:
                changed = self._changed
                while self._positions[reader] < self.num_dropped + len(self._pieces):
                    number = self._positions[reader]
                    piece = self._pieces[number - self.num_dropped]
                    yield number + 1, piece
                    self._positions[reader] = number + 1
                if self.ended:
                    return
                await changed.wait()
        finally:
            del self._positions[reader]

    def check(self, after: int) -> None:
        """Refuse to read what was dropped, or what never was.

        Raises:
            IdempotencyConflict: see above.
        """
        if not self.num_dropped <= after <= self.num_dropped + len(self._pieces):
            raise IdempotencyConflict(f"the answer of {self.request_id!r} is not kept from event {after} on")

    def encoded(self) -> bytes | None:
        """Return the complete answer for a ledger; None when parts of it were dropped."""
        if self.num_dropped or self.head is None:
            return None
        return zlib.compress(msgspec.msgpack.encode(_Whole(self.head, self._pieces)), level=1)

    @classmethod
    def decoded(cls, request_id: str, fingerprint: str, key_id: str | None, content: bytes) -> Self:
        """Return an answer as ``encoded`` wrote it."""
        whole = msgspec.msgpack.decode(zlib.decompress(content), type=_Whole)
        answer = cls(request_id, fingerprint, key_id)
        answer.begin(whole.head)
        for piece in whole.pieces:
            answer.add(piece)
        answer.end()
        return answer

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class KeptResponse(Response):
    """Sends a kept answer from some event on; a client that leaves ends the sending and nothing else.

    The status is known when the first piece is there: a stream's at once, that of a whole answer when it is complete.
    """

    def __init__(self, answer: KeptAnswer, after: int, headers: Mapping[str, str]) -> None:
        super().__init__()
        self._answer = answer
        self._after = after
        self._extra = headers
        self._started = False
        self._sending = asyncio.Lock()
        self._sent_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._send(send))
        pinging = asyncio.create_task(self._keep_alive(send))
        leaving = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, pinging, leaving):
                task.cancel()
            await asyncio.gather(sending, pinging, leaving, return_exceptions=True)

    async def _send(self, send: Send) -> None:
        async for number, piece in self._answer.read(self._after):
            if not self._started:
                await self._start(send)
            event = b"id: %b:%d\n%b" % (self._answer.request_id.encode(), number, piece)
            await self._send_body(send, event if self._answer.is_stream else piece)
        if not self._started:
            await self._start(send)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _keep_alive(self, send: Send) -> None:
        while True:
            await asyncio.sleep(PING_AFTER_S)
            if self._started and self._answer.is_stream and time.monotonic() - self._sent_at >= PING_AFTER_S:
                assert self._answer.head is not None
                await self._send_body(send, self._answer.head.ping)

    async def _send_body(self, send: Send, body: bytes) -> None:
        async with self._sending:
            await send({"type": "http.response.body", "body": body, "more_body": True})
            self._sent_at = time.monotonic()

    async def _start(self, send: Send) -> None:
        head = self._answer.head
        assert head is not None
        response = Response(status_code=head.status, headers={**head.headers, **self._extra})
        del response.headers["content-length"]
        self._started = True
        await send({"type": "http.response.start", "status": head.status, "headers": response.raw_headers})


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
