"""Models, health, metrics and usage."""

from __future__ import annotations

import asyncio
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from pilotlight.artifact import Artifact
from pilotlight.engine.fake import FakeSession
from support import VOCAB_SIZE, serving


def test_models(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:
            listing = (await toy.client.get("/v1/models")).json()
            one = (await toy.client.get("/v1/models/toy")).json()
            assert listing == {"object": "list", "data": [one]}
            assert (one["id"], one["object"], one["owned_by"]) == ("toy", "model", "pilotlight")
            assert one["artifact"] == toy_artifact.digest

    asyncio.run(scenario())


def test_health(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path, FakeSession(VOCAB_SIZE)) as toy:
            assert (await toy.client.get("/livez")).status_code == 200
            ready = await toy.client.get("/readyz")
            assert (ready.status_code, ready.json()["functions"]) == (200, ["toy"])
            toy.function.leave()
            assert (await toy.client.get("/readyz")).status_code == 503
            assert (await toy.chat(max_tokens=1)).status_code == 200, "until others take over, requests are taken"
            await toy.function.drain(0)
            assert (await toy.chat(max_tokens=1)).status_code == 503
            assert (await toy.client.get("/readyz")).status_code == 503
            assert (await toy.client.get("/livez")).status_code == 200

    asyncio.run(scenario())


def test_metrics_add_up_with_the_records(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path, FakeSession(VOCAB_SIZE)) as toy:
            answers = [(await toy.chat(max_tokens=count, ignore_eos=True)).json() for count in (1, 2, 3)]
            response = await toy.client.get("/metrics")
            samples = {
                sample.name: sample.value
                for family in text_string_to_metric_families(response.text)
                for sample in family.samples
                if sample.labels.get("function") == "toy" and "le" not in sample.labels
            }
            assert samples["pilotlight_generation_tokens_total"] == 6
            assert samples["pilotlight_prompt_tokens_total"] == sum(a["usage"]["prompt_tokens"] for a in answers)
            assert samples["pilotlight_invocations_total"] == 3
            assert samples["pilotlight_time_to_first_token_seconds_count"] == 3
            assert samples["pilotlight_inter_token_latency_seconds_count"] == 3
            assert samples["pilotlight_num_requests_running"] == 0
            assert samples["pilotlight_num_requests_waiting"] == 0
            assert samples["pilotlight_slots_used_ratio"] == 0
            assert samples["pilotlight_kv_used_bytes"] == 0
            assert samples["pilotlight_kv_reserved_bytes"] == 4 * 64 * 8

    asyncio.run(scenario())


def test_usage_returns_the_whole_record(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:
            toy.function.started(cold_start_ms=123.0)
            answers = [(await toy.chat(max_tokens=3)).json() for _ in range(2)]
            first, second = [(await toy.client.get(f"/v1/usage/{answer['id']}")).json() for answer in answers]
            assert first["completion_tokens"] == answers[0]["usage"]["completion_tokens"]
            assert first["artifact_digest"] == toy_artifact.digest
            assert (first["cold_start_ms"], second["cold_start_ms"]) == (123.0, 0.0)
            assert first["total_ms"] >= first["ttft_ms"] >= first["queue_ms"] >= 0
            assert first["currency"] == "USD"

    asyncio.run(scenario())
