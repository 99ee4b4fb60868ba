"""Several machines on one: each node of a Ray cluster in a network namespace of its own, on a bridge. Needs root."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

BRIDGE = "plbr0"
NAMESPACE = "pl-"
LOCK = Path(tempfile.gettempdir()) / "pilotlight-netns.lock"
SUBNET = "10.88.7"
HEAD_PORT = 6379
SERVE_PORT = 8000
START_TIMEOUT_S = 120.0
START_ATTEMPTS = 4
OBJECT_STORE_BYTES = 80 * 1024 * 1024

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_SERVE_ENABLE_TASK_EVENTS": "0",
    "RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING": "0",
    # Ray's default is 15: whatever else runs on the machine comes before its replicas then
    "RAY_worker_niceness": "0",
    # how soon a silent node counts as dead; a killed one is noticed by its connections
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
    "RAY_health_check_timeout_ms": "3000",
    # a busy machine is not a broken one
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
    "RAY_memory_monitor_refresh_ms": "0",
}


class Unable(Exception):
    """This machine cannot make network namespaces."""


class Node:
    """One machine: a namespace, an address, and the processes in it."""

    def __init__(self, cluster: Cluster, name: str, number: int) -> None:
        self.name = name
        self.address = f"{SUBNET}.{number}"
        self.namespace = f"{NAMESPACE}{name}"
        self.notice = cluster.folder / f"notice-{name}"
        self._cluster = cluster
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *arguments: str) -> None:
        """Start Ray's processes here, and return once they are part of the cluster.

        Raises:
            RuntimeError: they did not start, several times: on a busy machine Ray's own time limits may pass.
        """
        for _ in range(START_ATTEMPTS):
            self._process = self.popen(self._cluster.ray, "start", "--block", f"--node-ip-address={self.address}",
                                       f"--object-store-memory={OBJECT_STORE_BYTES}", "--disable-usage-stats",
                                       *arguments)  # fmt: skip
            ends_at = time.monotonic() + START_TIMEOUT_S
            while self._process.poll() is None and time.monotonic() < ends_at and not self._cluster.ending:
                if self.address in self._cluster.living_addresses():
                    return
                time.sleep(0.5)
            self.kill()
            if self._cluster.ending:
                break
        raise RuntimeError(f"node {self.name} does not start; see {self._cluster.folder}/{self.name}.log")

    def popen(self, *command: str) -> subprocess.Popen[bytes]:
        """Start a program on this machine."""
        environment = {**os.environ, **ENVIRONMENT, "NODE_NOTICES": str(self.notice)}
        with (self._cluster.folder / f"{self.name}.log").open("ab") as log:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *command],
                env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def pids(self) -> list[int]:
        """Return all processes that run on this machine."""
        return pids_of(self.namespace)

    def added_niceness(self) -> int:
        """Return by how much the nicest process on this machine is nicer than this one."""
        found = 0
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                found = max(found, os.getpriority(os.PRIO_PROCESS, pid) - os.getpriority(os.PRIO_PROCESS, 0))
        return found

    def kill(self) -> int:
        """kill -9 everything on this machine, at once; return how many processes that were."""
        num_processes = kill_all(self.namespace)
        if self._process is not None:
            self._process.wait()
        return num_processes


class Cluster:
    """A head and its workers."""

    def __init__(self, folder: Path, python: str) -> None:
        self.folder = folder
        self.python = python
        self.ending = False
        self.ray = str(Path(python).with_name("ray"))
        self.nodes: list[Node] = []

    def add(self, name: str) -> Node:
        """Make a machine, with nothing on it."""
        node = Node(self, name, 10 + len(self.nodes))
        ip("netns", "add", node.namespace)
        self.nodes.append(node)
        host, inside = f"plv-{name}", f"plw-{name}"
        ip("link", "add", host, "type", "veth", "peer", "name", inside)
        ip("link", "set", inside, "netns", node.namespace)
        ip("link", "set", host, "master", BRIDGE, "up")
        ip("-n", node.namespace, "addr", "add", f"{node.address}/24", "dev", inside)
        ip("-n", node.namespace, "link", "set", inside, "up")
        ip("-n", node.namespace, "link", "set", "lo", "up")
        return node

    @property
    def head(self) -> Node:
        return self.nodes[0]

    @property
    def address(self) -> str:
        return f"{self.head.address}:{HEAD_PORT}"

    def run(self, *command: str, timeout_s: float = 300.0) -> str:
        """Run a program on the head to its end, and return what it printed.

        Raises:
            RuntimeError: it failed.
        """
        done = subprocess.run(
            ["ip", "netns", "exec", self.head.namespace, *command],
            env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=timeout_s,
        )  # fmt: skip
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command[:3])} failed: {done.stderr[-2000:]}{done.stdout[-500:]}")
        return done.stdout

    def living_addresses(self) -> set[str]:
        """Return the nodes that Ray holds alive."""
        script = (
            "import sys\nfrom ray._raylet import GcsClient\n"
            "found = GcsClient(address=sys.argv[1]).get_all_node_info(timeout=2)\n"
            "print(*(node.node_manager_address for node in found.values() if node.state == 0))"
        )
        try:
            return set(self.run(self.python, "-c", script, self.address, timeout_s=30.0).split())
        except (RuntimeError, subprocess.TimeoutExpired):
            return set()


def pids_of(namespace: str) -> list[int]:
    done = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True)
    return [int(pid) for pid in done.stdout.split()]


def kill_all(namespace: str) -> int:
    """kill -9 everything in a namespace, at once; return how many processes that were."""
    pids = pids_of(namespace)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return len(pids)


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise Unable(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@contextlib.contextmanager
def cluster(python: str) -> Iterator[Cluster]:
    """Make a network of machines, and take all of it away again, also when SIGTERM ends the program.

    What a run left that was killed is taken away first. There is one such network on a machine.

    Raises:
        Unable: that is not allowed here, or another program has one.
    """
    if os.geteuid() != 0 or shutil.which("ip") is None:
        raise Unable("network namespaces need root and the program ip")
    with _alone():
        sweep()
        found = Cluster(Path(tempfile.mkdtemp(prefix="plr-")), python)
        with _ended_by_sigterm(found):
            try:
                ip("link", "add", BRIDGE, "type", "bridge")
                ip("addr", "add", f"{SUBNET}.1/24", "dev", BRIDGE)
                ip("link", "set", BRIDGE, "up")
                yield found
            finally:
                failed = sys.exc_info()[0] not in (None, SystemExit)
                found.ending = True
                for node in reversed(found.nodes):
                    node.kill()
                sweep()
                if not failed and "KEEP_CLUSTER_LOGS" not in os.environ:
                    shutil.rmtree(found.folder, ignore_errors=True)


def namespaces() -> list[str]:
    """Return the namespaces that are machines of ours."""
    done = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True)
    return [line.split()[0] for line in done.stdout.splitlines() if line.startswith(NAMESPACE)]


def sweep() -> None:
    """Take away all machines and the network between them."""
    for namespace in namespaces():
        kill_all(namespace)
        for command in (("link", "del", f"plv-{namespace.removeprefix(NAMESPACE)}"), ("netns", "del", namespace)):
            with contextlib.suppress(Unable):
                ip(*command)
    with contextlib.suppress(Unable):
        ip("link", "del", BRIDGE)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Hold the machine's one network.

    Raises:
        Unable: another program has it.
    """
    with LOCK.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Unable("another cluster of network namespaces runs on this machine") from None
        yield


@contextlib.contextmanager
def _ended_by_sigterm(found: Cluster) -> Iterator[None]:
    """Have SIGTERM end the program in order: its machines first, so that nothing waits for them any more."""

    def end(number: int, _: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        found.ending = True
        for node in found.nodes:
            kill_all(node.namespace)
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
