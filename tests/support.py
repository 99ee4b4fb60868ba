"""What several test modules build on: a toy artifact, and the API over a function with the fake session."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from starlette.types import ASGIApp
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from pace import Pace
from pilotlight.api.app import Api
from pilotlight.api.attestation import Attester
from pilotlight.api.idempotency import KeptAnswers
from pilotlight.api.metrics import Metrics
from pilotlight.api.response_store import ResponseStore
from pilotlight.api.resumption import resume_tokens
from pilotlight.artifact import (
    CHAT_TEMPLATE,
    GENERATION_CONFIG,
    GRAPH,
    MANIFEST,
    TOKENIZER,
    WEIGHTS,
    Artifact,
    FileEntry,
    KvLayout,
    Manifest,
    Shapes,
    Source,
    SpecialTokens,
    open_artifact,
    sha256_of,
)
from pilotlight.config import HostSettings
from pilotlight.engine.backend import EngineBackend
from pilotlight.engine.fake import FakeSession, next_token
from pilotlight.engine.grammar import Grammars
from pilotlight.engine.policy import Policy
from pilotlight.function import Function
from pilotlight.metering.keyring import Keyring
from pilotlight.metering.ledger import Ledger
from pilotlight.metering.prices import PriceTable
from pilotlight.tee import TeeLabel

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEMO_MODEL = Path(__file__).parent.parent / "models" / "demo" / "model"
VOCAB_SIZE = 258
EOS_ID = 257
MAX_BODY_BYTES = 100_000
SMALL_CHUNKS = Policy(max_chunk_tokens=8)
PATIENCE_S = 300.0
"""When a test that waits gives up. Nothing takes so long; on a busy machine, everything may take long."""
PRICES = {"prompt_per_million_tokens": "1000000", "completion_per_million_tokens": "2000000"}


def toy_tokenizer() -> Tokenizer:
    """One token a byte, and two special tokens; token ids 0 to 255 decode to arbitrary bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    return tokenizer


def toy_chat_ids(*messages: tuple[str, str]) -> list[int]:
    """Return the toy template's prompt for (role, content) pairs, ready for the assistant."""
    turns = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in messages)
    ids: list[int] = toy_tokenizer().encode(f"{turns}<|im_start|>assistant\n", add_special_tokens=False).ids
    return ids


def toy_text(token_ids: list[int]) -> str:
    """Return what a client reads of these tokens, when the last one is complete."""
    text: str = toy_tokenizer().decode(token_ids, skip_special_tokens=True)
    return text.rstrip("�")


def toy_manifest(files: dict[str, FileEntry], **changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "format_version": 1,
        "source": Source("toy", None, "Apache-2.0"),
        "family": "llama",
        "precision": "fp32",
        "recipe": {},
        "num_parameters": 1,
        "shapes": Shapes(1, 1, 1, 16, 16, VOCAB_SIZE, 64),
        "special_tokens": SpecialTokens(None, [EOS_ID], None),
        "kv": KvLayout("float32"),
        "verification": {},
        "files": files,
        "tools": {},
    }
    return Manifest(**{**fields, **changes})


def write_artifact(path: Path, chat_template: str = CHATML, **changes: Any) -> Path:
    """Write an artifact whose graph is no graph, for everything above the session."""
    path.mkdir(parents=True)
    toy_tokenizer().save(str(path / TOKENIZER))
    (path / CHAT_TEMPLATE).write_text(chat_template)
    (path / GENERATION_CONFIG).write_text('{"do_sample": false}')
    (path / GRAPH).write_bytes(b"no graph")
    (path / WEIGHTS).write_bytes(b"no weights")
    files = {file.name: FileEntry(sha256_of(file), file.stat().st_size) for file in sorted(path.iterdir())}
    (path / MANIFEST).write_bytes(toy_manifest(files, **changes).encode())
    return path


@dataclass(frozen=True)
class Serving:
    """The API over one toy function called ``toy``."""

    app: ASGIApp
    client: httpx.AsyncClient
    function: Function
    ledger: Ledger
    session: FakeSession

    async def chat(self, content: str = "hi", headers: dict[str, str] | None = None, **params: Any) -> httpx.Response:
        body = {"model": "toy", "messages": [{"role": "user", "content": content}], **params}
        return await self.client.post("/v1/chat/completions", content=json.dumps(body), headers=headers)

    async def complete(self, prompt: object = "hi", **params: Any) -> httpx.Response:
        return await self.client.post("/v1/completions", json={"model": "toy", "prompt": prompt, **params})


