"""ASGI messages in, a Runtime API response out; in each of the ways in which an event's sender may read it."""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import msgspec

from event import Reading
from pilotlight.api.sse import error_frame
from pilotlight.errors import EngineError, PilotlightError
from runtime_client import GONE, HTTP_INTEGRATION, Failure, Invocation, ResponseStream, RuntimeClient
from runtime_http import Reply

logger = logging.getLogger("pilotlight.aws_lambda")

FRAMING = frozenset({"connection", "content-length", "transfer-encoding"})
"""The platform frames the body itself."""
TEXT = ("text/", "application/json")
EVENT_STREAM = "text/event-stream"


class Answer(Protocol):
    """The response to one invocation, written by an ASGI application."""

    gone: asyncio.Event
    """Set when the platform has given the invocation up; what is sent after that goes nowhere."""

    async def send(self, message: Any) -> None:
        """Take one ASGI message."""

    async def end(self, failure: PilotlightError | None) -> None:
        """End the response; with a failure, if the application could not complete what it had begun."""


class StreamedAnswer:
    """Passes every piece on at once; HTTP's status and headers go ahead as a prelude, where there is a reader."""

    def __init__(self, client: RuntimeClient, invocation: Invocation, reading: Reading) -> None:
        self.gone = asyncio.Event()
        self._client = client
        self._invocation = invocation
        self._has_prelude = reading is Reading.HTTP_STREAM
        self._stream: ResponseStream | None = None
        self._is_event_stream = False
        self._is_complete = False

    async def send(self, message: Any) -> None:
        if self.gone.is_set():
            return
        with self._noting_what_is_gone():
            if message["type"] == "http.response.start":
                await self._begin(message["status"], message["headers"])
            elif self._stream is not None:
                self._is_complete = not message.get("more_body", False)
                await self._stream.write(message.get("body", b""))

    async def end(self, failure: PilotlightError | None) -> None:
        if self.gone.is_set():
            return
        with self._noting_what_is_gone():
            _settle(await self._end(failure), self._invocation)

    async def _end(self, failure: PilotlightError | None) -> Reply:
        if self._stream is None:
            return await _report(self._client, self._invocation, failure)
        if failure is not None and self._is_event_stream and not self._is_complete:
            await self._stream.write(error_frame(failure))
        return await self._stream.finish(None if failure is None else failure_of(failure))

    async def _begin(self, status: int, raw_headers: Iterable[tuple[bytes, bytes]]) -> None:
        headers, cookies = _headers(raw_headers)
        self._is_event_stream = headers.get("content-type", "").startswith(EVENT_STREAM)
        content_type = HTTP_INTEGRATION if self._has_prelude else None
        self._stream = await self._client.stream(self._invocation, content_type)
        if self._has_prelude:
            await self._stream.write_prelude(status, headers, cookies)

    @contextmanager
    def _noting_what_is_gone(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            logger.warning("the platform has left (%s)", error)
            self.gone.set()
            if self._stream is not None:
                self._stream.close()


class ObjectAnswer:
    """Collects the response into the one JSON object that buffered function URLs and HTTP APIs read."""

    def __init__(self, client: RuntimeClient, invocation: Invocation, reading: Reading) -> None:
        self.gone = asyncio.Event()
        self._client = client
        self._invocation = invocation
        self._has_lists = reading is Reading.HTTP_LISTS
        self._status = 0
        self._headers: dict[str, str] = {}
        self._cookies: list[str] = []
        self._body = bytearray()

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._headers, self._cookies = _headers(message["headers"])
        else:
            self._body += message.get("body", b"")

    async def end(self, failure: PilotlightError | None) -> None:
        if self._status:
            reply = await self._client.respond(self._invocation, self._encoded())
        else:
            reply = await _report(self._client, self._invocation, failure)
        _settle(reply, self._invocation)

    def _encoded(self) -> bytes:
        is_text = self._headers.get("content-type", "text/").startswith(TEXT)
        body = self._body.decode() if is_text else base64.b64encode(self._body).decode()
        whole = {"statusCode": self._status, "headers": self._headers, "body": body, "isBase64Encoded": not is_text}
        if self._has_lists:
            whole["multiValueHeaders"] = {name: [value] for name, value in self._headers.items()}
        return msgspec.json.encode({**whole, **({"cookies": self._cookies} if self._cookies else {})})


def open_answer(client: RuntimeClient, invocation: Invocation, reading: Reading) -> Answer:
    """Return the answer that an event's sender can read."""
    if reading in (Reading.HTTP_OBJECT, Reading.HTTP_LISTS):
        return ObjectAnswer(client, invocation, reading)
    return StreamedAnswer(client, invocation, reading)


def _headers(raw: Iterable[tuple[bytes, bytes]]) -> tuple[dict[str, str], list[str]]:
    """Return headers with their repetitions joined, and the cookies, which cannot be joined."""
    headers: dict[str, str] = {}
    cookies = []
    for raw_name, raw_value in raw:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        if name == "set-cookie":
            cookies.append(value)
        elif name not in FRAMING:
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers, cookies


async def _report(client: RuntimeClient, invocation: Invocation, failure: PilotlightError | None) -> Reply:
    return await client.report_error(invocation, failure_of(failure or EngineError("there is no response")))


def failure_of(error: PilotlightError) -> Failure:
    """Return an error as the platform records it."""
    return Failure(f"Pilotlight.{type(error).__name__}", error.message)


def _settle(reply: Reply, invocation: Invocation) -> None:
    if reply.status == GONE:
        logger.warning("the platform had given %s up before its response came", invocation.request_id)
    elif reply.status >= 300:
        logger.error("the response to %s was refused with status %s", invocation.request_id, reply.status)
