"""Who takes usage events: a server on loopback that fails as often as a test wants."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Receiver(ThreadingHTTPServer):
    """Takes events and lets some of them fail: before it has seen them, or after it has, without saying so."""

    def __init__(self, failures: list[str], seed: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.events: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.num_requests = 0
        self.failures = failures
        self.rng = random.Random(seed)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/usage?from=us"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.num_requests += 1
        failure = self.server.rng.choice(self.server.failures)
        if failure != "refuse":
            self.server.events.append(json.loads(body))
            self.server.headers.append({name.lower(): value for name, value in self.headers.items()})
        if failure == "hang up":
            self.close_connection = True
            return
        self.send_response(204 if failure == "none" else 503)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def receiver(failures: list[str]) -> Iterator[Receiver]:
    server = Receiver(failures)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
