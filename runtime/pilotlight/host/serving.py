"""How every server of ours is run, and those of no function: the key server, and the proxy on a client's machine."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from pilotlight.errors import ConfigError

KEEP_ALIVE_S = 75
"""How long a connection on which nothing is asked stays open: longer than clients (httpx: 5 s) and load balancers
(commonly 60 s) keep theirs. Otherwise a request that is sent at that very moment is lost, and may not be sent again."""

Tls = tuple[Path, Path | None]


def server_config(app: ASGIApp, graceful_s: int | None = None) -> uvicorn.Config:
    """Return how a server is run. After a signal it waits so long for connections to end, without a limit if None."""
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=graceful_s,
    )


def serve_app(app: ASGIApp, address: str, port: int, on_ready: Callable[[str], None], tls: Tls | None = None) -> None:
    """Serve until SIGTERM or SIGINT. ``on_ready`` gets the base URL once the port is open.

    Raises:
        ConfigError: the address cannot be listened on, or the certificate cannot be used.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        listener = socket.create_server((address, port), family=family)
    except OSError as error:
        # create_server says twice in its own text where it tried to listen; a name that is none has no such number.
        why = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
        raise ConfigError(f"cannot listen on {address}:{port}: {why}") from error
    with listener:
        config = server_config(app)
        if tls is not None:
            config.ssl_certfile, config.ssl_keyfile = tls
        try:
            config.load()
        except OSError as error:
            raise ConfigError(f"the TLS certificate cannot be used ({error})") from error
        host = f"[{address}]" if ":" in address else address
        url = f"{'http' if tls is None else 'https'}://{host}:{listener.getsockname()[1]}"
        with contextlib.suppress(KeyboardInterrupt):  # a signal, which uvicorn raises again once everything has ended
            _Announced(config, lambda: on_ready(url)).run(sockets=[listener])


class _Announced(uvicorn.Server):
    """Says that it is ready when it is: also for a signal, which ends it in good order from then on."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()
