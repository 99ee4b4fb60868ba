"""What invoked the function, as a request for the API: a function URL, an HTTP API, or a plain Invoke."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from enum import Enum
from typing import Any
from urllib.parse import unquote_to_bytes

import msgspec

from pilotlight.errors import RequestError

FUNCTION_URL = ".lambda-url."
PLAIN_PATHS = {"messages": "/v1/chat/completions", "prompt": "/v1/completions"}
"""A plain Invoke's event is a request body; the parameter that carries the prompt tells the endpoint."""


class Reading(Enum):
    """How whoever sent an event reads the response."""

    HTTP_STREAM = "a prelude, then the body as it comes into being"
    HTTP_OBJECT = "one JSON object with status, headers and body"
    HTTP_LISTS = "the same, with a list for each header"
    PAYLOAD = "the body alone, as it comes into being"


class UnsupportedEvent(RequestError):
    """Neither an HTTP request nor an OpenAI body. ``reading`` is how the sender reads HTTP answers, if it does."""

    status = 501
    code = "unsupported_event"

    def __init__(self, what: str, reading: Reading | None = None) -> None:
        super().__init__(
            f"cannot answer {what}; send requests through a function URL or an HTTP API with payload format 2.0, "
            f"or invoke the function with the body of a chat or text completion"
        )
        self.reading = reading


class _Http(msgspec.Struct, rename="camel"):
    method: str
    source_ip: str = ""


class _Context(msgspec.Struct, rename="camel"):
    http: _Http
    domain_name: str = ""
    stage: str = "$default"
    authorizer: dict[str, Any] | None = None


class _HttpEvent(msgspec.Struct, rename="camel"):
    """The payload format 2.0; what it has beyond this says nothing that is not in the headers."""

    raw_path: str
    request_context: _Context
    raw_query_string: str = ""
    headers: dict[str, str] = {}
    cookies: list[str] | None = None
    body: str | None = None
    is_base64_encoded: bool = False


@dataclass(frozen=True, slots=True)
class Call:
    """A request for the API: an ASGI scope, the body, and how to answer."""

    scope: dict[str, Any]
    body: bytes
    reading: Reading


def parse_event(raw: bytes, request_id: str, url_reading: Reading) -> Call:
    """Return the request that an event stands for, with ``request_id`` unless the client gave its own.

    ``url_reading`` is how the function URL was set up; the events do not tell.

    Raises:
        UnsupportedEvent: it is something else, or a body that is said to be base64 is not.
    """
    try:
        event = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UnsupportedEvent("an event that is not JSON") from error
    if not isinstance(event, dict):
        raise UnsupportedEvent("an event that is not a JSON object")
    path = next((path for key, path in PLAIN_PATHS.items() if key in event), None)
    if path is not None and "eventSource" not in event:  # a broker's event has messages, too
        return _plain_call(raw, path, request_id)
    if event.get("version") == "2.0" and "rawPath" in event and "routeArn" not in event:
        return _http_call(_http_event(event), request_id, url_reading)
    raise UnsupportedEvent(_described(event), _refusal_reading(event))


def _refusal_reading(event: dict[str, Any]) -> Reading | None:
    """Return how the senders of an older payload format read an answer; a balancer may take lists and nothing else."""
    if "httpMethod" not in event or "requestContext" not in event or "methodArn" in event:
        return None
    return Reading.HTTP_LISTS if event.get("multiValueHeaders") is not None else Reading.HTTP_OBJECT


def _plain_call(body: bytes, path: str, request_id: str) -> Call:
    headers = [(b"content-type", b"application/json"), (b"x-request-id", request_id.encode())]
    return Call(_scope("POST", path.encode(), b"", headers), body, Reading.PAYLOAD)


def _http_event(event: dict[str, Any]) -> _HttpEvent:
    try:
        return msgspec.convert(event, _HttpEvent)
    except msgspec.ValidationError as error:
        raise UnsupportedEvent(f"an HTTP event that is not one ({error})", Reading.HTTP_OBJECT) from error


def _http_call(event: _HttpEvent, request_id: str, url_reading: Reading) -> Call:
    context = event.request_context
    is_url = FUNCTION_URL in context.domain_name
    path = event.raw_path if context.stage == "$default" else event.raw_path.removeprefix(f"/{context.stage}")
    scope = _scope(context.http.method, path.encode(), event.raw_query_string.encode(), _headers(event, request_id))
    scope["client"] = (context.http.source_ip, 0)
    scope["server"] = (context.domain_name, 443)
    return Call(scope, _body(event), url_reading if is_url else Reading.HTTP_OBJECT)


def _headers(event: _HttpEvent, request_id: str) -> list[tuple[bytes, bytes]]:
    """Return the headers as ASGI has them. Under IAM, ``authorization`` is AWS's, and the client's key is another."""
    headers = {name.lower(): value for name, value in event.headers.items()}
    headers.setdefault("x-request-id", request_id)
    if (event.request_context.authorizer or {}).get("iam"):
        headers.pop("authorization", None)
        if key := headers.get("x-api-key"):
            headers["authorization"] = f"Bearer {key}"
    if event.cookies:
        headers["cookie"] = "; ".join(event.cookies)
    return [(name.encode("latin-1", "replace"), value.encode("latin-1", "replace")) for name, value in headers.items()]


def _body(event: _HttpEvent) -> bytes:
    if event.body is None:
        return b""
    if not event.is_base64_encoded:
        return event.body.encode()
    try:
        return base64.b64decode(event.body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UnsupportedEvent(f"an HTTP event whose body is not base64 ({error})", Reading.HTTP_OBJECT) from error


def _scope(method: str, raw_path: bytes, query: bytes, headers: list[tuple[bytes, bytes]]) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method.upper(),
        "scheme": "https",
        "path": unquote_to_bytes(raw_path).decode("utf-8", "replace"),
        "raw_path": raw_path,
        "root_path": "",
        "query_string": query,
        "headers": headers,
        "state": {},
    }


def _described(event: dict[str, Any]) -> str:
    """Name an event by the service that sends such, where its shape tells."""
    records = event.get("Records")
    if isinstance(records, list) and records and isinstance(records[0], dict):
        source = records[0].get("eventSource", records[0].get("EventSource"))
        return f"records of {source}" if isinstance(source, str) else "records of another service"
    if isinstance(event.get("eventSource"), str):
        return f"records of {event['eventSource']}"
    if isinstance(event.get("triggerSource"), str):
        return f"the trigger {event['triggerSource']!r} of Cognito"
    if "routeArn" in event or "methodArn" in event:
        return "the question of an authorizer"
    if isinstance(event.get("detail-type"), str):
        return f"the event {event['detail-type']!r} of {event.get('source')}"
    if "httpMethod" in event:
        return "a request of a load balancer or of a REST API"
    return "this event"
