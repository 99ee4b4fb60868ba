"""What a function takes of a GPU, and what metrics and clients see of that; the GPU is a fake, the session is not."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from pilotlight.api.metrics import Metrics
from pilotlight.artifact import Artifact, KvLayout, Shapes
from pilotlight.config import FunctionSettings, HostSettings
from pilotlight.engine.fake import FakeSession
from pilotlight.engine.hbm import SHARE_OF_FREE, Demand, kv_bytes_per_token, plan_hbm
from pilotlight.engine.nvml import HbmReading
from pilotlight.errors import ConfigError, OutOfMemory
from pilotlight.host.gpu import Sized, size
from pilotlight.host.inprocess import open_session, prepare
from pilotlight.host.lone import LoneFunction
from pilotlight.request import Signals
from support import PATIENCE_S, VOCAB_SIZE, serving

GB = 1_000_000_000


@dataclass(frozen=True)
class FakeGpu:
    free_bytes: int
    name: str = "NVIDIA L4"

    def read(self) -> HbmReading:
        return HbmReading(24 * GB - self.free_bytes, self.free_bytes, 24 * GB)


def half_billion(artifact: Artifact) -> Artifact:
    shapes = Shapes(24, 14, 2, 64, 896, 151_936, 32_768)
    return replace(artifact, manifest=_changed(artifact.manifest, shapes=shapes, kv=KvLayout("float16")))


def _changed(manifest: Any, **changes: Any) -> Any:
    return msgspec.structs.replace(manifest, **changes)


def sized(artifact: Artifact, free_bytes: int, **settings: Any) -> Sized:
    of_function = FunctionSettings(artifact="a", provider="cuda", **settings)
    gpu: Any = FakeGpu(free_bytes)
    return size("half", of_function, half_billion(artifact), 64, 4096, lambda: gpu)


def test_a_function_takes_what_is_free_or_its_budget(toy_artifact: Artifact) -> None:
    assert sized(toy_artifact, 20 * GB).plan.num_slots == 64
    assert sized(toy_artifact, 20 * GB, hbm_budget_mb=2000).plan.num_slots < 40
    with pytest.raises(ConfigError, match="needs"):
        sized(toy_artifact, 20 * GB, hbm_budget_mb=100, max_context_tokens=4096)


def test_without_a_gpu_the_start_fails_in_one_line(toy_artifact: Artifact) -> None:
    settings = FunctionSettings(artifact=str(toy_artifact.path), provider="cuda")
    with pytest.raises(ConfigError, match=r"functions.toy.provider is 'cuda', but "):
        open_session(prepare("toy", settings), HostSettings())


def test_metrics_split_the_memory(toy_artifact: Artifact) -> None:
    found = sized(toy_artifact, 20 * GB)
    metrics = Metrics()
    metrics.watch_hbm("half", lambda: found.use(Signals(0, 1, 64, 0, 12_288, found.plan.kv_bytes)))
    text = metrics.render().decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("pilotlight_hbm"))
    assert {name.partition("{")[0].removeprefix("pilotlight_hbm_"): float(value) for name, value in values.items()} == {
        "used_bytes": 4 * GB,
        "total_bytes": 24 * GB,
        "weights_bytes": found.plan.weights_bytes,
        "kv_reserved_bytes": found.plan.kv_bytes,
        "kv_used_bytes": 12_288,
        "workspace_bytes": found.plan.workspace_bytes,
    }


def test_a_request_without_memory_is_a_503_and_not_a_crash(toy_artifact: Artifact, tmp_path: Path) -> None:
    def before_run() -> None:
        if full:
            raise OutOfMemory

    full = [True]

    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path, FakeSession(VOCAB_SIZE, before_run=before_run)) as toy:
            response = await toy.complete(max_tokens=3)
            assert response.status_code == 503
            assert response.headers["retry-after"] == "5"
            assert json.loads(response.content)["error"]["code"] == "out_of_memory"
            full.clear()
            assert (await toy.complete(max_tokens=3)).status_code == 200

    asyncio.run(scenario())


@pytest.mark.model
def test_a_whole_function_on_a_gpu_but_for_the_provider(
    demo_artifact: Callable[[str], Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the settings over the driver's free memory to slots, answers, refusals, metrics and the record."""
    artifact = demo_artifact("fp16")
    weights_and_workspace = plan_hbm(24 * GB, artifact, Demand(1, 256, 256, is_context_fixed=True)).arena_bytes
    free = int((weights_and_workspace + 3.5 * 256 * kv_bytes_per_token(artifact)) / SHARE_OF_FREE)
    monkeypatch.setattr("pilotlight.host.gpu.KIND", "cpu")
    monkeypatch.setattr("pilotlight.host.gpu.Gpu", lambda: FakeGpu(free))
    settings = FunctionSettings(
        artifact=str(artifact.path), provider="cuda", num_slots=64, max_context_tokens=256, num_threads=1
    )
    host = HostSettings(ledger=str(tmp_path / "usage.db"))
    prepared = prepare("demo", settings)
    session = open_session(prepared, host)
    assert session.num_slots in (2, 3)
    function = LoneFunction(prepared, session, host)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        function.start(listener)
        try:
            url = f"http://127.0.0.1:{function.port}"
            question = {"model": "demo", "messages": [{"role": "user", "content": "What is 47 plus 38?"}]}
            answer = httpx.post(f"{url}/v1/chat/completions", json=question, timeout=PATIENCE_S).json()
            assert answer["choices"][0]["message"]["content"] == "85"
            long = {"model": "demo", "prompt": [5] * 256}
            refusal = httpx.post(f"{url}/v1/completions", json=long, timeout=PATIENCE_S)
            assert (refusal.status_code, refusal.json()["error"]["code"]) == (400, "context_length_exceeded")
            text = httpx.get(f"{url}/metrics", timeout=PATIENCE_S).text
            values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("pilotlight_"))
            assert float(values['pilotlight_hbm_total_bytes{function="demo"}']) == 24 * GB
            reserved = 'pilotlight_kv_reserved_bytes{function="demo"}'
            assert values['pilotlight_hbm_kv_reserved_bytes{function="demo"}'] == values[reserved]
            record = httpx.get(f"{url}/v1/usage/{answer['id']}", timeout=PATIENCE_S).json()
            assert record["provider"] == "cuda"
        finally:
            function.stop(0)
