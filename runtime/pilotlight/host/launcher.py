"""The zygote as the host sees it: started when it is needed, asked for forks, started again when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys

from pilotlight.host.link import Link, Listener, WireLink
from pilotlight.host.wire import Exited, Forked, ForkReplica, FromZygote, ReplicaSpec, encode, from_zygote

MAX_MESSAGE_BYTES = 64 * 1024
END_TIMEOUT_S = 5


class ZygoteLauncher:
    """Forks replicas off a zygote process."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._pids: dict[str, int] = {}
        self._to_kill: set[str] = set()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Start the zygote, unless it runs.

        Raises:
            OSError: no process can be made.
        """
        if self._control is not None:
            return
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
        ours.setblocking(False)
        self._control = ours
        asyncio.get_running_loop().add_reader(ours.fileno(), self._read)

    def launch(self, spec: ReplicaSpec, listener: Listener) -> Link:
        self.start()
        assert self._control is not None
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                socket.send_fds(self._control, [encode(ForkReplica(spec))], [theirs.fileno()])
        except OSError:
            ours.close()
            raise
        return WireLink(ours, listener, lambda: self._kill(spec.replica_id))

    def close(self) -> None:
        """End the zygote, and with it whatever it has forked."""
        if self._control is not None:
            self._forget()
        self._bury()

    def _bury(self) -> None:
        """Wait for the end of a zygote whose control socket is closed."""
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_TIMEOUT_S)
            self._process.kill()
            self._process.wait()
            self._process = None

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
            self._forget()  # the next launch starts another one

    def _received(self, message: FromZygote) -> None:
        if isinstance(message, Forked):
            self._pids[message.replica_id] = message.pid
            if message.replica_id in self._to_kill:
                self._kill(message.replica_id)
        elif isinstance(message, Exited):
            for replica_id in [name for name, pid in self._pids.items() if pid == message.pid]:
                del self._pids[replica_id]

    def _kill(self, replica_id: str) -> None:
        """Kill a replica, or remember to until its pid is known. A pid is ours until the zygote reports its end."""
        pid = self._pids.get(replica_id)
        if pid is None:
            self._to_kill.add(replica_id)
            return
        self._to_kill.discard(replica_id)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def _forget(self) -> None:
        assert self._control is not None
        asyncio.get_running_loop().remove_reader(self._control.fileno())
        self._control.close()
        self._control = None
        self._pids.clear()
        self._to_kill.clear()
