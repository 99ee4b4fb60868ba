"""Two hosts with one PostgreSQL ledger: what one of them had to leave, the other one ends, and bills what is left."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

import ledgers
from pace import Pace
from pilotlight.artifact import Artifact
from pilotlight.metering.ledger_reader import LedgerReader
from pilotlight.metering.record import UsageRecord
from support import PATIENCE_S, ServerProcess, config_process

NUM_TOKENS = 300
CUT_AFTER_FRAMES = 30
STORY = {
    "model": "demo",
    "messages": [{"role": "user", "content": "Tell me a story about Mira and the lantern at the harbour."}],
    "max_tokens": NUM_TOKENS,
    "ignore_eos": True,
    "return_token_ids": True,
    "stream": True,
}
GREEDY = {"temperature": 0}
DRAWN = {"temperature": 1.2, "seed": 39, "presence_penalty": 0.3}
"""With this seed no draw is near another token: noise a hundred times as large as rounding changes none of them."""
PRICES = 'prices = { prompt_per_million_tokens = "1000", completion_per_million_tokens = "3000" }'


@pytest.fixture(scope="module")
def ledger() -> Iterator[str]:
    with ledgers.fresh("postgres") as url:
        yield str(url)


@contextmanager
def host(artifact: Artifact, ledger: str, folder: Path, pace: Pace | None = None) -> Iterator[ServerProcess]:
    """Run a host that shares nothing with others but the ledger and the secret."""
    folder.mkdir()
    config = folder / "pilotlight.toml"
    config.write_text(
        f'[host]\ncache_dir = "{folder}/cache"\nresume_secret = "a secret of both hosts"\ndrain_timeout_s = 0\n'
        f'[functions.demo]\nartifact = "{artifact.path}"\n{PRICES}\n'
    )
    with config_process(config, ledger, pace) as server:
        yield server


def frames_of(
    server: ServerProcess, body: dict[str, Any], request_id: str = "", *, ends_it: bool = False
) -> list[dict[str, Any]]:
    """Return the frames of a stream; with ``ends_it``, have the host told to end in the middle of it."""
    found = []
    headers = {"x-request-id": request_id} if request_id else {}
    url = f"{server.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, headers=headers, timeout=PATIENCE_S) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                found.append(json.loads(line.removeprefix("data: ")))
            if ends_it and len(found) == CUT_AFTER_FRAMES:
                os.kill(server.process.pid, signal.SIGTERM)
                ends_it = False
    return found


def cut_stream(
    artifact: Artifact, ledger: str, folder: Path, body: dict[str, Any], request_id: str
) -> list[dict[str, Any]]:
    """Return the frames of a stream whose host was told to end in the middle of it."""
    pace = Pace(folder)
    with host(artifact, ledger, folder / "one", pace) as one:
        with pace.slow(CUT_AFTER_FRAMES + 20):
            frames = frames_of(one, body, request_id, ends_it=True)
        assert one.process.wait(timeout=PATIENCE_S) == 0
    return frames


def chosen(frames: list[dict[str, Any]]) -> list[int]:
    return [token for frame in frames for choice in frame["choices"] for token in choice.get("token_ids", [])]


def text(frames: list[dict[str, Any]]) -> str:
    return "".join(choice["delta"].get("content") or "" for frame in frames for choice in frame["choices"])


def record(ledger: str, request_id: str) -> UsageRecord:
    with LedgerReader(ledger) as reader:
        found = reader.get(request_id)
    assert found is not None, request_id
    return found


@pytest.mark.model
@pytest.mark.parametrize(
    ("name", "sampling"),
    [("greedy", GREEDY), ("drawn", DRAWN)],
)
def test_a_stream_goes_on_at_the_other_host_and_the_two_records_add_up(
    demo_fp32: Artifact, ledger: str, tmp_path: Path, name: str, sampling: dict[str, Any]
) -> None:
    body = {**STORY, **sampling}
    with ExitStack() as hosts:
        two = hosts.enter_context(host(demo_fp32, ledger, tmp_path / "two"))
        whole = frames_of(two, body, f"{name}-whole")
        first = cut_stream(demo_fp32, ledger, tmp_path, body, f"{name}-first")
        resume = {**body, "resume_token": first[-1]["usage"]["pilotlight"]["resume_token"]}
        rest = frames_of(two, resume)
        again = frames_of(two, resume)
    assert 0 < len(chosen(first)) < NUM_TOKENS
    assert chosen(first) + chosen(rest) == chosen(whole), "without a loss and without doubling"
    assert text(first) + text(rest) == text(whole)
    cut_off, undisturbed = record(ledger, f"{name}-first"), record(ledger, f"{name}-whole")
    continued = record(ledger, rest[0]["id"].replace("chatcmpl-", ""))
    assert (cut_off.finish_reason, continued.finish_reason) == ("deadline", "length")
    assert continued.resumes == cut_off.request_id
    for amount in ("prompt_tokens", "completion_tokens"):
        assert getattr(cut_off, amount) + getattr(continued, amount) == getattr(undisturbed, amount), amount
    assert abs(cut_off.cost_micros + continued.cost_micros - undisturbed.cost_micros) <= 1, "each part is rounded"
    assert chosen(again) == chosen(rest)
    billed_again = record(ledger, again[0]["id"].replace("chatcmpl-", ""))
    assert billed_again.prompt_tokens == undisturbed.prompt_tokens + cut_off.completion_tokens, "a token is good once"


@pytest.mark.model
def test_both_hosts_answer_by_one_ledger_and_a_request_id_is_taken_once(
    demo_fp32: Artifact, ledger: str, tmp_path: Path
) -> None:
    short = {**STORY, "max_tokens": 3, "stream": False}
    with ExitStack() as hosts:
        servers = [hosts.enter_context(host(demo_fp32, ledger, tmp_path / name)) for name in ("one", "two")]
        found = [
            httpx.post(
                f"{server.url}/v1/chat/completions", json=short, headers={"x-request-id": "twice"}, timeout=PATIENCE_S
            )
            for server in servers
        ]
    assert [answer.status_code for answer in found] == [200, 409]
