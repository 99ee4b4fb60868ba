"""Swaps, canaries and `pilotlight ps`, on real servers under real streams."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from pilotlight.artifact import WEIGHTS, Artifact, open_artifact, sha256_of
from pilotlight.metering.ledger_reader import LedgerReader
from processes import named, wait_for
from support import PATIENCE_S, ServerProcess, config_process, server_process

pytestmark = [pytest.mark.e2e, pytest.mark.model]

BODY: dict[str, Any] = {
    "model": "demo", "prompt": [*range(5, 21)], "max_tokens": 60, "return_token_ids": True, "temperature": 0,
    "ignore_eos": True, "logit_bias": {"2": -100},
}  # fmt: skip


@pytest.fixture
def server(demo_fp32: Artifact, tmp_path: Path) -> Iterator[ServerProcess]:
    with server_process(demo_fp32.path, tmp_path / "usage.db") as server:
        yield server


def answer(url: str) -> list[int]:
    found: list[int] = httpx.post(f"{url}/v1/completions", json=BODY, timeout=PATIENCE_S).json()["choices"][0][
        "token_ids"
    ]
    return found


def swap(server: ServerProcess, artifact: Path, *options: str) -> subprocess.CompletedProcess[str]:
    port = server.url.rpartition(":")[2]
    command = [sys.executable, "-m", "pilotlight", "swap", "demo", str(artifact), "--port", port, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)


def status(server: ServerProcess) -> dict[str, Any]:
    command = [sys.executable, "-m", "pilotlight", "ps", "--json", "--port", server.url.rpartition(":")[2]]
    found: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found


async def stream(http: httpx.AsyncClient, name: str) -> list[int]:
    """Return the tokens of one stream, which must end as it should."""
    tokens: list[int] = []
    done = False
    async with http.stream(
        "POST", "/v1/completions", json={**BODY, "stream": True}, headers={"x-request-id": name}
    ) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            done = done or line == "data: [DONE]"
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                for choice in event["choices"]:
                    tokens += choice.get("token_ids", ())
    assert done
    return tokens


async def swaps_under_streams(
    server: ServerProcess, artifacts: list[Path], num_swaps: int, num_streams: int
) -> Counter[tuple[int, ...]]:
    """Swap to and fro while streams run, one after the other on each connection; count the answers."""
    answers: Counter[tuple[int, ...]] = Counter()
    over = asyncio.Event()

    async def client(number: int) -> None:
        turn = 0
        while not over.is_set():
            answers[tuple(await stream(http, f"stream-{number}-{turn}"))] += 1
            turn += 1

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S, limits=limits) as http:
        clients = [asyncio.create_task(client(number)) for number in range(num_streams)]
        for number in range(num_swaps):
            body = {"artifact": str(artifacts[number % len(artifacts)])}
            swapped = await http.post("/admin/functions/demo/swap", json=body)
            assert swapped.status_code == 200, swapped.text
            target = answers.total() + 2 * num_streams
            while answers.total() < target:
                await asyncio.sleep(0.01)
        over.set()
        await asyncio.gather(*clients)
    return answers


def check_swaps(fp32: Artifact, other: Path, directory: Path, num_swaps: int, num_streams: int) -> None:
    config = directory / "pilotlight.toml"
    config.write_text(f"[functions.demo]\nartifact = '{fp32.path}'\nmax_queued_requests = 1000\n")
    with config_process(config, directory / "usage.db") as server:
        old = answer(server.url)
        assert swap(server, other).returncode == 0
        new = answer(server.url)
        assert old != new
        answers = asyncio.run(swaps_under_streams(server, [fp32.path, other], num_swaps, num_streams))
        assert set(answers) == {tuple(old), tuple(new)}, (
            "each stream is one version's, from its first to its last token"
        )
        with LedgerReader(directory / "usage.db") as reader:
            records = [record for record in reader.records() if record.request_id.startswith("stream-")]
        assert len(records) == answers.total()
        assert {record.completion_tokens for record in records} == {60}
        assert len({record.artifact_digest for record in records}) == 2


@pytest.fixture(scope="module")
def other(demo_fp32: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact in fp32, whose tokens don't depend on who runs beside it, that answers something else."""
    target = copy_with(demo_fp32, tmp_path_factory.mktemp("other") / "other", {})
    weights = target / WEIGHTS
    (np.fromfile(weights, np.float32) * np.float32(0.9)).tofile(weights)
    manifest = json.loads((target / "manifest.json").read_text())
    manifest["files"][WEIGHTS]["sha256"] = sha256_of(weights)
    manifest["probe"] = None
    (target / "manifest.json").write_text(json.dumps(manifest))
    return target


