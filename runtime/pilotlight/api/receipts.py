"""Receipts: middleware that hashes what is asked and answered, in clear, and the endpoint that gives the receipts.

It stands inside of the middleware that opens encrypted bodies, so that the hashes are of what the client has.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pilotlight.api.auth import caller_of
from pilotlight.api.errors import error_response
from pilotlight.api.sse import STRAIGHT_SEND
from pilotlight.confidential.issuer import Issuer
from pilotlight.confidential.receipts import RECEIPT_TYPE, Exchange
from pilotlight.errors import PilotlightError

RECEIPTS_PATH = "/v1/receipts/"
GENERATION_PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"})


class Receipts:
    """Middleware around everything that generates."""

    def __init__(self, app: ASGIApp, issuer: Issuer) -> None:
        self._app = app
        self._issuer = issuer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "GET" and scope["path"].startswith(RECEIPTS_PATH):
            await (await self._receipt(Request(scope)))(scope, receive, send)
        elif scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in GENERATION_PATHS:
            await self._watched(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _receipt(self, request: Request) -> Response:
        request_id = request.scope["path"].removeprefix(RECEIPTS_PATH)
        try:
            receipt = await self._issuer.receipt(request_id, caller_of(request).may_see)
        except PilotlightError as error:
            return error_response(error, request.scope)
        return Response(receipt, media_type=RECEIPT_TYPE)

    async def _watched(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = _Watch(receive, send, scope.get(STRAIGHT_SEND, send))
        request_id = scope["state"]["request_id"]
        inner = {**scope, STRAIGHT_SEND: watch.send_frame}
        try:
            await self._app(inner, watch.receive, watch.send)
        finally:
            # Before its last message is sent, so that the receipt is there when the client has read its answer.
            if watch.exchange is not None:
                await self._issuer.ended(request_id, watch.exchange)
            await watch.send_last()


class _Watch:
    """Hashes the bodies that pass, and holds the last message back."""

    def __init__(self, receive: Receive, send: Send, straight_send: Send) -> None:
        self._receive = receive
        self._send = send
        self._straight_send = straight_send
        self._request = bytearray()
        self._last: Message | None = None
        self.exchange: Exchange | None = None

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._request += message.get("body", b"")
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.exchange = Exchange.of(bytes(self._request))
        elif message["type"] == "http.response.body":
            self._hash(message)
            if not message.get("more_body", False):
                self._last = message
                return
        await self._send(message)

    async def send_frame(self, message: Message) -> None:
        self._hash(message)
        await self._straight_send(message)

    async def send_last(self) -> None:
        if self._last is not None:
            last, self._last = self._last, None
            await self._send(last)

    def _hash(self, message: Message) -> None:
        if self.exchange is not None:
            self.exchange.received(message.get("body", b""))
