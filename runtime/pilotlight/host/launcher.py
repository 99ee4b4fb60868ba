"""Whatever forks replicas, as the host sees it: the zygote, and the templates that are forked from it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import TypeVar

from pilotlight.host.link import Listener, TemplateListener, WireLink
from pilotlight.host.wire import (
    Dormant,
    Exited,
    Forked,
    ForkReplica,
    ForkTemplate,
    FromZygote,
    ReplicaSpec,
    ToZygote,
    Unfit,
    encode,
    from_zygote,
)

MAX_MESSAGE_BYTES = 64 * 1024
END_TIMEOUT_S = 5

T = TypeVar("T")


class Forker:
    """The control socket of a process that forks, and the pids of its children."""

    def __init__(
        self, control: socket.socket, on_message: Callable[[FromZygote], None], on_end: Callable[[], None]
    ) -> None:
        control.setblocking(False)
        self._control: socket.socket | None = control
        self._on_message = on_message
        self._on_end = on_end
        self._pids: dict[str, int] = {}
        self._to_kill: set[str] = set()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(control.fileno(), self._read)

    def launch(self, spec: ReplicaSpec, listener: Listener) -> WireLink:
        """Fork a replica.

        Raises:
            OSError: it cannot be asked to.
        """
        ours = self.ask(ForkReplica(spec), socket.SOCK_STREAM)
        return WireLink(ours, listener, lambda: self.kill(spec.replica_id))

    def ask(self, message: ToZygote, kind: int) -> socket.socket:
        """Ask for a fork and return our end of its socket.

        Raises:
            OSError: it cannot be asked.
        """
        if self._control is None:
            raise BrokenPipeError("the process that forks is gone")
        ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
        try:
            with theirs:
                socket.send_fds(self._control, [encode(message)], [theirs.fileno()])
        except OSError:
            ours.close()
            raise
        return ours

    def kill(self, replica_id: str) -> None:
        """Kill a child, or remember to until its pid is known. A pid is ours until its parent reports its end."""
        pid = self._pids.get(replica_id)
        if pid is None:
            self._to_kill.add(replica_id)
            return
        self._to_kill.discard(replica_id)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        """Close the control socket, which ends the process and its children."""
        if self._control is not None:
            self._loop.remove_reader(self._control.fileno())
            self._control.close()
            self._control = None

    def _read(self) -> None:
        assert self._control is not None
        try:
            raw = self._control.recv(MAX_MESSAGE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            raw = b""
        if raw:
            self._received(from_zygote.decode(raw))
        else:
            self.close()
            self._on_end()

    def _received(self, message: FromZygote) -> None:
        if isinstance(message, Forked):
            self._pids[message.replica_id] = message.pid
            if message.replica_id in self._to_kill:
                self.kill(message.replica_id)
        elif isinstance(message, Exited):
            for replica_id in [name for name, pid in self._pids.items() if pid == message.pid]:
                del self._pids[replica_id]
        else:
            self._on_message(message)


class ZygoteLauncher:
    """The zygote: started when it is needed, and again when it dies."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._forker: Forker | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def start(self) -> Forker:
        """Start the zygote, unless it runs.

        Raises:
            OSError: no process can be made.
        """
        if self._forker is None:
            self._bury()
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                # One thread for numpy's algebra: a fork keeps only the thread that forks, and nothing here multiplies.
                environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
                arguments = [str(theirs.fileno()), str(os.getpid())]
                command = [sys.executable, "-P", "-m", "pilotlight.host.zygote", *arguments]
                self._process = subprocess.Popen(  # noqa: S603
                    command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment
                )
            self._forker = Forker(ours, lambda _: None, self._ended)
        return self._forker

    def launch(self, spec: ReplicaSpec, listener: Listener) -> WireLink:
        return self._asked(lambda forker: forker.launch(spec, listener))

    def launch_template(self, spec: ReplicaSpec, listener: TemplateListener) -> Template:
        return Template(self._asked(lambda forker: forker.ask(ForkTemplate(spec), socket.SOCK_SEQPACKET)), listener)

    def _asked(self, ask: Callable[[Forker], T]) -> T:
        """Ask the zygote, or a new one where it has died and nobody has heard of it yet."""
        try:
            return ask(self.start())
        except ConnectionError:
            self.close()
            return ask(self.start())

    def close(self) -> None:
        """End the zygote, and with it whatever it has forked."""
        if self._forker is not None:
            self._forker.close()
            self._forker = None
        self._bury()

    def _ended(self) -> None:
        self._forker = None  # the next launch starts another one

    def _bury(self) -> None:
        """Wait for the end of a zygote whose control socket is closed."""
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_TIMEOUT_S)
            self._process.kill()
            self._process.wait()
            self._process = None


class Template:
    """A dormant process with a session, which forks replicas that inherit it."""

    def __init__(self, control: socket.socket, listener: TemplateListener) -> None:
        self._forker = Forker(control, self._received, lambda: listener.template_ended("its process ended"))
        self._listener = listener

    def launch(self, spec: ReplicaSpec, listener: Listener) -> WireLink:
        return self._forker.launch(spec, listener)

    def close(self) -> None:
        self._forker.close()

    def _received(self, message: FromZygote) -> None:
        if isinstance(message, Dormant):
            self._listener.template_dormant(message)
        elif isinstance(message, Unfit):
            self._listener.template_ended(message.problem)
