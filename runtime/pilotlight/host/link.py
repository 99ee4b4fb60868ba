"""The host's end of a replica's wire, and of whatever forks replicas. Everything here runs on the event loop."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Protocol

from pilotlight.host.wire import (
    READ_BYTES,
    Dormant,
    FrameReader,
    FromReplica,
    ReplicaSpec,
    ToReplica,
    frame,
    from_replica,
)

MAX_UNSENT_BYTES = 64 * 1024 * 1024
"""More than this in front of a replica that does not read, and it counts as hung."""


class Link(Protocol):
    """A replica as the pool sees it."""

    def send(self, message: ToReplica) -> None:
        """Hand a message over; never blocks."""

    def kill(self) -> None:
        """End the process at once."""

    def close(self) -> None:
        """Close the wire, which ends the process."""


class Listener(Protocol):
    """What a replica's messages go to."""

    def received(self, message: FromReplica) -> None:
        """A message came."""

    def ended(self, cause: str) -> None:
        """The wire is closed: the process is gone. Called once, and nothing after it."""


class TemplateListener(Protocol):
    """Whom a template concerns."""

    def template_dormant(self, message: Dormant) -> None:
        """It holds its session, and can be forked from."""

    def template_ended(self, cause: str) -> None:
        """It could not be made, or is gone."""


class Forks(Protocol):
    """Makes replicas."""

    def launch(self, spec: ReplicaSpec, listener: Listener) -> Link:
        """Have a replica started; it reports to the listener when it has. Never blocks.

        Raises:
            OSError: no process can be made.
        """


class TemplateLink(Forks, Protocol):
    """A template as the pool sees it."""

    def close(self) -> None:
        """End it, and with it the replicas that were forked from it."""


class Launcher(Forks, Protocol):
    """Makes replicas from nothing, and templates."""

    def launch_template(self, spec: ReplicaSpec, listener: TemplateListener) -> TemplateLink:
        """Have a template made; it reports to the listener. Never blocks.

        Raises:
            OSError: no process can be made.
        """


class WireLink:
    """A replica over its socket."""

    def __init__(self, connection: socket.socket, listener: Listener, kill: Callable[[], None]) -> None:
        connection.setblocking(False)
        self._connection = connection
        self._listener = listener
        self._kill = kill
        self._loop = asyncio.get_running_loop()
        self._reader = FrameReader()
        self._unsent = bytearray()
        self._open = True
        self._loop.add_reader(connection.fileno(), self._read)

    def send(self, message: ToReplica) -> None:
        if not self._open:
            return
        self._unsent += frame(message)
        if len(self._unsent) > MAX_UNSENT_BYTES:
            self.kill()
        self._write()

    def kill(self) -> None:
        self._kill()

    def close(self) -> None:
        """Close the wire without telling the listener."""
        if self._open:
            self._open = False
            self._loop.remove_reader(self._connection.fileno())
            self._loop.remove_writer(self._connection.fileno())
            self._connection.close()

    def _write(self) -> None:
        try:
            sent = self._connection.send(self._unsent)
        except BlockingIOError:
            sent = 0
        except OSError:
            return  # it is gone, which the reader learns as well
        del self._unsent[:sent]
        if self._unsent:
            self._loop.add_writer(self._connection.fileno(), self._write)
        else:
            self._loop.remove_writer(self._connection.fileno())

    def _read(self) -> None:
        """Take all there is, to its end.

        A process that dies with messages unread leaves an error on its socket beside what it sent last. uvloop calls a
        reader once for that, and never again.
        """
        while self._open:
            try:
                received = self._connection.recv(READ_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                self._end(str(error))
                return
            if not received:
                self._end("its process ended")
                return
            for payload in self._reader.feed(received):
                self._listener.received(from_replica.decode(payload))

    def _end(self, cause: str) -> None:
        self.close()
        self._listener.ended(cause)
