"""Replicas killed at random under load, and more clients than there is room for; ``make soak`` has the long runs."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clients import Stream, stream
from pilotlight.artifact import Artifact
from pilotlight.metering.ledger_reader import LedgerReader
from pilotlight.metering.record import UsageRecord
from processes import named
from support import PATIENCE_S, ServerProcess, config_process

pytestmark = [pytest.mark.e2e, pytest.mark.model]

COMMON: dict[str, Any] = {"model": "demo", "return_token_ids": True, "ignore_eos": True, "logit_bias": {"2": -100}}
SEEDS = {1: 1, 2: 14, 4: 4, 5: 53, 7: 31, 8: 20, 10: 22, 11: 59}
"""With these no draw is near another token: noise a hundred times as large as rounding changes none of them."""


def body_of(number: int) -> dict[str, Any]:
    """Return one of twelve requests: greedy and seeded, short and long, with and without penalties."""
    kind = number % 12
    sampling: dict[str, Any] = {"temperature": 0}
    if kind % 3 == 1:
        sampling = {"temperature": 0.8, "seed": SEEDS[kind], "top_p": 0.9}
    elif kind % 3 == 2:
        sampling = {"temperature": 1.0, "seed": SEEDS[kind], "frequency_penalty": 0.5, "repetition_penalty": 1.2}
    prompt = [*range(3 + kind, 40 + 3 * kind)]
    return {**COMMON, **sampling, "prompt": prompt, "max_tokens": 20 + 10 * kind}


async def undisturbed(url: str) -> dict[int, list[int]]:
    answers = await asyncio.gather(*(stream(url, f"undisturbed-{kind}", body_of(kind)) for kind in range(12)))
    for kind, answer in enumerate(answers):
        assert len(answer.token_ids) == 20 + 10 * kind, answer
    return {kind: answer.token_ids for kind, answer in enumerate(answers)}


async def chaos(
    server: ServerProcess, duration_s: float, num_clients: int, kill_every_s: float, saw_enough: Callable[[], bool]
) -> Counter[str]:
    """Run clients one request after the other while replicas are killed; every answer must be the undisturbed one.

    It takes longer until ``saw_enough`` where little happens in ``duration_s``.
    """
    rng = random.Random(1)
    expected = await undisturbed(server.url)
    counts: Counter[str] = Counter()
    over = asyncio.Event()

    async def client(number: int) -> None:
        turn = 0
        while not over.is_set():
            kind = (number + 5 * turn) % 12
            answer = await stream(server.url, f"chaos-{number}-{turn}", body_of(kind))
            assert answer.done, answer
            assert answer.token_ids == expected[kind]
            assert answer.usage is not None
            assert answer.usage["completion_tokens"] == len(answer.token_ids)
            counts["streams"] += 1
            counts["tokens"] += len(answer.token_ids)
            turn += 1

    async def killer() -> None:
        begun_at = time.monotonic()
        while (lasts_s := time.monotonic() - begun_at) < duration_s or not saw_enough():
            assert lasts_s < duration_s + PATIENCE_S
            await asyncio.sleep(rng.uniform(0.2, 2) * kill_every_s)
            before = counts["streams"]
            while counts["streams"] == before:  # a replica needs the time to start, whatever that is here
                await asyncio.sleep(0.01)
            if replicas := named(server.process.pid, "pl-replica"):
                os.kill(rng.choice(replicas), signal.SIGKILL)
                counts["kills"] += 1
        over.set()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(killer())
        for number in range(num_clients):
            tasks.create_task(client(number))
    return counts


def run_chaos(artifact: Artifact, directory: Path, duration_s: float, kill_every_s: float) -> Counter[str]:
    config = directory / "pilotlight.toml"
    config.write_text(
        f"[functions.demo]\nartifact = '{artifact.path}'\nmin_replicas = 2\nmax_replicas = 2\nnum_slots = 4\n"
        "num_threads = 1\nmax_queued_requests = 1000\n"
    )
    ledger = directory / "usage.db"

    def saw_enough() -> bool:
        return sum(record.recomputed_tokens > 0 for record in records_of(ledger, "chaos-")) >= 3

    with config_process(config, ledger) as server:
        counts = asyncio.run(chaos(server, duration_s, 12, kill_every_s, saw_enough))
    records = records_of(directory / "usage.db", "chaos-")
    assert len(records) == counts["streams"]
    assert sum(record.completion_tokens for record in records) == counts["tokens"]
    assert {record.finish_reason.value for record in records} == {"length"}
    counts["recomputed"] = sum(record.recomputed_tokens for record in records)
    return counts


def records_of(ledger: Path, prefix: str) -> list[UsageRecord]:
    with LedgerReader(ledger) as reader:
        return [record for record in reader.records() if record.request_id.startswith(prefix)]


def test_killed_replicas_cost_no_stream_and_no_token(demo_fp32: Artifact, tmp_path: Path) -> None:
    counts = run_chaos(demo_fp32, tmp_path, duration_s=8, kill_every_s=0.8)
    assert counts["kills"] >= 3
    assert counts["recomputed"] > 0


@pytest.mark.soak
def test_five_minutes_of_killed_replicas(demo_fp32: Artifact, tmp_path: Path) -> None:
    counts = run_chaos(demo_fp32, tmp_path, duration_s=300, kill_every_s=1.5)
    print(f"chaos: {dict(counts)}")
    assert counts["kills"] > 100


async def overload(server: ServerProcess, num_clients: int) -> list[Stream]:
    """Send all requests before the first one is served, or it depends on the machine how many are too many."""
    (replica,) = named(server.process.pid, "pl-replica")
    os.kill(replica, signal.SIGSTOP)
    bodies = [{**body_of(number), "max_tokens": 16} for number in range(num_clients)]
    asked = [asyncio.create_task(stream(server.url, f"crowd-{n}", body)) for n, body in enumerate(bodies)]
    await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
    os.kill(replica, signal.SIGCONT)
    return await asyncio.gather(*asked)


def run_overload(artifact: Artifact, directory: Path, num_clients: int) -> Counter[str]:
    """Send all requests at once; everybody is served or refused, and nobody gets another's tokens."""
    config = directory / "pilotlight.toml"
    config.write_text(
        f"[host]\nhang_timeout_s = 3600\n[functions.demo]\nartifact = '{artifact.path}'\nmax_queued_requests = 200\n"
    )
    counts: Counter[str] = Counter()
    received = 0
    with config_process(config, directory / "usage.db") as server:
        expected = asyncio.run(undisturbed(server.url))
        for number, answer in enumerate(asyncio.run(overload(server, num_clients))):
            counts[str(answer.status)] += 1
            if answer.status == 200:
                assert answer.done, answer
                assert answer.token_ids == expected[number % 12][:16]
                received += len(answer.token_ids)
            else:
                assert answer.status == 503, answer
                assert int(answer.retry_after or 0) >= 1
        pids = [server.process.pid, *named(server.process.pid, "pl-replica")]
        counts["memory_mb"] = sum(resident_mb(pid) for pid in pids)
    records = records_of(directory / "usage.db", "crowd-")
    assert len(records) == counts["200"]
    assert sum(record.completion_tokens for record in records) == received
    assert sum(record.delivered_tokens for record in records) == received
    return counts


def resident_mb(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1000 for line in lines if line.startswith("VmHWM:"))


def test_a_crowd_is_served_or_refused(demo_fp32: Artifact, tmp_path: Path) -> None:
    counts = run_overload(demo_fp32, tmp_path, 400)
    assert counts["200"] + counts["503"] == 400
    assert counts["200"] >= 208
    assert counts["503"] > 0


@pytest.mark.soak
def test_two_thousand_streaming_clients(demo_fp32: Artifact, tmp_path: Path) -> None:
    counts = run_overload(demo_fp32, tmp_path, 2000)
    print(f"overload: {dict(counts)}")
    assert counts["200"] + counts["503"] == 2000
    assert counts["memory_mb"] < 1000