def test_swaps_under_streams(demo_fp32: Artifact, other: Path, tmp_path: Path) -> None:
    check_swaps(demo_fp32, other, tmp_path, num_swaps=3, num_streams=8)


@pytest.mark.soak
def test_twenty_swaps_under_fifty_streams(demo_fp32: Artifact, other: Path, tmp_path: Path) -> None:
    check_swaps(demo_fp32, other, tmp_path, num_swaps=20, num_streams=50)


def test_a_canary_gets_its_share(server: ServerProcess, other: Path) -> None:
    old = answer(server.url)
    done = swap(server, other, "--canary", "25%")
    assert done.returncode == 0, done.stderr
    assert "canary" in done.stdout
    answers = [answer(server.url) == old for _ in range(8)]
    assert answers.count(False) == 2
    assert [one["role"] for one in status(server)["functions"][0]["versions"]] == ["current", "canary"]
    assert swap(server, other).returncode == 0
    assert answer(server.url) != old


def test_what_cannot_be_swapped_changes_nothing(server: ServerProcess, demo_int4: Artifact, tmp_path: Path) -> None:
    old = answer(server.url)
    missing = swap(server, tmp_path / "none")
    assert (missing.returncode, missing.stderr) == (1, f"pilotlight: {tmp_path / 'none'}: does not exist\n")
    swapping = f"{server.url}/admin/functions/demo/swap"
    refused = httpx.post(swapping, json={"artifact": "a\0b"}, timeout=PATIENCE_S)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "artifact")
    altered = copy_with(demo_int4, tmp_path / "altered", {})
    (altered / "model.onnx.data").write_bytes(b"x" * (demo_int4.path / "model.onnx.data").stat().st_size)
    assert "was altered" in swap(server, altered).stderr
    probe = demo_int4.manifest.probe
    assert probe is not None
    assert probe.token_ids, "the demo model is sure of its words"
    wrong = {"probe": {"prompt_ids": probe.prompt_ids, "token_ids": [1, 2, 3]}}
    assert "where its manifest has [1, 2, 3]" in swap(server, copy_with(demo_int4, tmp_path / "wrong", wrong)).stderr
    assert answer(server.url) == old
    (function,) = status(server)["functions"]
    assert [version["role"] for version in function["versions"]] == ["current"]


def test_where_memory_does_not_allow_both_the_old_one_drains_first(
    demo_fp32: Artifact, other: Path, tmp_path: Path
) -> None:
    config = tmp_path / "pilotlight.toml"
    config.write_text(f"[host]\nmemory_budget_mb = 90\n[functions.demo]\nartifact = '{demo_fp32.path}'\n")
    with config_process(config, tmp_path / "usage.db") as server:
        old = answer(server.url)
        assert len(named(server.process.pid, "pl-replica")) == 1
        answers = asyncio.run(swaps_under_streams(server, [other], 1, 4))
        new = answer(server.url)
        assert set(answers) <= {tuple(old), tuple(new)}
        assert old != new
        (function,) = status(server)["functions"]
        assert sum(len(version["replicas"]) for version in function["versions"]) == 1


def test_ps_shows_what_runs_and_wakes_nothing(server: ServerProcess) -> None:
    (function,) = status(server)["functions"]
    (version,) = function["versions"]
    assert (function["name"], version["sleep"], version["replicas"]) == ("demo", "deep", [])
    answer(server.url)
    wait_for(lambda: status(server)["functions"][0]["versions"][0]["num_open"] == 0)
    (replica,) = status(server)["functions"][0]["versions"][0]["replicas"]
    assert replica["pid"] in named(server.process.pid, "pl-replica")
    assert replica["state"] == "ready"
    assert replica["session_ms"] > 0
    command = [sys.executable, "-m", "pilotlight", "ps", "--port", server.url.rpartition(":")[2]]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[0].split()[:5] == ["function", "version", "role", "replica", "state"]
    assert lines[1].split()[4] == "ready"
    wrong = subprocess.run([*command[:-1], "1"], capture_output=True, text=True)
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("pilotlight: no server answers at 127.0.0.1:1")


def copy_with(source: Artifact, target: Path, changes: dict[str, Any]) -> Path:
    """Copy an artifact with a changed manifest."""
    target.mkdir()
    for file in source.path.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((target / "manifest.json").read_text())
    (target / "manifest.json").write_text(json.dumps({**manifest, **changes}))
    open_artifact(target)
    return target
