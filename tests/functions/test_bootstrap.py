"""The real bootstrap process with the demo model: behind the fake Runtime API, and under AWS's own emulator."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform as machine
import queue
import random
import signal
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from bridge import function_url
from corpus import held_out_turns
from fake_runtime_api import FakeRuntimeApi, fake_runtime_api
from pace import Pace
from pilotlight.artifact import Artifact
from pilotlight.metering.ledger import Ledger
from pilotlight.request import FinishReason
from support import events

pytestmark = [pytest.mark.e2e, pytest.mark.model]

BOOTSTRAP = Path(__file__).parents[2] / "functions" / "aws_lambda" / "bootstrap.py"
TIMEOUT_S = 300
MACHINES = {"x86_64": "x86_64", "aarch64": "arm64"}
"""How the emulator names machines."""


def environment(artifact: Path, ledger: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "PILOTLIGHT_ARTIFACT": str(artifact), "PILOTLIGHT_LEDGER": str(ledger), **more}


@contextmanager
def bootstrap(platform: FakeRuntimeApi, artifact: Path, ledger: Path, **more: str) -> Iterator[subprocess.Popen[bytes]]:
    variables = environment(artifact, ledger, AWS_LAMBDA_RUNTIME_API=platform.address, **more)
    command = [sys.executable, str(BOOTSTRAP)]
    with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()
            process.communicate()


def logged(process: subprocess.Popen[bytes], event: str) -> dict[str, Any]:
    """Read the log up to the line about ``event``."""
    assert process.stdout is not None
    for raw in process.stdout:
        line: dict[str, Any] = json.loads(raw)
        if line.get("event") == event:
            return line
    assert process.stderr is not None
    raise AssertionError(process.stderr.read())


@pytest.fixture(scope="module")
def url(demo_int4: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    ledger = tmp_path_factory.mktemp("lambda") / "usage.db"
    with (
        fake_runtime_api() as platform,
        bootstrap(platform, demo_int4.path, ledger, AWS_LAMBDA_MAX_CONCURRENCY="2") as process,
        function_url(platform) as url,
    ):
        logged(process, "started")
        yield url


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def user(content: str) -> list[Any]:
    return [{"role": "user", "content": content}]


def test_the_official_client_streams_from_lambda(client: openai.OpenAI, demo_int4: Artifact) -> None:
    name = demo_int4.path.name
    turn = held_out_turns("story", 1)[0]
    whole = client.chat.completions.create(model=name, messages=user(turn.question))
    chunks = list(
        client.chat.completions.create(
            model=name, messages=user(turn.question), stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert [model.id for model in client.models.list()] == [name]


def test_the_official_client_understands_errors_from_lambda(client: openai.OpenAI, demo_int4: Artifact) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=user("hi"))
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model=demo_int4.path.name, messages=user("word " * 2000))
    assert long.value.code == "context_length_exceeded"


def test_the_stages_of_a_start_are_reported(demo_int4: Artifact, tmp_path: Path) -> None:
    with fake_runtime_api() as platform, bootstrap(platform, demo_int4.path, tmp_path / "usage.db") as process:
        line = logged(process, "started")
    stages = [line[name] for name in ("import_ms", "ledger_ms", "function_ms")]
    assert all(stage > 0 for stage in stages)
    assert sum(stages) <= line["total_ms"] + 20  # the process's age counts in ticks of 10 ms


def test_a_start_that_fails_is_reported(tmp_path: Path) -> None:
    with fake_runtime_api() as platform, bootstrap(platform, tmp_path / "none", tmp_path / "usage.db") as process:
        path, error = platform.reports.get(timeout=TIMEOUT_S)
        assert process.wait(TIMEOUT_S) == 1
    assert path == "init/error"
    assert error["errorType"] == "Pilotlight.ArtifactError"
    assert "none" in error["errorMessage"]


def test_a_snapshot_is_taken_after_the_load_and_a_copy_is_another_replica(demo_int4: Artifact, tmp_path: Path) -> None:
    """Between snapshot and copy the whole process stands still, its threads included, as in the platform's snapshot.

    That is as near as one gets here: it shows nothing of memory that comes back on another machine.
    """
    snap_start = {"AWS_LAMBDA_INITIALIZATION_TYPE": "snap-start", "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": "3538"}
    with (
        fake_runtime_api() as platform,
        bootstrap(platform, demo_int4.path, tmp_path / "usage.db", **snap_start) as process,
    ):
        platform.snapshots.get(timeout=TIMEOUT_S)
        assert "warm_up_ms" in logged(process, "started")
        with pytest.raises(queue.Empty):
            platform.polls.get_nowait()
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        platform.restore.set()
        process.send_signal(signal.SIGCONT)
        restored = logged(process, "restored")
        exchange = platform.invoke({"prompt": "Once", "model": demo_int4.path.name, "max_tokens": 2})
        answer = json.loads(exchange.body())
        _, usage = platform.invoke_http("GET", f"/v1/usage/{answer['id']}").http()
    record = json.loads(usage)
    assert (record["replica_id"], record["cold_start_ms"]) == (restored["replica_id"], 0.0)


def test_another_sandbox_goes_on_after_the_deadline(demo_fp32: Artifact, tmp_path: Path) -> None:
    """The real model: greedy, cut off by the platform's deadline some milliseconds in, and the same tokens in all."""
    story = {"messages": user("Tell me a story about Mira."), "max_tokens": 300, "temperature": 0, "stream": True}
    request = {"model": demo_fp32.path.name, "ignore_eos": True, "return_token_ids": True, **story}
    secret = {"PILOTLIGHT_RESUME_SECRET": "a secret of all sandboxes"}
    path = "/v1/chat/completions"

    def chosen(frames: list[dict[str, Any]]) -> list[int]:
        return [token for frame in frames for choice in frame["choices"] for token in choice.get("token_ids", [])]

    def cut_off(platform: FakeRuntimeApi) -> list[dict[str, Any]]:
        """Return the frames of an answer that had begun when its time was over: how soon it begins, nobody knows."""
        for tenths in itertools.count(1):
            found = events(platform.invoke_http("POST", path, request, left_s=1 + tenths / 10).http()[1])
            if "choices" in found[-1] and chosen(found):
                return found
        raise AssertionError

    pace = Pace(tmp_path)
    with (
        fake_runtime_api() as platform,
        bootstrap(platform, demo_fp32.path, tmp_path / "one.db", **pace.environment, **secret) as process,
    ):
        logged(process, "started")
        whole = events(platform.invoke_http("POST", path, request).http()[1])
        with pace.slow(20):
            first = cut_off(platform)
    last = first[-1]
    assert last["choices"][0]["finish_reason"] == "length"
    continued = {**request, "resume_token": last["usage"]["pilotlight"]["resume_token"]}
    with fake_runtime_api() as platform, bootstrap(platform, demo_fp32.path, tmp_path / "two.db", **secret):
        rest = events(platform.invoke_http("POST", path, continued).http()[1])
    assert len(chosen(first)) < 300
    assert chosen(first) + chosen(rest) == chosen(whole)