@asynccontextmanager
async def serving(
    artifact: Artifact,
    directory: Path,
    session: FakeSession | None = None,
    max_queued_requests: int = 8,
    policy: Policy = SMALL_CHUNKS,
    resume_window_s: float = 30.0,
    max_kept_answer_bytes: int = 1_000_000,
    resumes_all_streams: bool = False,
    resume_secret: str = "",
    max_answer_tokens: int | None = None,
    middleware: Sequence[Callable[[ASGIApp], ASGIApp]] = (),
    attester: Attester | None = None,
    tee: TeeLabel = TeeLabel.NONE,
) -> AsyncIterator[Serving]:
    session = session or FakeSession(VOCAB_SIZE)
    grammars = Grammars(artifact.tokenizer_path, VOCAB_SIZE, [EOS_ID])
    backend = EngineBackend(session, max_queued_requests, policy, grammars)
    metrics = Metrics()
    with (
        Ledger(directory / "usage.db") as ledger,
        Keyring(directory / "usage.db") as keyring,
        ResponseStore.open(HostSettings()) as responses,
    ):
        prices = PriceTable.from_config(PRICES)
        function = Function(
            "toy",
            artifact,
            backend,
            ledger,
            prices,
            max_context_tokens=session.max_context_tokens,
            max_answer_tokens=max_answer_tokens,
            tee=tee,
            observer=metrics,
        )
        backend.start()
        kept_answers = KeptAnswers(
            ledger, resume_window_s, 3600, max_kept_answer_bytes, resumes_all_streams=resumes_all_streams
        )
        metrics.watch({"toy": function})
        tokens = resume_tokens(HostSettings(resume_secret=resume_secret))
        app = Api(
            {"toy": function},
            ledger,
            metrics,
            MAX_BODY_BYTES,
            responses,
            keyring,
            kept_answers,
            resume_tokens=tokens,
            attester=attester,
            middleware=middleware,
        ).app()
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        try:
            async with httpx.AsyncClient(transport=transport, base_url="http://toy") as client:
                yield Serving(app, client, function, ledger, session)
        finally:
            await function.close()
            await kept_answers.close()


def let_pass(seconds: float) -> None:
    """Have the running loop's timers find that so much time has gone by."""
    loop = asyncio.get_running_loop()
    clock = loop.time
    loop.time = lambda: clock() + seconds  # type: ignore[method-assign]


async def run_out_of_time(function: Function, request_id: str, left_s: float) -> None:
    """Let so much time pass for a request that is admitted, or will be, and wait until that has cut it off."""
    while (invocation := function.running(request_id)) is None:
        await asyncio.sleep(0)
    await asyncio.wait({invocation.admitted})  # its deadline is set then
    let_pass(left_s)
    while invocation.cut is None:
        await asyncio.sleep(0)


def expected_tokens(
    prompt_ids: list[int], max_new_tokens: int, stop_ids: frozenset[int] = frozenset({EOS_ID})
) -> list[int]:
    """What the fake session's greedy continuation must be."""
    tokens = list(prompt_ids)
    for _ in range(max_new_tokens):
        tokens.append(next_token(tokens, VOCAB_SIZE))
        if tokens[-1] in stop_ids:
            break
    return tokens[len(prompt_ids) :]


def events(text: str) -> list[dict[str, Any]]:
    """Parse an SSE body whose frames all carry JSON, except for the terminator and pings."""
    frames = text.removesuffix("\n\n").split("\n\n")
    return [json.loads(frame.removeprefix("data: ")) for frame in frames if frame not in ("data: [DONE]", ": ping")]


def named_events(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Parse an SSE body whose frames carry an event's name and its JSON."""
    found = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        name, _, payload = block.partition("\n")
        found.append((name.removeprefix("event: "), json.loads(payload.removeprefix("data: "))))
    return found


def export_artifact(model: Path, target: Path, precision: str) -> Artifact:
    """Export a model with the command that users call; a precision's recipe is named as in ``int4-fp16``."""
    of = ["--precision", precision.partition("-")[0], *(["--recipe", precision] if "-" in precision else [])]
    command = [sys.executable, "-m", "pilotlight", "export", str(model), *of, "--out", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return open_artifact(target)


@dataclass(frozen=True)
class ServerProcess:
    """A real ``pilotlight serve``."""

    process: subprocess.Popen[str]
    url: str


@contextmanager
def server_process(
    artifact: Path, ledger: Path, *options: str, python: str = sys.executable, pace: Pace | None = None
) -> Iterator[ServerProcess]:
    """Serve an artifact as ``demo`` on a free port; the process has ended when the block is left."""
    with _serving_process(ledger, [python, str(artifact), "--name", "demo", *options], pace) as server:
        yield server


@contextmanager
def config_process(config: Path, ledger: Path | str, pace: Pace | None = None) -> Iterator[ServerProcess]:
    """Serve the functions of a configuration on a free port; the process has ended when the block is left."""
    with _serving_process(ledger, [sys.executable, "--config", str(config)], pace) as server:
        yield server


@contextmanager
def _serving_process(ledger: Path | str, arguments: list[str], pace: Pace | None) -> Iterator[ServerProcess]:
    python, *options = arguments
    command = [python, "-m", "pilotlight", "serve", *options, "--port", "0", "--ledger", str(ledger)]
    variables = None if pace is None else pace.environment
    with (
        tempfile.TemporaryFile("w+") as log,  # a pipe that nobody reads is full at some time, and then the server waits
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=variables) as process,
    ):
        try:
            assert process.stdout is not None
            lines = iter(process.stdout.readline, "")
            url = next((match[1] for line in lines if (match := re.search(r"serving (\S+)/v1", line))), None)
            if url is None:
                log.seek(0)
                raise AssertionError(log.read())
            yield ServerProcess(process, url)
        finally:
            process.terminate()
            try:
                process.communicate(timeout=PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
