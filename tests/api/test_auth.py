"""API keys on the wire: who may do what, and what a refusal looks like."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pilotlight.artifact import Artifact
from pilotlight.engine.fake import FakeSession
from pilotlight.errors import LedgerUnavailable
from pilotlight.metering.keyring import KeyDesk
from pilotlight.metering.keys import Limits
from pilotlight.metering.ledger_reader import LedgerReader
from pilotlight.metering.record import UsageRecord
from pilotlight.request import FinishReason
from support import VOCAB_SIZE, Serving, serving

PROMPT = [1, 2, 3, 4]
TOKENS = {"max_tokens": 6, "ignore_eos": True}
EACH = 10


def make_key(directory: Path, functions: tuple[str, ...] | None = None, admin: bool = False, **limits: Any) -> str:
    """Make a key and return its token."""
    with KeyDesk(directory / "usage.db") as desk:
        return desk.create("app", "acme", functions, Limits(**limits), admin=admin)[1]


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


async def complete(api: Serving, token: str, request_id: str | None = None, **params: Any) -> Any:
    headers = bearer(token) | ({"x-request-id": request_id} if request_id else {})
    body = {"model": "toy", "prompt": PROMPT, **TOKENS, **params}
    return await api.client.post("/v1/completions", json=body, headers=headers)


def error(response: Any) -> dict[str, Any]:
    found: dict[str, Any] = response.json()["error"]
    return found


def run(scenario: Any) -> None:
    asyncio.run(scenario)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer "},
        {"authorization": "Bearer pl_x"},
        {"authorization": "Basic abc"},
        {"x-api-key": ""},
    ],
    ids=str,
)
def test_without_a_valid_key_every_door_is_closed(
    toy_artifact: Artifact, tmp_path: Path, headers: dict[str, str]
) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as api:
            make_key(tmp_path)
            for method, path in [
                ("POST", "/v1/chat/completions"),
                ("POST", "/v1/completions"),
                ("GET", "/v1/models"),
                ("GET", "/v1/models/toy"),
                ("GET", "/v1/usage/a"),
                ("POST", "/v1/requests/a/cancel"),
                ("GET", "/metrics"),
                ("POST", "/admin/anything"),
                ("GET", "/v1/something/new"),
            ]:
                response = await api.client.request(method, path, headers=headers)
                assert (response.status_code, error(response)["code"]) == (401, "invalid_api_key"), path
                assert error(response)["type"] == "invalid_request_error"
                assert response.headers["www-authenticate"] == "Bearer"
                assert "x-request-id" in response.headers
            assert (await api.client.get("/livez", headers=headers)).status_code == 200
            ready = await api.client.get("/readyz", headers=headers)
            assert ready.json() == {"status": "ok", "functions": []}, "a stranger is told no names"

    run(scenario())


def test_the_host_header_opens_no_door(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as api:
            make_key(tmp_path)
            response = await api.client.get("/metrics", headers={"host": "toy/livez#"})
            assert response.status_code == 401

    run(scenario())


@pytest.mark.parametrize("header", ["authorization", "x-api-key"])
def test_a_valid_key_is_written_into_the_record(toy_artifact: Artifact, tmp_path: Path, header: str) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as api:
            token = make_key(tmp_path)
            headers = {header: f"Bearer {token}" if header == "authorization" else token}
            answer = await api.chat("hi", headers, max_tokens=2)
            assert answer.status_code == 200
            record = api.ledger.get(answer.json()["id"])
            assert record is not None
            assert (record.tenant, record.key_id) == ("acme", token[3:19])

    run(scenario())


def test_without_any_key_nobody_is_asked(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as api:
            answer = await complete(api, "whatever")
            assert answer.status_code == 200
            record = api.ledger.get(answer.json()["id"])
            assert record is not None
            assert (record.tenant, record.key_id) == (None, None)
            assert not [name for name in answer.headers if name.startswith("x-ratelimit")]

    run(scenario())


def test_a_key_calls_and_sees_its_own_functions_only(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as api:
            mine, others = make_key(tmp_path, ("toy",)), make_key(tmp_path, ("other",))
            assert (await complete(api, mine)).status_code == 200
            refused = await complete(api, others)
            assert (refused.status_code, error(refused)["code"]) == (403, "permission_denied")
            models = [(await api.client.get("/v1/models", headers=bearer(t))).json()["data"] for t in (mine, others)]
            assert [[model["id"] for model in listed] for listed in models] == [["toy"], []]
            hidden = await complete(api, others, model="unknown")
            assert hidden.status_code == 404
            assert "toy" not in error(hidden)["message"]

    run(scenario())


def test_operators_pages_need_an_admin_key(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as api:
            user, admin = make_key(tmp_path), make_key(tmp_path, admin=True)
            for path in ("/metrics", "/admin/anything"):
                refused = await api.client.get(path, headers=bearer(user))
                assert (refused.status_code, error(refused)["code"]) == (403, "permission_denied")
            assert (await api.client.get("/metrics", headers=bearer(admin))).status_code == 200
            assert (await api.client.get("/admin/anything", headers=bearer(admin))).status_code == 404

    run(scenario())


def test_usage_is_for_the_key_that_made_it_and_for_the_operator(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as api:
            mine, others, admin = make_key(tmp_path), make_key(tmp_path), make_key(tmp_path, admin=True)
            await complete(api, mine, "a")
            found = [await api.client.get("/v1/usage/a", headers=bearer(t)) for t in (mine, others, admin)]
            assert [response.status_code for response in found] == [200, 404, 200]
            missing = await api.client.get("/v1/usage/b", headers=bearer(others))
            assert error(found[1])["message"] == error(missing)["message"].replace("'b'", "'a'")

    run(scenario())


def test_only_the_key_that_made_a_request_cancels_it(toy_artifact: Artifact, tmp_path: Path) -> None:
    gate = threading.Event()
    session = FakeSession(VOCAB_SIZE, before_run=gate.wait)

    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path, session) as api:
            mine, others = make_key(tmp_path), make_key(tmp_path)
            running = asyncio.create_task(complete(api, mine, "a"))
            while api.function.running("a") is None:
                await asyncio.sleep(0)
            refused = await api.client.post("/v1/requests/a/cancel", headers=bearer(others))
            assert refused.status_code == 404
            assert (await api.client.post("/v1/requests/a/cancel", headers=bearer(mine))).status_code == 200
            gate.set()
            assert (await running).status_code == 499

    run(scenario())


def test_1000_requests_at_once_spend_a_budget_for_100_and_not_more(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path, FakeSession(VOCAB_SIZE, 32), max_queued_requests=1000) as api:
            token = make_key(tmp_path, tokens_per_month=100 * EACH + EACH - 1)
            responses = await asyncio.gather(*(complete(api, token) for _ in range(1000)))
            statuses = Counter(response.status_code for response in responses)
            assert statuses == {200: 100, 429: 900}
            refused = next(response for response in responses if response.status_code == 429)
            assert (error(refused)["type"], error(refused)["code"]) == ("insufficient_quota", "insufficient_quota")
            assert int(refused.headers["retry-after"]) > 0
            with LedgerReader(tmp_path / "usage.db") as reader:
                records = list(reader.records())
            assert sum(record.prompt_tokens + record.completion_tokens for record in records) == 100 * EACH
            assert (await complete(api, token)).status_code == 429

    run(scenario())


def test_limits_by_the_minute_are_told_in_headers(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as api:
            token = make_key(tmp_path, requests_per_minute=1000, tokens_per_minute=100_000)
            for stream in (False, True):
                response = await complete(api, token, stream=stream)
                assert response.headers["x-ratelimit-limit-requests"] == "1000"
                assert response.headers["x-ratelimit-limit-tokens"] == "100000"
                assert 0 < float(response.headers["x-ratelimit-reset-tokens"].removesuffix("s")) <= 60
                assert int(response.headers["x-ratelimit-remaining-requests"]) < 1000

    run(scenario())


def test_a_full_queue_ends_what_was_admitted_as_rejected_and_frees_its_budget(
    toy_artifact: Artifact, tmp_path: Path
) -> None:
    gate = threading.Event()
    session = FakeSession(VOCAB_SIZE, 1, before_run=gate.wait)

    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path, session, max_queued_requests=0) as api:
            token = make_key(tmp_path, tokens_per_month=2 * EACH)
            running = asyncio.create_task(complete(api, token, "a"))
            while (invocation := api.function.running("a")) is None or not invocation.submitted:
                await asyncio.sleep(0)
            refused = await complete(api, token, "b")
            assert (refused.status_code, error(refused)["code"]) == (503, "overloaded")
            gate.set()
            assert (await running).status_code == 200
            record = api.ledger.get("b")
            assert record is not None
            assert (record.finish_reason, record.cost_micros) == (FinishReason.REJECTED, 0)
            assert (await complete(api, token, "c")).status_code == 200

    run(scenario())


def test_a_refusal_that_cannot_be_written_at_once_frees_its_budget_later(
    toy_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    session = FakeSession(VOCAB_SIZE, 1, before_run=gate.wait)
    monkeypatch.setattr("pilotlight.function.run.RETRY_DELAYS_S", (0.001,))

    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path, session, max_queued_requests=0) as api:
            token = make_key(tmp_path, tokens_per_month=2 * EACH)
            running = asyncio.create_task(complete(api, token, "a"))
            while (invocation := api.function.running("a")) is None or not invocation.submitted:
                await asyncio.sleep(0)
            finish, full = api.ledger.finish, True

            async def finish_unless_full(record: UsageRecord) -> None:
                if full:
                    raise LedgerUnavailable("the disk is full")
                await finish(record)

            monkeypatch.setattr(api.ledger, "finish", finish_unless_full)
            refused = await complete(api, token, "b")
            assert (refused.status_code, error(refused)["code"]) == (503, "overloaded")
            assert api.ledger.get("b") is None
            full = False
            await api.function.settled("b")
            record = api.ledger.get("b")
            assert record is not None
            assert record.finish_reason is FinishReason.REJECTED
            gate.set()
            assert (await running).status_code == 200
            assert (await complete(api, token, "c")).status_code == 200

    run(scenario())


def test_what_is_cancelled_before_it_was_submitted_is_metered_as_nothing(
    toy_artifact: Artifact, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as api:
            token = make_key(tmp_path)
            asking = asyncio.create_task(complete(api, token, "a"))
            while api.function.running("a") is None:
                await asyncio.sleep(0)
            assert api.function.cancel("a")
            assert (await asking).status_code == 499
            record = api.ledger.get("a")
            assert record is not None
            assert (record.finish_reason, record.prompt_tokens) == (FinishReason.CANCELLED, 0)

    run(scenario())