def test_a_killed_function_leaves_a_crashed_record(demo_int4: Artifact, tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    request = {"model": demo_int4.path.name, "prompt": "Once", "max_tokens": 500, "ignore_eos": True, "stream": True}
    pace = Pace(tmp_path)
    with (
        fake_runtime_api() as platform,
        bootstrap(platform, demo_int4.path, path, **pace.environment) as process,
        pace.slow(50),
    ):
        exchange = platform.invoke(request)
        for _ in range(40):
            assert exchange.chunk() is not None
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    with Ledger(path) as ledger:
        record = ledger.get(exchange.request_id)
    assert record is not None
    assert record.finish_reason is FinishReason.CRASHED
    assert record.completion_tokens >= 1, "one checkpoint at the first token, then one every 32"


def test_sigterm_ends_the_process_in_order(demo_int4: Artifact, tmp_path: Path) -> None:
    with fake_runtime_api() as platform, bootstrap(platform, demo_int4.path, tmp_path / "usage.db") as process:
        platform.polls.get(timeout=TIMEOUT_S)
        process.terminate()
        assert process.wait(TIMEOUT_S) == 0


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The emulator's binary; its wheel is downloaded, not installed, and nothing else of it is used."""
    directory = tmp_path_factory.mktemp("emulator")
    options = ["--no-deps", "--quiet", "--disable-pip-version-check", "--dest", str(directory)]
    command = [sys.executable, "-m", "pip", "download", *options, "aws-sam-cli"]
    try:
        downloaded = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        pytest.skip("aws-sam-cli is not downloaded in time")
    wheel = next(directory.glob("aws_sam_cli-*.whl"), None)
    if wheel is None:
        pytest.skip(f"aws-sam-cli cannot be downloaded: {downloaded.stderr.strip().splitlines()[-1:]}")
    with zipfile.ZipFile(wheel) as archive:
        member = f"samcli/local/rapid/aws-lambda-rie-{MACHINES[machine.machine()]}"
        binary = Path(archive.extract(member, directory))
    binary.chmod(0o755)
    return binary


def test_awss_own_emulator_runs_the_bootstrap(emulator: Path, demo_int4: Artifact, tmp_path: Path) -> None:
    with _emulated(emulator, environment(demo_int4.path, tmp_path / "usage.db")) as invoke:
        body = {"model": demo_int4.path.name, "messages": user("What is 47 plus 38?"), "stream": True}
        event = {"version": "2.0", "rawPath": "/v1/chat/completions", "body": json.dumps(body)}
        context = {"http": {"method": "POST"}, "domainName": "abc.lambda-url.us-east-1.on.aws"}
        raw = invoke({**event, "requestContext": context})
        prelude, separator, payload = raw.partition(bytes(8))
        assert separator
        assert json.loads(prelude)["statusCode"] == 200
        frames = events(payload.decode())
        assert "".join(frame["choices"][0]["delta"].get("content", "") for frame in frames) == "85"
        assert payload.endswith(b"data: [DONE]\n\n")
        whole = json.loads(invoke({**body, "stream": False}))
        assert whole["choices"][0]["message"]["content"] == "85"
        assert "cannot answer records of aws:sqs" in invoke({"Records": [{"eventSource": "aws:sqs"}]}).decode()


@contextmanager
def _emulated(emulator: Path, variables: dict[str, str]) -> Iterator[Any]:
    """Run the bootstrap under the emulator; yields what invokes it."""
    address, runtime_api = (f"127.0.0.1:{port}" for port in _free_ports())
    options = ["--runtime-interface-emulator-address", address, "--runtime-api-address", runtime_api]
    command = [str(emulator), *options, sys.executable, str(BOOTSTRAP)]
    url = f"http://{address}/2015-03-31/functions/function/invocations"
    log = subprocess.DEVNULL
    with (
        subprocess.Popen(command, env=variables, stdout=log, stderr=log, start_new_session=True) as process,
        httpx.Client(transport=httpx.HTTPTransport(retries=8), timeout=TIMEOUT_S) as http,
    ):
        try:
            yield lambda event: http.post(url, json=event).content
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def _free_ports() -> tuple[int, int]:
    """Return two ports that nobody has, and that the system gives nobody by itself before the emulator is there."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    untouched = range(1025, lowest) or range(1025, 65536)
    found: set[int] = set()
    while len(found) < 2:
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", random.choice(untouched))) as one:
            found.add(one.getsockname()[1])
    one_port, other_port = found
    return one_port, other_port
