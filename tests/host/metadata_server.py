"""The metadata services of two clouds on loopback, as strict as the real ones about their headers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class MetadataServer:
    """``items`` is what is there, by path; ``tokens`` are valid until they are taken out."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.items: dict[str, str] = {}
        self.tokens: set[str] = set()
        self.num_tokens = 0
        self.broken = False


@contextmanager
def metadata_server() -> Iterator[MetadataServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        state = MetadataServer(f"http://127.0.0.1:{server.server_address[1]}")
        _Handler.state = state
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: MetadataServer

    def do_PUT(self) -> None:
        ttl_s = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
        if self.path != "/latest/api/token" or not ttl_s.isdigit() or not 1 <= int(ttl_s) <= 21600:
            return self._answer(400)
        self.state.num_tokens += 1
        token = f"token-{self.state.num_tokens}"
        self.state.tokens.add(token)
        self._answer(200, token)

    def do_GET(self) -> None:
        if self.state.broken:
            return self._answer(503, "down")
        if self.path.startswith("/latest/") and self.headers.get("X-aws-ec2-metadata-token") not in self.state.tokens:
            return self._answer(401)
        if self.path.startswith("/computeMetadata/") and self.headers.get("Metadata-Flavor") != "Google":
            return self._answer(403)
        item = self.state.items.get(self.path)
        self._answer(404) if item is None else self._answer(200, item)

    def _answer(self, status: int, text: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass
