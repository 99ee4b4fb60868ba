"""Real hosts, zygotes and replicas: what happens to streams and processes when one of them is killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from pace import Pace
from pilotlight.artifact import Artifact
from pilotlight.engine.policy import Policy
from pilotlight.host.launcher import ZygoteLauncher
from pilotlight.host.wire import FromReplica, ReplicaSpec
from pilotlight.metering.ledger_reader import LedgerReader
from processes import descendants, is_alive, named, wait_for
from support import PATIENCE_S, ServerProcess, config_process, server_process

pytestmark = [pytest.mark.e2e, pytest.mark.model]

BODY: dict[str, Any] = {
    "model": "demo", "prompt": "Once", "max_tokens": 300, "ignore_eos": True, "return_token_ids": True,
}  # fmt: skip
SEEDED = {"temperature": 0.9, "seed": 54, "frequency_penalty": 0.3, "repetition_penalty": 1.1}
"""With this seed no draw is near another token: noise a hundred times as large as rounding changes none of them."""
GREEDY = {"temperature": 0.0}


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("host") / "usage.db"


@pytest.fixture(scope="module")
def pace(tmp_path_factory: pytest.TempPathFactory) -> Pace:
    """How fast the models of the servers run."""
    return Pace(tmp_path_factory.mktemp("pace"))


@pytest.fixture(scope="module")
def server(demo_fp32: Artifact, ledger: Path, pace: Pace) -> Iterator[ServerProcess]:
    with server_process(demo_fp32.path, ledger, pace=pace) as server:
        yield server


def client_of(server: ServerProcess) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=PATIENCE_S)


@pytest.fixture
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    with client_of(server) as http:
        yield http


def token_ids(lines: Iterator[str]) -> Iterator[int]:
    for line in lines:
        if line.startswith("data: {"):
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            for choice in event["choices"]:
                yield from choice.get("token_ids", ())


def replica_of(server: ServerProcess) -> int:
    found: list[int] = []

    def is_there() -> bool:
        found[:] = named(server.process.pid, "pl-replica")
        return bool(found)

    wait_for(is_there)
    return found[0]


def is_gone(pid: int) -> bool:
    return not is_alive(pid)


def undisturbed(http: httpx.Client, **sampling: Any) -> list[int]:
    answer = http.post("/v1/completions", json={**BODY, **sampling})
    found: list[int] = answer.json()["choices"][0]["token_ids"]
    assert len(found) == 300
    return found


def test_an_idle_host_has_a_zygote_and_no_replica(demo_fp32: Artifact, tmp_path: Path) -> None:
    with server_process(demo_fp32.path, tmp_path / "usage.db") as server, client_of(server) as http:
        for path in ("/livez", "/readyz", "/metrics", "/v1/models"):
            assert http.get(path).status_code == 200
        assert http.post("/v1/completions", json={**BODY, "prompt": "word " * 3000}).status_code == 400
        assert http.post("/v1/completions", json={**BODY, "temperature": -1}).status_code == 400
        (zygote,) = descendants(server.process.pid)
        assert named(zygote, "pl-replica") == []


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_a_killed_replica_costs_no_token(
    server: ServerProcess, http: httpx.Client, ledger: Path, pace: Pace, sampling: dict[str, Any]
) -> None:
    whole = undisturbed(http, **sampling)
    received = []
    streamed = {**BODY, **sampling, "stream": True}
    with pace.slow(60), http.stream("POST", "/v1/completions", json=streamed) as response:
        for token_id in token_ids(response.iter_lines()):
            received.append(token_id)
            if len(received) in (3, 40, 90):
                replica = replica_of(server)
                os.kill(replica, signal.SIGKILL)
                wait_for(partial(is_gone, replica))
            if len(received) == 90:
                pace.hurry()
    assert received == whole
    with LedgerReader(ledger) as reader:
        record = reader.get(response.headers["x-request-id"])
    assert record is not None
    assert record.completion_tokens == 300
    assert record.recomputed_tokens > 0


def test_light_sleep_and_what_wakes_from_it(demo_fp32: Artifact, tmp_path: Path, pace: Pace) -> None:
    config = tmp_path / "pilotlight.toml"
    config.write_text(f"[functions.demo]\nartifact = '{demo_fp32.path}'\nidle_timeout_s = 0.5\n")
    ledger = tmp_path / "usage.db"
    with config_process(config, ledger, pace) as server, client_of(server) as http:
        whole = undisturbed(http, **SEEDED)
        wait_for(lambda: named(server.process.pid, "pl-template") and not named(server.process.pid, "pl-replica"))
        (template,) = named(server.process.pid, "pl-template")
        http.get("/metrics")
        received = []
        streamed = {**BODY, **SEEDED, "stream": True}
        with pace.slow(160), http.stream("POST", "/v1/completions", json=streamed) as response:
            for token_id in token_ids(response.iter_lines()):
                received.append(token_id)
                if len(received) == 1:
                    assert named(template, "pl-replica")
                if len(received) == 150:
                    os.kill(template, signal.SIGKILL)
                    pace.hurry()
        assert received == whole
        with LedgerReader(ledger) as reader:
            record = reader.get(response.headers["x-request-id"])
    assert record is not None
    assert record.cold_start_ms > 0
    assert record.fork_ms > 0
    assert record.session_ms == 0, "the session was inherited"
    assert record.recomputed_tokens > 0


def test_a_killed_zygote_costs_no_token(server: ServerProcess, http: httpx.Client, pace: Pace) -> None:
    whole = undisturbed(http, **GREEDY)
    received = []
    streamed = {**BODY, **GREEDY, "stream": True}
    with pace.slow(40), http.stream("POST", "/v1/completions", json=streamed) as response:
        for token_id in token_ids(response.iter_lines()):
            received.append(token_id)
            if len(received) == 20:
                (zygote,) = named(server.process.pid, "pl-zygote")
                os.kill(zygote, signal.SIGKILL)
                pace.hurry()
    assert received == whole


class Unheard:
    """A listener to whom nothing matters."""

    def received(self, message: FromReplica) -> None:
        pass

    def ended(self, cause: str) -> None:
        pass


def test_a_zygote_that_has_just_died_is_replaced_before_anybody_hears_of_it() -> None:
    async def scenario() -> None:
        launcher = ZygoteLauncher()
        launcher.start()
        dead = launcher.pid
        assert dead is not None
        os.kill(dead, signal.SIGKILL)
        wait_for(lambda: not is_alive(dead))
        try:
            link = launcher.launch(ReplicaSpec("r", "nowhere", 1, 64, Policy(), 1, None, 0.0), Unheard())
            assert launcher.pid not in (None, dead)
            link.close()
        finally:
            launcher.close()

    asyncio.run(scenario())


def test_nobody_outlives_a_killed_host(demo_fp32: Artifact, tmp_path: Path) -> None:
    with server_process(demo_fp32.path, tmp_path / "usage.db") as server:
        httpx.post(f"{server.url}/v1/completions", json={**BODY, "max_tokens": 1}, timeout=PATIENCE_S)
        family = descendants(server.process.pid)
        assert len(family) >= 2
        os.kill(family[-1], signal.SIGSTOP)  # one that does nothing any more must not stay either
        os.kill(server.process.pid, signal.SIGKILL)
        wait_for(lambda: not any(is_alive(pid) for pid in family))


def test_nobody_outlives_a_host_that_ends(demo_fp32: Artifact, tmp_path: Path) -> None:
    with server_process(demo_fp32.path, tmp_path / "usage.db") as server:
        httpx.post(f"{server.url}/v1/completions", json={**BODY, "max_tokens": 1}, timeout=PATIENCE_S)
        family = descendants(server.process.pid)
    assert server.process.returncode == 0
    wait_for(lambda: not any(is_alive(pid) for pid in family))


def test_signals_to_the_whole_group_let_streams_finish(
    demo_fp32: Artifact, tmp_path: Path, pace: Pace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PILOTLIGHT_DRAIN_TIMEOUT_S", str(PATIENCE_S))
    with server_process(demo_fp32.path, tmp_path / "usage.db", pace=pace) as server, client_of(server) as http:
        with pace.slow(), http.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as response:
            ids = token_ids(response.iter_lines())
            received = [next(ids)]
            for pid in (*descendants(server.process.pid), server.process.pid):
                os.kill(pid, signal.SIGTERM)
            pace.hurry()
            received += ids
        assert len(received) == 300
        assert server.process.wait(PATIENCE_S) == 0


def test_a_graph_that_cannot_be_loaded_is_told_to_the_client(demo_fp32: Artifact, tmp_path: Path) -> None:
    artifact = damaged_copy(demo_fp32.path, tmp_path / "damaged")
    with server_process(artifact, tmp_path / "usage.db") as server, client_of(server) as http:
        first = http.post("/v1/completions", json=BODY)
        assert first.status_code == 503
        assert first.json()["error"]["code"] == "start_failed"
        assert "ONNX Runtime cannot load it" in first.json()["error"]["message"]
        assert str(tmp_path) not in first.text
        assert int(first.headers["retry-after"]) >= 1
        again = http.post("/v1/completions", json=BODY)
        assert again.status_code == 503
        assert "ONNX Runtime cannot load it" in again.json()["error"]["message"]
        assert http.get("/livez").status_code == 200


def damaged_copy(source: Path, target: Path) -> Path:
    """Copy an artifact with a graph that is no graph, and a manifest which says that this is right."""
    import hashlib

    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    (target / "model.onnx").write_bytes(b"no graph")
    manifest = json.loads((target / "manifest.json").read_text())
    manifest["files"]["model.onnx"] = {"sha256": hashlib.sha256(b"no graph").hexdigest(), "size_bytes": 8}
    (target / "manifest.json").write_text(json.dumps(manifest))
    return target


def test_a_frozen_replica_is_replaced(
    demo_fp32: Artifact, tmp_path: Path, pace: Pace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PILOTLIGHT_HANG_TIMEOUT_S", "3")
    with server_process(demo_fp32.path, tmp_path / "usage.db", pace=pace) as server, client_of(server) as http:
        whole = undisturbed(http, **GREEDY)
        received = []
        streamed = {**BODY, **GREEDY, "stream": True}
        with pace.slow(20), http.stream("POST", "/v1/completions", json=streamed) as response:
            for token_id in token_ids(response.iter_lines()):
                received.append(token_id)
                if len(received) == 5:
                    replica = replica_of(server)
                    os.kill(replica, signal.SIGSTOP)
                    pace.hurry()
        assert received == whole
