"""Scaling out to several real replicas, and back to none."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from clients import stream
from pace import Pace
from pilotlight.artifact import Artifact
from pilotlight.metering.ledger_reader import LedgerReader
from processes import named, wait_for
from support import PATIENCE_S, ServerProcess, config_process

pytestmark = [pytest.mark.e2e, pytest.mark.model]

BODY: dict[str, Any] = {
    "model": "demo", "prompt": [*range(10, 26)], "max_tokens": 300, "return_token_ids": True, "temperature": 0,
    "ignore_eos": True, "logit_bias": {"2": -100},
}  # fmt: skip
"""Greedy behind this prompt, no two tokens are near each other: rounding, which hangs on the machine, changes none."""


def replicas(server: ServerProcess) -> list[int]:
    return named(server.process.pid, "pl-replica")


def served_by(ledger: Path) -> set[str]:
    with LedgerReader(ledger) as reader:
        return {record.replica_id for record in reader.records()}


async def load_until_two(server: ServerProcess, ledger: Path) -> list[list[int]]:
    """Keep more streams open than one replica has slots, until two have answered; return all answers."""
    answers: list[list[int]] = []
    enough = asyncio.Event()

    async def client(number: int) -> None:
        turn = 0
        while not enough.is_set():
            answer = await stream(server.url, f"load-{number}-{turn}", BODY)
            assert answer.done, answer
            answers.append(answer.token_ids)
            turn += 1

    async def watch() -> None:
        while len(await asyncio.to_thread(served_by, ledger)) < 2:
            await asyncio.sleep(0.05)
        enough.set()

    async with asyncio.TaskGroup() as group:
        for number in range(12):
            group.create_task(client(number))
        group.create_task(watch())
    return answers


def test_load_brings_a_second_replica_and_idleness_takes_both(demo_fp32: Artifact, tmp_path: Path) -> None:
    config = tmp_path / "pilotlight.toml"
    config.write_text(
        f"[functions.demo]\nartifact = '{demo_fp32.path}'\nmax_replicas = 2\nnum_slots = 1\nnum_threads = 1\n"
        "max_queued_requests = 1000\nidle_timeout_s = 1\nsleep = 'deep'\n"
    )
    ledger = tmp_path / "usage.db"
    with config_process(config, ledger) as server:
        assert replicas(server) == []
        answers = asyncio.run(asyncio.wait_for(load_until_two(server, ledger), 2 * PATIENCE_S))
        assert len({json.dumps(answer) for answer in answers}) == 1
        assert len(answers[0]) == 300
        before = served_by(ledger)
        wait_for(lambda: replicas(server) == [])
        again = httpx.post(f"{server.url}/v1/completions", json=BODY, timeout=PATIENCE_S).json()
        assert again["choices"][0]["token_ids"] == answers[0]
        assert len(served_by(ledger) - before) == 1, "it was started for this"


def test_a_prompt_goes_where_its_beginning_is_kept(demo_int4: Artifact, tmp_path: Path) -> None:
    config = tmp_path / "pilotlight.toml"
    config.write_text(
        f"[functions.demo]\nartifact = '{demo_int4.path}'\nmin_replicas = 2\nmax_replicas = 2\nnum_threads = 1\n"
    )
    prompt = [*range(3, 200)]
    pace = Pace(tmp_path)

    async def scenario(url: str) -> dict[str, Any] | None:
        asked = {**BODY, "prompt": prompt, "max_tokens": 2}
        with pace.slow():
            busy = asyncio.create_task(stream(url, "busy", {**BODY, "max_tokens": 400}))
            async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S) as http:
                while 'pilotlight_num_requests_running{function="demo"} 1.0' not in (await http.get("/metrics")).text:
                    await asyncio.sleep(0.01)
            assert (await stream(url, "first", asked)).done
        assert (await busy).done
        return (await stream(url, "again", asked)).usage

    ledger = tmp_path / "usage.db"
    with config_process(config, ledger, pace) as server:
        with httpx.Client(base_url=server.url, timeout=PATIENCE_S) as http:
            both = 'pilotlight_replica_start_seconds_count{function="demo",stage="fork"} 2.0'
            wait_for(lambda: both in http.get("/metrics").text)
        usage = asyncio.run(scenario(server.url))
        with LedgerReader(ledger) as reader:
            of = {record.request_id: record.replica_id for record in reader.records()}
    assert of["busy"] != of["first"], "the other one had less to do"
    assert of["again"] == of["first"]
    assert usage is not None
    assert usage["prompt_tokens_details"]["cached_tokens"] > 100
