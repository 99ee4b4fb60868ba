"""A function URL on loopback: HTTP in, an event for the fake Runtime API, its streamed response back out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

from fake_runtime_api import FakeRuntimeApi, url_event

PRELUDE_END = bytes(8)


class FunctionUrl(ThreadingHTTPServer):
    """Like the platform's: it frames the body itself, and the client never sees the trailers."""

    daemon_threads = True

    def __init__(self, platform: FakeRuntimeApi) -> None:
        super().__init__(("127.0.0.1", 0), _Bridge)
        self.platform = platform
        self.url = f"http://127.0.0.1:{self.server_port}"


@contextmanager
def function_url(platform: FakeRuntimeApi) -> Iterator[str]:
    server = FunctionUrl(platform)
    thread = Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server.url
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Bridge(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FunctionUrl

    def do_GET(self) -> None:
        self._forward()

    def do_POST(self) -> None:
        self._forward()

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0"))).decode()
        headers = {name.lower(): value for name, value in self.headers.items()}
        exchange = self.server.platform.invoke(url_event(self.command, self.path, body, headers))
        received = b""
        while PRELUDE_END not in received:
            chunk = exchange.chunk()
            assert chunk is not None
            received += chunk
        prelude, _, payload = received.partition(PRELUDE_END)
        self._begin(json.loads(prelude))
        self._write(payload)
        for chunk in iter(exchange.chunk, None):
            self._write(chunk)
        self.wfile.write(b"0\r\n\r\n")

    def _begin(self, prelude: dict[str, Any]) -> None:
        self.send_response(prelude["statusCode"])
        for name, value in prelude["headers"].items():
            self.send_header(name, value)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _write(self, chunk: bytes) -> None:
        if chunk:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))

    def log_message(self, *args: Any) -> None:
        pass
