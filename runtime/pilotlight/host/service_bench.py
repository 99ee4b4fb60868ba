"""What a host adds to an artifact's own speed: starts out of both sleeps, its share of the first token's time.

A real server is started on a free port of loopback, with one function that stays awake and two that fall asleep at
once, and asked over HTTP: in a mixture as functions have it, and in bursts. What its answers took beyond the session's
own runs is the host's.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pilotlight.artifact import Artifact
from pilotlight.engine.profile import PROMPT_TOKENS
from pilotlight.errors import StartFailed
from pilotlight.host.memory import private_bytes
from pilotlight.host.mixed_load import Answer, Asked, MixFindings, Speeds, mixed_load
from pilotlight.host.rates import HostRates, StartRates
from pilotlight.scratch import scratch

ROUNDS = 3
WAKINGS = 4
NUM_BUSY = 16
NUM_COUNTED = 32
STREAMED_TOKENS = 48
NUM_STREAMS = 8
STREAM_ROUNDS = 5
PAUSE_S = 0.05
"""Between two requests of which the second should find the processor as a lone request does."""

GROWING_STEPS, GROWING_SHARE = 16, 0.3
"""Steps that are timed while a replica grows: no more than would take that share of the growing alone."""

GROWTHS = 4
"""After so many times as long as one replica takes to grow, three have grown beside each other."""

READ_BYTES = 1 << 16
AWAKE, LIGHT, DEEP = "awake", "light", "deep"


@dataclass(frozen=True)
class Served:
    """What was found."""

    starts: StartRates
    host: HostRates
    replica_bytes: int | None


@dataclass(frozen=True)
class Streamed:
    """One stream, whose usage nobody has read yet."""

    num_prompt_tokens: int
    num_new_tokens: int
    sent_at: float
    first_ms: float
    ended_at: float
    request_id: str


@dataclass
class ServiceBench:
    """Measures a server of one artifact."""

    artifact: Artifact
    num_threads: int
    cache_dir: str
    _random: random.Random = field(default_factory=lambda: random.Random(0))

    def measure(self, speeds: Speeds, grow_s: float = 0.0) -> Served:
        """Start a server, ask it, and end it. ``grow_s``: how long a replica takes to grow when nothing is beside it.

        Raises:
            StartFailed: it cannot be started.
        """
        with self._server() as (process, port):
            for name in (AWAKE, LIGHT, DEEP):
                self._ask(port, name, 16, 4)  # keeps the graphs, makes the template, and has the session begin to grow
            time.sleep(GROWTHS * grow_s)
            host = self._host_rates(port, process.pid, speeds)
            starts = self._start_rates(port, speeds, host, grow_s)
            replica_bytes = self._replica_bytes(port)
        return Served(starts, host, replica_bytes)

    def _host_rates(self, port: int, pid: int, speeds: Speeds) -> HostRates:
        answers = self._mixed(port, speeds)
        one_token_ms, many_tokens_ms = (self._busy_ms(port, pid, count) for count in (1, STREAMED_TOKENS))
        token_busy_ms = max(0.0, (many_tokens_ms - one_token_ms) / (STREAMED_TOKENS - 1))
        beside_others_ms = self._slower_ms(port, speeds, NUM_STREAMS)
        crowded_factor = self._crowded_factor(port, min(256, self._context - 1))
        found = MixFindings.of(answers + self._mixed(port, speeds), speeds)
        row_ms = (beside_others_ms - found.step_ms) / (NUM_STREAMS - 1)
        return HostRates(
            request_ms=round(found.request_ms, 3),
            prompt_token_ms=round(found.prompt_token_ms, 5),
            request_busy_ms=round(max(0.0, one_token_ms - token_busy_ms), 3),
            token_busy_ms=round(token_busy_ms, 4),
            prefill_factor=round(found.prefill_factor, 4),
            crowded_factor=round(crowded_factor, 4),
            idle_prefill_factor=round(found.idle_prefill_factor, 4),
            step_ms=round(found.step_ms - row_ms, 4),
            row_ms=round(row_ms, 4),
        )

    def _mixed(self, port: int, speeds: Speeds) -> list[Answer]:
        """Ask as functions are asked; the usage is read when all is over, since reading it is work for the server."""
        load = mixed_load(speeds, self._context, self._random)
        begun_at = time.perf_counter()

        def ask(one: Asked) -> Streamed:
            time.sleep(max(0.0, begun_at + one.at_s - time.perf_counter()))
            return self._stream(port, AWAKE, one.num_prompt_tokens, one.num_new_tokens)

        with ThreadPoolExecutor(len(load)) as clients:
            streams = list(clients.map(ask, load))
        return [self._answer(port, one) for one in streams]

    def _burst(self, port: int, num_prompt_tokens: int, num_new_tokens: int, num_requests: int) -> list[Answer]:
        """Ask for so many answers, ``NUM_STREAMS`` of them at a time."""
        with ThreadPoolExecutor(NUM_STREAMS) as clients:
            asked = [
                clients.submit(self._stream, port, AWAKE, num_prompt_tokens, num_new_tokens)
                for _ in range(num_requests)
            ]
        return [self._answer(port, one.result()) for one in asked]

    def _crowded_factor(self, port: int, size: int) -> float:
        """Return how many times as long prompts take while the server answers, without a pause, requests that are no
        replica's business.
        """
        plain_ms = flooded_ms = 0.0
        for _ in range(ROUNDS):
            plain_ms += self._prompts_ms(port, size)
            with self._flood(port):
                flooded_ms += self._prompts_ms(port, size)
        return max(1.0, flooded_ms / plain_ms)

    def _prompts_ms(self, port: int, size: int) -> float:
        return float(sum(one.record["prefill_ms"] for one in self._burst(port, size, 1, NUM_BUSY)))

    @contextlib.contextmanager
    def _flood(self, port: int) -> Iterator[None]:
        ended = threading.Event()

        def flood() -> None:
            while not ended.is_set():
                _get(port, "/v1/models")

        with ThreadPoolExecutor(1) as flooding:
            flooded = flooding.submit(flood)
            try:
                yield
            finally:
                ended.set()
                flooded.result()

    def _slower_ms(self, port: int, speeds: Speeds, num_streams: int) -> float:
        """Return how much longer a decode step of so many streams takes than in the engine alone."""
        length = PROMPT_TOKENS - STREAMED_TOKENS // 2
        found: list[float] = []
        for _ in range(STREAM_ROUNDS):
            time.sleep(PAUSE_S)
            answers = self._burst(port, length, STREAMED_TOKENS, num_streams)
            # prompts were read between the first steps of some; the last to begin had none beside it
            found.append(min(one.record["decode_ms"] for one in answers) / (STREAMED_TOKENS - 1))
        return statistics.median(found) - speeds.step_ms(num_streams)

    def _busy_ms(self, port: int, pid: int, num_tokens: int) -> float:
        """Return the processor time that the server itself spends on a request."""
        before_s = _processor_s(pid)
        for _ in range(NUM_COUNTED):
            self._stream(port, AWAKE, 64, num_tokens)
        return 1000 * (_processor_s(pid) - before_s) / NUM_COUNTED

    def _start_rates(self, port: int, speeds: Speeds, host: HostRates, grow_s: float) -> StartRates:
        starts: dict[str, list[float]] = {LIGHT: [], DEEP: []}
        cold_ms: dict[tuple[str, int], list[float]] = {}
        short, long = 64, min(256, self._context // 2)
        in_growing = int(GROWING_SHARE * 1000 * grow_s / speeds.lean_step_ms(long, host))
        num_steps = min(GROWING_STEPS, in_growing, self._context // 4)
        slower: list[float] = []
        for _ in range(WAKINGS):
            for name, size in ((LIGHT, short), (DEEP, long), (LIGHT, long), (DEEP, short)):
                self._wait_for_sleep(port, name)
                record = self._ask(port, name, size, 1 + num_steps).record
                starts[name].append(record["cold_start_ms"])
                usual_ms = host.idle_prefill_factor * speeds.first_prompt_ms(size)
                cold_ms.setdefault((name, size), []).append(record["prefill_ms"] - usual_ms)
                if num_steps:
                    usual_ms = num_steps * speeds.lean_step_ms(size + num_steps / 2, host)
                    slower.append(record["decode_ms"] / usual_ms)
        later = {key: statistics.median(found) for key, found in cold_ms.items()}
        slopes = [(later[name, long] - later[name, short]) / (long - short) for name in (LIGHT, DEEP)]
        per_token = max(0.0, statistics.fmean(slopes))
        return StartRates(
            deep_ms=statistics.median(starts[DEEP]),
            light_ms=statistics.median(starts[LIGHT]),
            template_ms=statistics.median(starts[DEEP]),
            deep_first_run_ms=round(max(0.0, later[DEEP, short] - per_token * short), 3),
            light_first_run_ms=round(max(0.0, later[LIGHT, short] - per_token * short), 3),
            first_token_ms=round(per_token, 5),
            growing_factor=round(max(1.0, statistics.median(slower)), 4) if slower else 1.0,
        )

    @property
    def _context(self) -> int:
        return min(self.artifact.manifest.shapes.max_context_tokens, 1024)

    def _replica_bytes(self, port: int) -> int | None:
        versions = next(one for one in _functions(port) if one["name"] == AWAKE)["versions"]
        pids = [replica["pid"] for version in versions for replica in version["replicas"]]
        return private_bytes(pids[0]) if pids and pids[0] else None

    def _wait_for_sleep(self, port: int, name: str) -> None:
        while True:
            function = next(one for one in _functions(port) if one["name"] == name)
            if all(not version["replicas"] and version["sleep"] == name for version in function["versions"]):
                return
            time.sleep(0.02)

    def _ask(self, port: int, name: str, num_prompt_tokens: int, num_new_tokens: int) -> Answer:
        return self._answer(port, self._stream(port, name, num_prompt_tokens, num_new_tokens))

    def _answer(self, port: int, one: Streamed) -> Answer:
        record = _get(port, f"/v1/usage/{one.request_id}")
        return Answer(one.num_prompt_tokens, one.num_new_tokens, one.sent_at, one.first_ms, one.ended_at, record)

    def _stream(self, port: int, name: str, num_prompt_tokens: int, num_new_tokens: int) -> Streamed:
        ids = self._random.choices(range(3, min(400, self.artifact.manifest.shapes.vocab_size)), k=num_prompt_tokens)
        body = {"model": name, "prompt": ids, "max_tokens": num_new_tokens, "stream": True, "temperature": 0,
                "ignore_eos": True, "return_token_ids": True}  # fmt: skip
        encoded = json.dumps(body).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(encoded)}\r\n\r\n"
        )
        sent_at, first_at = time.perf_counter(), None
        received = bytearray()
        with socket.create_connection(("127.0.0.1", port), timeout=600) as connection:
            connection.sendall(head.encode() + encoded)
            while piece := connection.recv(READ_BYTES):
                received += piece
                if first_at is None and b"data: {" in received:
                    first_at = time.perf_counter()
        request_id = re.search(rb"(?i)x-request-id: (\S+)", received)
        if first_at is None or request_id is None:
            raise StartFailed(f"the server answers {bytes(received[:200])!r}")
        first_ms, ended_at = 1000 * (first_at - sent_at), time.perf_counter()
        return Streamed(num_prompt_tokens, num_new_tokens, sent_at, first_ms, ended_at, request_id[1].decode())

    @contextlib.contextmanager
    def _server(self) -> Iterator[tuple[subprocess.Popen[str], int]]:
        with scratch("pilotlight-bench-") as directory:
            config = directory / "pilotlight.toml"
            config.write_text(self._config(directory), encoding="utf-8")
            command = [sys.executable, "-m", "pilotlight", "serve", "--config", str(config), "--port", "0"]
            environment = {key: value for key, value in os.environ.items() if not key.startswith("PILOTLIGHT_")}
            process = subprocess.Popen(  # noqa: S603
                command, stdout=subprocess.PIPE, text=True, env=environment
            )
            with process:
                try:
                    assert process.stdout is not None
                    found = (re.search(r"serving http://\S+:(\d+)/v1", line) for line in process.stdout)
                    port = next((int(match[1]) for match in found if match), None)
                    if port is None:
                        raise StartFailed("the server ends before it serves")
                    yield process, port
                finally:
                    process.terminate()

    def _config(self, directory: Path) -> str:
        ledger, cache_dir = json.dumps(f"{directory}/usage.db"), json.dumps(self.cache_dir)
        artifact = json.dumps(str(self.artifact.path.resolve()))
        tables = [f"[host]\nledger = {ledger}\ncache_dir = {cache_dir}\n"]
        for name, sleep, idle_timeout_s in ((AWAKE, LIGHT, 3600.0), (LIGHT, LIGHT, 0.0), (DEEP, DEEP, 0.0)):
            tables.append(
                f"[functions.{name}]\nartifact = {artifact}\nnum_threads = {self.num_threads}\n"
                f'idle_timeout_s = {idle_timeout_s}\nsleep = "{sleep}"\nmax_context_tokens = {self._context}\n'
                'speculation = "off"\n'
            )
        return "\n".join(tables)


def _functions(port: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = _get(port, "/admin/functions")["functions"]
    return found


def _get(port: int, path: str) -> dict[str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", path)
        answer: dict[str, Any] = json.loads(connection.getresponse().read())
        return answer


def _processor_s(pid: int) -> float:
    """Return the processor time that a process has used, its children's left out."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
