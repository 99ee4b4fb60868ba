"""Requests whose bodies are encrypted for this process: opened before anything reads them, and answered encrypted.

What is inside sees the request in clear and needs to know nothing of this. Headers, path and API key travel as they do
otherwise. A body is read frame by frame, and no text of a frame is passed on that was not authenticated.
"""

from __future__ import annotations

import re
from collections import deque

import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pilotlight.api.errors import error_response
from pilotlight.api.sse import STRAIGHT_SEND
from pilotlight.confidential.ehbp import (
    ENCAPSULATED_KEY,
    KEY_PROBLEM,
    KEYS_PATH,
    KEYS_TYPE,
    RESPONSE_NONCE,
    EncryptedBodyRefused,
    Frames,
    KeyMismatch,
    Received,
    Replayed,
    ResponseCipher,
    ServerKey,
    encode_key,
)
from pilotlight.errors import PilotlightError

PROBLEM_TYPE = "application/problem+json"
CONTENT_PATHS = re.compile(r"POST /v1/(?!requests/)|GET /v1/responses/")
"""What takes or gives content: all that is posted but a cancellation, and the responses that are kept."""


class EncryptionRequired(PilotlightError):
    """This server takes no prompts in clear."""

    status = 400
    code = "encryption_required"
    type = "invalid_request_error"

    def __init__(self) -> None:
        super().__init__(f"this server takes encrypted bodies only (EHBP); its key is at {KEYS_PATH}")


class KeptInClear(PilotlightError):
    """What this asks for would write an answer to the disk."""

    status = 400
    code = "not_for_encrypted_bodies"
    type = "invalid_request_error"

    def __init__(self) -> None:
        super().__init__("idempotency-key: an answer under a key is kept in the ledger, which an encrypted one is not")


class EncryptedBodies:
    """Middleware around everything that reads a body. Where ``required``, prompts in clear are refused."""

    def __init__(self, app: ASGIApp, key: ServerKey, max_body_bytes: int, *, required: bool) -> None:
        self._app = app
        self._key = key
        self._max_frame_bytes = max_body_bytes + 16
        self._required = required

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["path"] == KEYS_PATH:
            await Response(encode_key(self._key.public), headers={"content-type": KEYS_TYPE})(scope, receive, send)
            return
        given = Headers(scope=scope).getlist(ENCAPSULATED_KEY)
        if not given:
            await self._in_clear(scope, receive, send)
            return
        body = _Body(receive, Frames(self._max_frame_bytes))
        try:
            if len(given) > 1:
                raise EncryptedBodyRefused
            exchange, text = self._key.receive(given[0], await body.first_frame())
        except EncryptedBodyRefused as refusal:
            await _refusal(refusal, scope)(scope, receive, send)
            return
        body.open_with(exchange, text)
        answer = _Answer(send, exchange)
        if "idempotency-key" in Headers(scope=scope):  # whatever it names is kept on the disk
            await error_response(KeptInClear(), scope)(scope, receive, answer.send)
            return
        # Frames of a stream go past the middleware to whatever stands here: in clear, were it still the server's send.
        await self._app({**scope, STRAIGHT_SEND: answer.send}, body.receive, answer.send)

    async def _in_clear(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._required and CONTENT_PATHS.match(f"{scope['method']} {scope['path']}"):
            await error_response(EncryptionRequired(), scope)(scope, receive, send)
            return
        await self._app(scope, receive, send)


class _Body:
    """The request's messages, with their bodies opened."""

    def __init__(self, receive: Receive, frames: Frames) -> None:
        self._receive = receive
        self._frames = frames
        self._waiting: deque[bytes] = deque()
        self._exchange: Received | None = None
        self._text = b""
        self._ended = False

    async def first_frame(self) -> bytes:
        """Read up to the end of the first frame.

        Raises:
            EncryptedBodyRefused: there is none.
        """
        while not self._waiting and not self._ended:
            await self._read()
        if not self._waiting:
            raise EncryptedBodyRefused
        return self._waiting.popleft()

    def open_with(self, exchange: Received, text: bytes) -> None:
        self._exchange, self._text = exchange, text

    async def receive(self) -> Message:
        """Return the next message of the request in clear.

        Raises:
            EncryptedBodyRefused: a frame was altered, or the body ended within one.
        """
        if self._exchange is None:
            return await self._receive()  # the body was read to its end; what comes is that the client has left
        if not self._text and not self._waiting and not self._ended:
            message = await self._read()
            if message["type"] != "http.request":
                return message
        text, self._text = self._text, b""
        while self._waiting:
            text += self._exchange.open(self._waiting.popleft())
        if self._ended:
            self._exchange = None
        return {"type": "http.request", "body": text, "more_body": not self._ended}

    async def _read(self) -> Message:
        message = await self._receive()
        if message["type"] != "http.request":
            self._ended = True
            return message
        self._waiting.extend(self._frames.feed(message.get("body", b"")))
        if not message.get("more_body", False):
            self._frames.finish()
            self._ended = True
        return message


class _Answer:
    """The response's messages, with their bodies sealed."""

    def __init__(self, send: Send, exchange: Received) -> None:
        self._send = send
        self._exchange = exchange
        self._cipher: ResponseCipher | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            nonce, self._cipher = self._exchange.respond()
            headers = MutableHeaders(scope=message)
            headers[RESPONSE_NONCE] = nonce
            del headers["content-length"]
        elif message["type"] == "http.response.body":
            assert self._cipher is not None
            text, more = message.get("body", b""), message.get("more_body", False)
            sealed = self._cipher.seal(text) if text else b""
            message = {**message, "body": sealed if more else sealed + self._cipher.seal(b"")}
        await self._send(message)


def _refusal(error: EncryptedBodyRefused, scope: Scope) -> Response:
    if isinstance(error, KeyMismatch):
        problem = {"type": KEY_PROBLEM, "title": error.message}
        return Response(msgspec.json.encode(problem), error.status, media_type=PROBLEM_TYPE)
    response = error_response(error, scope)
    if isinstance(error, Replayed):
        response.headers["x-should-retry"] = "false"  # the SDKs repeat a 409 by themselves
    return response
