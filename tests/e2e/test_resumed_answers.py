"""An answer that one server began and another one ends, with the real model: token by token what it would have been."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from pace import Pace
from pilotlight.artifact import Artifact
from pilotlight.metering.ledger_reader import LedgerReader
from support import PATIENCE_S, server_process

STORY = {
    "model": "demo",
    "messages": [{"role": "user", "content": "Tell me a story about Mira and the lantern at the harbour."}],
    "max_tokens": 300,
    "ignore_eos": True,
    "return_token_ids": True,
    "stream": True,
}
CUT_AFTER_FRAMES = 30
GREEDY = {"temperature": 0}
DRAWN = {"temperature": 1.2, "seed": 39, "presence_penalty": 0.3}
"""With this seed no draw is near another token: noise a hundred times as large as rounding changes none of them."""


@pytest.fixture(autouse=True)
def _secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PILOTLIGHT_RESUME_SECRET", "a secret of both servers")
    monkeypatch.setenv("PILOTLIGHT_DRAIN_TIMEOUT_S", "0")


def frames_of(url: str, body: dict[str, Any], pid_to_end: int | None = None) -> list[dict[str, Any]]:
    """Return the frames of a stream; after some of them, have the server shut down."""
    found = []
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=PATIENCE_S) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                found.append(json.loads(line.removeprefix("data: ")))
            if pid_to_end is not None and len(found) == CUT_AFTER_FRAMES:
                os.kill(pid_to_end, signal.SIGTERM)
                pid_to_end = None
    return found


def chosen(frames: list[dict[str, Any]]) -> list[int]:
    return [token for frame in frames for choice in frame["choices"] for token in choice.get("token_ids", [])]


def text(frames: list[dict[str, Any]]) -> str:
    return "".join(frame["choices"][0]["delta"].get("content") or "" for frame in frames)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
def test_a_server_ends_what_another_had_to_leave(demo_fp32: Artifact, tmp_path: Path, sampling: dict[str, Any]) -> None:
    body = {**STORY, **sampling}
    pace = Pace(tmp_path)
    with server_process(demo_fp32.path, tmp_path / "one.db", pace=pace) as one:
        whole = frames_of(one.url, body)
        with pace.slow(CUT_AFTER_FRAMES + 20):
            first = frames_of(one.url, body, one.process.pid)
    token = first[-1]["usage"]["pilotlight"]["resume_token"]
    with server_process(demo_fp32.path, tmp_path / "two.db") as two:
        rest = frames_of(two.url, {**body, "resume_token": token})
    assert len(chosen(first)) < 300
    assert chosen(first) + chosen(rest) == chosen(whole)
    assert text(first) + text(rest) == text(whole)
    with LedgerReader(tmp_path / "one.db") as before, LedgerReader(tmp_path / "two.db") as after:
        cut_off, undisturbed = list(before.records())[:2]
        (continued,) = after.records()
        if cut_off.finish_reason != "deadline":
            cut_off, undisturbed = undisturbed, cut_off
        assert continued.resumes == cut_off.request_id
        assert cut_off.prompt_tokens + continued.prompt_tokens == undisturbed.prompt_tokens
        assert cut_off.completion_tokens + continued.completion_tokens == undisturbed.completion_tokens == 300
