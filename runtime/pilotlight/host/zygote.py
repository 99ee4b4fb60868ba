"""The zygote: a process with the runtime's imports done and no session, which forks replicas.

    python -m pilotlight.host.zygote CONTROL_FD HOST_PID

It runs no thread of its own, since a fork keeps only the thread that forks. It ends when the host's end of the control
socket is closed, and its children end with it.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from pilotlight.engine.heap import return_freed_memory
from pilotlight.errors import PilotlightError
from pilotlight.host import replica
from pilotlight.host.lifeline import die_with, ignore_signals_of_the_group, name_process
from pilotlight.host.wire import (
    Dormant,
    Exited,
    Forked,
    ForkReplica,
    ForkTemplate,
    FromZygote,
    ReplicaSpec,
    Unfit,
    encode,
    to_zygote,
)

MAX_MESSAGE_BYTES = 64 * 1024

_children: set[int] = set()

Child = Callable[[ForkReplica | ForkTemplate, socket.socket], None]


def serve_forks(control: socket.socket, child: Child) -> None:
    """Fork a child for each message on ``control`` until the host is gone; report their pids and their ends."""
    wake_up, waker = socket.socketpair()
    wake_up.setblocking(False)
    waker.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    previous = signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
    try:
        while True:
            ready, _, _ = select.select([control, wake_up], [], [])
            if wake_up in ready:
                wake_up.recv(4096)
                _reap(control)
            if control in ready and not _receive(control, (wake_up, waker), child):
                return
    finally:
        signal.set_wakeup_fd(previous)
        _end_children()


def _receive(control: socket.socket, own: tuple[socket.socket, ...], child: Child) -> bool:
    """Take one message and fork; False when the host is gone."""
    try:
        raw, descriptors, _, _ = socket.recv_fds(control, MAX_MESSAGE_BYTES, 1)
    except ConnectionError:  # it was killed before it had read what was sent to it
        return False
    if not raw:
        return False
    message = to_zygote.decode(raw)
    with socket.socket(fileno=descriptors[0]) as connection:
        parent_pid = os.getpid()
        pid = os.fork()
        if pid == 0:
            _become(message, connection, (control, *own), parent_pid, child)
    _children.add(pid)
    _report(control, Forked(message.spec.replica_id, pid))
    return True


def _become(
    message: ForkReplica | ForkTemplate,
    connection: socket.socket,
    inherited: tuple[socket.socket, ...],
    parent_pid: int,
    child: Child,
) -> NoReturn:
    """Run the child and never return into the parent's code."""
    exit_code = 70
    try:
        die_with(parent_pid)
        _children.clear()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for one in inherited:
            one.close()
        name_process("pl-replica" if isinstance(message, ForkReplica) else "pl-template")
        child(message, connection)
        exit_code = 0
    except BaseException:  # noqa: BLE001 - whatever it is, it must not unwind into the zygote's loop
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(exit_code)


def _end_children() -> None:
    """Kill and reap what was forked; the host is gone, so nobody else would."""
    for pid in _children:
        os.kill(pid, signal.SIGKILL)
    with suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


def _reap(control: socket.socket) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        _children.discard(pid)
        _report(control, Exited(pid, os.waitstatus_to_exitcode(status)))


def _report(control: socket.socket, message: FromZygote) -> None:
    try:
        control.send(encode(message))
    except OSError:
        os._exit(1)  # the host is gone, and so are our children in a moment


def _child(message: ForkReplica | ForkTemplate, connection: socket.socket) -> None:
    if isinstance(message, ForkReplica):
        replica.run(message.spec, connection)
    else:
        _be_template(message.spec, connection)


def _be_template(spec: ReplicaSpec, control: socket.socket) -> None:
    """Load what replicas of this spec begin with, then wait to be forked."""
    try:
        loaded = replica.load(spec, for_long=True)
        warm_up_ms = replica.warm_up(loaded.session)
    except (PilotlightError, MemoryError) as error:
        _report(control, Unfit(replica.problem_of(spec, error)))
        return
    return_freed_memory()
    gc.freeze()
    _report(control, Dormant(os.getpid(), loaded.stages("zygote", 0.0, warm_up_ms)))
    serve_forks(control, lambda message, wire: replica.run_from_template(message.spec, wire, loaded))


def main() -> None:
    control_fd, host_pid = (int(argument) for argument in sys.argv[1:])
    die_with(host_pid)
    ignore_signals_of_the_group()
    name_process("pl-zygote")
    gc.collect()
    gc.freeze()  # what is here now is shared with all children; the collector must not touch its pages
    serve_forks(socket.socket(fileno=control_fd), _child)


if __name__ == "__main__":
    main()
