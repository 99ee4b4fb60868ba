"""A fault run: clients that leave, replicas and hosts that are killed, and what must be in the ledger afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from pilotlight.metering.keyring import KeyDesk
from pilotlight.metering.keys import Limits
from pilotlight.metering.ledger import Ledger
from pilotlight.metering.ledger_reader import LedgerReader
from pilotlight.metering.record import UsageRecord
from pilotlight.request import FinishReason

NUM_WORKERS = 12
MAX_TOKENS = 150
TIMEOUT_S = 300.0
ENDS = {FinishReason.LENGTH, FinishReason.CANCELLED, FinishReason.CRASHED}
MIN_HOST_KILLS = 2
MIN_FINISHED = 5
"""How many answers have to come whole between two kills: on a slow machine nothing else would happen than starts."""


@dataclass
class Sent:
    """What a client knows of one request."""

    admitted: bool = False
    refused: bool = False
    finished: bool = False
    num_received: int = 0
    num_billed: int | None = None


@dataclass
class Run:
    """One server after another on one ledger, and the clients beside it."""

    artifact: Path
    ledger: Path
    duration_s: float
    kill_every_s: float
    seed: int = 0
    sent: dict[str, Sent] = field(default_factory=dict)
    kills: Counter[str] = field(default_factory=Counter)
    port: int = 0
    token: str = ""
    over: bool = False

    async def run(self) -> None:
        """Serve and ask until the time is up and enough was killed, and end the last server in order."""
        with KeyDesk(self.ledger) as desk:
            limits = Limits(tokens_per_day=10**12, requests_per_minute=10**9, max_concurrent=10**6)
            _, self.token = desk.create("faults", "faults", None, limits)
        ends_at = time.monotonic() + self.duration_s
        server = await self._start()
        clients = [asyncio.create_task(self._ask_on(worker)) for worker in range(NUM_WORKERS)]
        rng = random.Random(self.seed)
        while (now := time.monotonic()) < ends_at or (now < ends_at + TIMEOUT_S and not self._has_seen_all()):
            await asyncio.sleep(self.kill_every_s * rng.uniform(0.5, 1.5))
            await self._some_finish(clients)
            replicas = _descendants(server.pid)
            if replicas and rng.random() < 0.5:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rng.choice(replicas), signal.SIGKILL)
                self.kills["replica"] += 1
            else:
                server.kill()
                await server.wait()
                self.kills["host"] += 1
                server = await self._start()
        await self._some_finish(clients)
        self.over = True
        await asyncio.gather(*clients)
        server.terminate()
        assert await asyncio.wait_for(server.wait(), TIMEOUT_S) == 0

    def _has_seen_all(self) -> bool:
        """Return whether answers have ended in every way so far; on a slow machine it takes more than one kill."""
        with LedgerReader(self.ledger) as reader:
            ends = {record.finish_reason for record in reader.records()}
        return ends >= ENDS and self.kills["host"] >= MIN_HOST_KILLS

    async def _some_finish(self, clients: list[asyncio.Task[None]]) -> None:
        before = self._num_finished
        while self._num_finished < before + MIN_FINISHED:
            assert not any(client.done() for client in clients)
            await asyncio.sleep(0.01)

    @property
    def _num_finished(self) -> int:
        return sum(sent.finished for sent in self.sent.values())

    async def _start(self) -> asyncio.subprocess.Process:
        command = ["-m", "pilotlight", "serve", str(self.artifact), "--name", "demo", "--port", "0", "--slots", "6"]
        server = await asyncio.create_subprocess_exec(
            sys.executable, *command, "--ledger", str(self.ledger), stdout=subprocess.PIPE
        )
        assert server.stdout is not None
        async for line in server.stdout:
            if b"serving http" in line:
                self.port = int(line.split(b"/v1")[0].rpartition(b":")[2])
                return server
        raise AssertionError("the server did not start")

    async def _ask_on(self, worker: int) -> None:
        rng = random.Random(f"{self.seed}-{worker}")
        number = 0
        async with httpx.AsyncClient(timeout=TIMEOUT_S) as client:
            while not self.over:
                request_id = f"{worker}-{number}"
                number += 1
                sent = self.sent[request_id] = Sent()
                with contextlib.suppress(httpx.TransportError):
                    await self._ask(client, request_id, sent, rng)
                if not sent.admitted:
                    await asyncio.sleep(0.05)

    async def _ask(self, client: httpx.AsyncClient, request_id: str, sent: Sent, rng: random.Random) -> None:
        kind = rng.choice(["stream", "stream", "leave", "leave", "cancel", "whole", "leave at once"])
        body: dict[str, Any] = {
            "model": "demo",
            "prompt": "Once",
            "max_tokens": rng.randint(1, MAX_TOKENS),
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": kind != "whole",
            "stream_options": {"include_usage": True},
        }
        if kind == "whole":
            del body["stream_options"]
        url = f"http://127.0.0.1:{self.port}/v1"
        headers = {"x-request-id": request_id, "authorization": f"Bearer {self.token}"}
        leaves_after = rng.randint(0, body["max_tokens"]) if kind == "leave" else None
        async with client.stream("POST", f"{url}/completions", json=body, headers=headers) as response:
            sent.admitted = response.status_code == 200
            sent.refused = not sent.admitted
            if not sent.admitted or kind == "leave at once":
                return
            if kind == "whole":
                self._count(json.loads(await response.aread()), sent)
                return
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    sent.finished = True
                elif line.startswith("data: "):
                    self._count(json.loads(line.removeprefix("data: ")), sent)
                if leaves_after is not None and sent.num_received >= leaves_after:
                    return
                if kind == "cancel" and sent.num_received == 5:
                    await client.post(f"{url}/requests/{request_id}/cancel", headers=headers)

    @staticmethod
    def _count(frame: Mapping[str, Any], sent: Sent) -> None:
        for choice in frame.get("choices", ()):
            sent.num_received += len(choice.get("token_ids") or ())
        if frame.get("usage"):
            sent.num_billed = frame["usage"]["completion_tokens"]
            sent.finished = sent.finished or (frame["object"] == "text_completion" and bool(frame["choices"]))

    def check(self) -> Counter[str]:
        """Compare the ledger with what the clients know, and return how many ended in which way."""
        Ledger(self.ledger).close()  # closes what the last kill may have left open
        with LedgerReader(self.ledger) as reader:
            records = list(reader.records())
        by_id = {record.request_id: record for record in records}
        assert len(by_id) == len(records) == _num_admitted(self.ledger), "one record for each admission"
        assert by_id.keys() <= self.sent.keys()
        for request_id, sent in self.sent.items():
            self._check_one(request_id, sent, by_id.get(request_id))
        self._check_key(records)
        assert not [*self.ledger.parent.glob(f"{self.ledger.name}.marks-*")]
        return Counter(record.finish_reason.value for record in records)

    @staticmethod
    def _check_one(request_id: str, sent: Sent, record: UsageRecord | None) -> None:
        if sent.admitted:
            assert record is not None, f"{request_id} was answered and has no record"
        if record is None:
            return
        if sent.refused:
            assert record.finish_reason is FinishReason.REJECTED, f"{request_id} was refused: {record}"
        if sent.finished:
            assert record.completion_tokens == sent.num_received == sent.num_billed, f"{request_id}: {sent} {record}"
        assert sent.num_received <= record.completion_tokens <= MAX_TOKENS, f"{request_id}: {sent} {record}"

    def _check_key(self, records: list[UsageRecord]) -> None:
        """Nothing is still reserved, and the key's use is that of its records."""
        with contextlib.closing(sqlite3.connect(self.ledger)) as connection:
            rows = connection.execute("SELECT period, num_requests, num_tokens FROM key_use").fetchall()
        use = {period: (num_requests, num_tokens) for period, num_requests, num_tokens in rows}
        days = [counts for period, counts in use.items() if len(period) == 10]
        tokens = sum(record.prompt_tokens + record.completion_tokens for record in records)
        assert use["open"] == (0, 0)
        assert (sum(day[0] for day in days), sum(day[1] for day in days)) == (len(records), tokens)


def _num_admitted(ledger: Path) -> int:
    with contextlib.closing(sqlite3.connect(ledger)) as connection:
        (found,) = connection.execute("SELECT count(*) FROM invocations").fetchone()
    return int(found)


def _descendants(pid: int) -> list[int]:
    """Return the processes below a server: what forks its replicas, and the replicas."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:  # it has just ended
        return []
    return [*children, *(deeper for child in children for deeper in _descendants(child))]
