"""The real server process with the official client, real disconnects, real signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from corpus import held_out_turns
from pace import Pace
from pilotlight.artifact import Artifact
from pilotlight.metering.ledger import Ledger
from pilotlight.metering.ledger_reader import LedgerReader
from pilotlight.request import FinishReason
from support import PATIENCE_S, ServerProcess, server_process

pytestmark = [pytest.mark.e2e, pytest.mark.model]


def user(content: str) -> list[Any]:
    return [{"role": "user", "content": content}]


def test_the_official_client_asks_and_gets_right_answers(client: openai.OpenAI) -> None:
    turns = held_out_turns("sum", 10)
    answers = [
        client.chat.completions.create(model="demo", messages=user(turn.question)).choices[0].message.content
        for turn in turns
    ]
    assert sum(answer == turn.answer for answer, turn in zip(answers, turns, strict=True)) >= 8


def test_the_official_client_streams(client: openai.OpenAI, ledger: Path) -> None:
    turn = held_out_turns("story", 1)[0]
    whole = client.chat.completions.create(model="demo", messages=user(turn.question))
    stream = client.chat.completions.create(
        model="demo", messages=user(turn.question), stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == "stop"
    usage = chunks[-1].usage
    assert usage is not None
    assert whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens
    with LedgerReader(ledger) as reader:
        record = reader.get(chunks[0].id)
    assert record is not None
    assert (record.prompt_tokens, record.completion_tokens) == (usage.prompt_tokens, usage.completion_tokens)


def test_the_official_client_completes_token_ids(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="demo", prompt=[5, 6, 7], max_tokens=4, extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 4)
    assert [model.id for model in client.models.list()] == ["demo"]


def test_the_official_client_understands_our_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=user("hi"))
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="demo", messages=user("word " * 2000))
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as negative:
        client.chat.completions.create(model="demo", messages=user("hi"), max_tokens=-1)
    assert negative.value.param == "max_tokens"
    with pytest.raises(openai.APIStatusError) as large:
        client.chat.completions.create(model="demo", messages=user("x" * 10_000_000))
    assert large.value.status_code == 413


def test_a_dropped_connection_is_metered_and_frees_its_slot(server: ServerProcess, ledger: Path, pace: Pace) -> None:
    body = {"model": "demo", "prompt": "Once", "max_tokens": 500, "ignore_eos": True, "stream": True}
    headers = {"x-request-id": "dropped"}
    with pace.slow(), httpx.Client(base_url=server.url, timeout=PATIENCE_S) as http:
        with http.stream("POST", "/v1/completions", json=body, headers=headers) as response:
            received = next(line for line in response.iter_lines() if line.startswith("data: "))
        assert received.startswith("data: ")
        with LedgerReader(ledger) as reader:
            while (record := reader.get("dropped")) is None:
                assert http.get("/livez").status_code == 200
        metrics = http.get("/metrics").text
    assert record.finish_reason is FinishReason.CANCELLED
    assert 1 <= record.completion_tokens < 500
    assert 'pilotlight_num_requests_running{function="demo"} 0.0' in metrics


def test_the_usage_command_reads_beside_the_server(client: openai.OpenAI, ledger: Path) -> None:
    answer = client.chat.completions.create(model="demo", messages=user("Hello!"))
    command = [sys.executable, "-m", "pilotlight", "usage", "--records", "--json", "--ledger", str(ledger)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert answer.id in {json.loads(line)["request_id"] for line in lines}


def test_sigterm_lets_a_stream_finish_and_exits_with_0(
    demo_int4: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PILOTLIGHT_DRAIN_TIMEOUT_S", str(PATIENCE_S))
    pace = Pace(tmp_path)
    with (
        server_process(demo_int4.path, tmp_path / "usage.db", pace=pace) as server,
        httpx.Client(base_url=server.url, timeout=PATIENCE_S) as http,
    ):
        body = {"model": "demo", "prompt": "Once", "max_tokens": 300, "ignore_eos": True, "stream": True}
        with pace.slow(), http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            while takes_requests(server):
                pass
            pace.hurry()
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert server.process.wait(PATIENCE_S) == 0


def takes_requests(server: ServerProcess) -> bool:
    try:
        return httpx.get(f"{server.url}/readyz", timeout=PATIENCE_S).status_code == 200
    except httpx.TransportError:
        return False


def test_a_killed_server_leaves_a_crashed_record(demo_int4: Artifact, tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    body = {"model": "demo", "prompt": "Once", "max_tokens": 500, "ignore_eos": True, "stream": True}
    pace = Pace(tmp_path)
    with (
        server_process(demo_int4.path, path, pace=pace) as server,
        httpx.Client(base_url=server.url, timeout=PATIENCE_S) as http,
    ):
        headers = {"x-request-id": "unlucky"}
        with pace.slow(60), http.stream("POST", "/v1/completions", json=body, headers=headers) as response:
            lines = (line for line in response.iter_lines() if line.startswith("data: "))
            for _ in range(50):
                next(lines)
            os.kill(server.process.pid, signal.SIGKILL)
            with pytest.raises(httpx.RemoteProtocolError):
                list(lines)
    with Ledger(path) as ledger:
        record = ledger.get("unlucky")
    assert record is not None
    assert record.finish_reason is FinishReason.CRASHED
    assert record.prompt_tokens == 4
    assert record.completion_tokens >= 50, "each token is noted before it is delivered"


def test_a_damaged_artifact_is_refused_in_one_line(demo_int4: Artifact, tmp_path: Path) -> None:
    weights = demo_int4.path / "model.onnx.data"
    copy = tmp_path / "damaged"
    copy.mkdir()
    for file in demo_int4.path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes()[: 1000 if file.name == weights.name else None])
    command = [sys.executable, "-m", "pilotlight", "serve", str(copy), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, cwd=tmp_path)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "model.onnx.data: is truncated" in done.stderr
