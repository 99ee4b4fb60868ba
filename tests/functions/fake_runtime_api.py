"""The Lambda Runtime API on loopback, as strict as the real one, for tests that stand where the platform stands."""

from __future__ import annotations

import base64
import json
import queue
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any

VERSION = "/2018-06-01/runtime"
TIMEOUT_S = 300
ERROR_BODY = "lambda-runtime-function-error-body"
ERROR_TYPE = "lambda-runtime-function-error-type"


@dataclass
class Exchange:
    """One invocation and what came back for it. ``chunks`` ends with None.

    The platform hangs up after ``max_chunks``, and answers the end of a response with ``status``.
    """

    request_id: str
    event: bytes
    left_s: float = 60.0
    invocation_id: str | None = None
    status: int = 202
    max_chunks: int | None = None
    chunks: queue.SimpleQueue[bytes | None] = field(default_factory=queue.SimpleQueue)
    headers: Mapping[str, str] = field(default_factory=dict)
    trailers: dict[str, str] = field(default_factory=dict)
    error: dict[str, Any] | None = None
    done: Event = field(default_factory=Event)

    def chunk(self) -> bytes | None:
        """Wait for the next chunk; None at the end."""
        return self.chunks.get(timeout=TIMEOUT_S)

    def body(self) -> bytes:
        """Wait for the end and return all that has not been taken yet."""
        return b"".join(iter(self.chunk, None))

    def http(self) -> tuple[dict[str, Any], str]:
        """Wait for the end and return the prelude and the payload."""
        prelude, separator, payload = self.body().partition(bytes(8))
        assert separator, "no prelude"
        return json.loads(prelude), payload.decode()

    def wait(self) -> None:
        assert self.done.wait(TIMEOUT_S)

    @property
    def trailer_error(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(base64.b64decode(self.trailers[ERROR_BODY], validate=True))
        assert found["errorType"] == self.trailers[ERROR_TYPE]
        return found


class FakeRuntimeApi(ThreadingHTTPServer):
    """Hands out events to whoever asks for the next one, and keeps the answers."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Endpoint)
        self.address = f"127.0.0.1:{self.server_port}"
        self.waiting: queue.SimpleQueue[Exchange | None] = queue.SimpleQueue()
        self.exchanges: dict[str, Exchange] = {}
        self.reports: queue.SimpleQueue[tuple[str, dict[str, Any]]] = queue.SimpleQueue()
        self.polls: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.restore = Event()
        self.snapshots: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.num_polls = 0

    def invoke(self, event: object, **fields: Any) -> Exchange:
        raw = event if isinstance(event, bytes) else json.dumps(event).encode()
        exchange = Exchange(f"aws-{len(self.exchanges) + 1}", raw, **fields)
        self.exchanges[exchange.request_id] = exchange
        self.waiting.put(exchange)
        return exchange

    def invoke_http(self, method: str, path: str, body: object = None, **fields: Any) -> Exchange:
        return self.invoke(url_event(method, path, body), **fields)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Leave it to the test to notice what is missing when the function was killed; show every other error."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def stop(self) -> None:
        for _ in range(self.num_polls):
            self.waiting.put(None)
        self.restore.set()
        self.shutdown()
        self.server_close()


@contextmanager
def fake_runtime_api() -> Iterator[FakeRuntimeApi]:
    api = FakeRuntimeApi()
    thread = Thread(target=api.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield api
    finally:
        api.stop()
        thread.join()


class _Endpoint(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeRuntimeApi

    def do_GET(self) -> None:
        if self.path == f"{VERSION}/invocation/next":
            self._hand_out()
        elif self.path == f"{VERSION}/restore/next":
            self.server.snapshots.put(None)
            assert self.server.restore.wait(TIMEOUT_S)
            self._reply(200)
        else:
            self._reply(404)

    def do_POST(self) -> None:
        parts = self.path.removeprefix(f"{VERSION}/").split("/")
        if parts[0] == "invocation" and parts[2] == "response":
            self._take_response(self.server.exchanges[parts[1]])
        elif parts[0] == "invocation" and parts[2] == "error":
            exchange = self.server.exchanges[parts[1]]
            exchange.error = json.loads(self._whole_body())
            self._end(exchange)
        else:
            self.server.reports.put(("/".join(parts), json.loads(self._whole_body())))
            self._reply(202)

    def _hand_out(self) -> None:
        self.server.num_polls += 1
        self.server.polls.put(None)
        exchange = self.server.waiting.get()
        self.server.num_polls -= 1
        if exchange is None:
            self.close_connection = True
            return
        headers = {
            "Lambda-Runtime-Aws-Request-Id": exchange.request_id,
            "Lambda-Runtime-Deadline-Ms": str(round((time.time() + exchange.left_s) * 1000)),
        }
        if exchange.invocation_id is not None:
            headers["Lambda-Runtime-Invocation-Id"] = exchange.invocation_id
        self._reply(200, headers, exchange.event)

    def _take_response(self, exchange: Exchange) -> None:
        exchange.headers = {name.lower(): value for name, value in self.headers.items()}
        if exchange.headers.get("lambda-runtime-function-response-mode") == "streaming":
            for number, chunk in enumerate(self._chunks(), 1):
                exchange.chunks.put(chunk)
                if number == exchange.max_chunks:
                    self.close_connection = True
                    exchange.done.set()
                    return
            exchange.trailers = self._trailers()
        else:
            exchange.chunks.put(self._whole_body())
        self._end(exchange)

    def _end(self, exchange: Exchange) -> None:
        exchange.chunks.put(None)
        self._reply(exchange.status)
        exchange.done.set()

    def _chunks(self) -> Iterator[bytes]:
        assert self.headers["Transfer-Encoding"] == "chunked"
        while num_bytes := int(self._line(), 16):
            yield self.rfile.read(num_bytes)
            assert self.rfile.read(2) == b"\r\n"

    def _trailers(self) -> dict[str, str]:
        announced = {name.strip().lower() for name in self.headers["Trailer"].split(",")}
        found = {}
        while (line := self._line()) != "":
            name, _, value = line.partition(": ")
            assert name.lower() in announced
            found[name.lower()] = value
        return found

    def _line(self) -> str:
        line = self.rfile.readline().decode()
        if not line:
            raise ConnectionError("the function was killed")
        return line.rstrip("\r\n")

    def _whole_body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def _reply(self, status: int, headers: Mapping[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *args: Any) -> None:
        pass


def url_event(
    method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None, **changes: Any
) -> dict[str, Any]:
    """Return what a function URL makes of a request."""
    raw_path, _, query = path.partition("?")
    event = {
        "version": "2.0",
        "routeKey": "$default",
        "rawPath": raw_path,
        "rawQueryString": query,
        "headers": {"content-type": "application/json", **(headers or {})},
        "requestContext": {
            "accountId": "anonymous",
            "apiId": "abc",
            "domainName": "abc.lambda-url.us-east-1.on.aws",
            "http": {"method": method, "path": raw_path, "protocol": "HTTP/1.1", "sourceIp": "192.0.2.1"},
            "requestId": "id",
            "routeKey": "$default",
            "stage": "$default",
        },
        "isBase64Encoded": False,
    }
    if body is not None:
        event["body"] = body if isinstance(body, str) else json.dumps(body)
    return {**event, **changes}
