"""Peers that are servers: each a process of its own that streams token by token over HTTP."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from gguf_model import write_gguf
from http_client import Event, stream_all
from measure import Stream
from memory import Memory, PeakMemory
from models import Shape
from peer import Opened, PeerFailed, Setting
from pilotlight.artifact import open_artifact
from pilotlight.engine.session import OnnxSession

START_TIMEOUT_S = 120
STOP_TIMEOUT_S = 30
OURS = "pilotlight"
OUR_ENGINE = "pilotlight-engine"


class Api(Protocol):
    """How a server is asked."""

    name: str
    path: str

    def body(self, prompt: list[int], num_tokens: int) -> dict[str, Any]:
        """Return a streamed request for exactly ``num_tokens`` tokens."""

    def num_tokens(self, event: Event) -> int:
        """Return how many tokens a streamed event carries."""


@dataclass(frozen=True)
class OpenedServer:
    """A server that is ready."""

    api: Api
    port: int
    memory: PeakMemory
    versions: dict[str, str]

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[Stream]:
        bodies = [self.api.body(prompt, num_tokens) for prompt in prompts]
        answers = stream_all(self.port, self.api.path, bodies, self.api.num_tokens)
        fewest = min(len(answer.token_times) for answer in answers)
        if fewest < num_tokens - 1:  # llama-server's last event may hold the last token, or none
            raise PeerFailed(f"{fewest} tokens instead of {num_tokens}")
        return answers

    def peak_memory(self) -> Memory:
        return self.memory.peak


class Pilotlight:
    """This project, serving an artifact that it exported itself."""

    path = "/v1/completions"
    is_four_bit = is_server = True

    def __init__(self, recipe: str, name: str = OURS) -> None:
        self.name, self._recipe = name, recipe

    def missing(self) -> str | None:
        return None

    def prepare(self, shape: Shape, source: Path, directory: Path) -> Path:
        """Export, and open once, so that its graphs lie optimized in its own cache, as after a first start."""
        artifact = directory / f"{shape.name}-{self._recipe}"
        if not artifact.exists():
            command = [sys.executable, "-m", "pilotlight", "export", str(source), "--out", str(artifact)]
            _run([*command, "--precision", self._recipe.split("-")[0], "--recipe", self._recipe])
        OnnxSession(open_artifact(artifact), 1, 512, 1, cache_of(artifact))
        return artifact

    @contextmanager
    def open(self, model: Path, setting: Setting) -> Iterator[Opened]:
        with _directory() as directory, _port() as port:
            config = directory / "pilotlight.toml"
            config.write_text(
                f"[host]\nport = {port}\nledger = {json.dumps(str(directory / 'usage.db'))}\n"
                f"cache_dir = {json.dumps(str(cache_of(model).absolute()))}\n"
                f"[functions.bench]\nartifact = {json.dumps(str(model))}\nnum_slots = {setting.num_slots}\n"
                f"num_threads = {setting.num_threads}\nmax_context_tokens = {setting.max_context_tokens}\n"
                "prefix_cache_mb = 0\n"  # as llama-server's prompt cache is off, too
                'speculation = "off"\n'  # random weights repeat themselves, which is no merit
            )
            command = [sys.executable, "-m", "pilotlight", "serve", "--config", str(config)]
            manifest = json.loads((model / "manifest.json").read_text())
            packages = {name: version(name) for name in ("pilotlight", "onnxruntime")}
            recipe = {"recipe": manifest["recipe"]["name"]}
            with _running(self, command, port, "/readyz", directory, packages | recipe) as opened:
                yield opened

    def body(self, prompt: list[int], num_tokens: int) -> dict[str, Any]:
        wanted = {"max_tokens": num_tokens, "ignore_eos": True, "return_token_ids": True, "temperature": 0}
        return {"model": "bench", "prompt": prompt, "stream": True, **wanted}

    def num_tokens(self, event: Event) -> int:
        return sum(len(choice.get("token_ids") or ()) for choice in event.get("choices", ()))


class LlamaServer:
    """llama.cpp's server, on Q4_0 weights."""

    name = "llama-server"
    path = "/completion"
    is_four_bit = is_server = True

    def __init__(self, program: str | None) -> None:
        self._program = program

    def missing(self) -> str | None:
        return None if self._program else "the program llama-server (--llama-server)"

    def prepare(self, shape: Shape, source: Path, directory: Path) -> Path:
        return write_gguf(shape, directory / f"{shape.name}-q4_0.gguf")

    @contextmanager
    def open(self, model: Path, setting: Setting) -> Iterator[Opened]:
        assert self._program is not None
        threads, slots = str(setting.num_threads), setting.num_slots
        with _directory() as directory, _port() as port:
            command = [
                self._program, "-m", str(model), "--port", str(port), "--host", "127.0.0.1", "-t", threads,
                "-tb", threads, "-np", str(slots), "-c", str(setting.max_context_tokens * slots), "--no-webui",
                "--cache-ram", "0",
            ]  # fmt: skip
            with _running(self, command, port, "/health", directory, self._versions()) as opened:
                yield opened

    def _versions(self) -> dict[str, str]:
        assert self._program is not None
        told = subprocess.run([self._program, "--version"], capture_output=True, text=True, check=False)
        found = re.search(r"version: (.+)", told.stderr + told.stdout)
        return {"llama.cpp": found.group(1) if found else "unknown"}

    def body(self, prompt: list[int], num_tokens: int) -> dict[str, Any]:
        wanted = {"n_predict": num_tokens, "ignore_eos": True, "temperature": 0, "cache_prompt": False}
        return {"prompt": prompt, "stream": True, "return_tokens": True, **wanted}

    def num_tokens(self, event: Event) -> int:
        return 0 if event.get("stop") else max(1, len(event.get("tokens", ())))


@contextmanager
def _running(
    api: Api, command: list[str], port: int, ready_path: str, directory: Path, versions: dict[str, str]
) -> Iterator[Opened]:
    log = directory / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
        memory = PeakMemory(process.pid)
        try:
            _wait_until_ready(f"http://127.0.0.1:{port}{ready_path}", process, log)
            yield OpenedServer(api, port, memory, versions)
        finally:
            memory.stop()
            stop(process)


def stop(process: subprocess.Popen[Any]) -> None:
    """End a process, by force if it does not follow."""
    process.terminate()
    try:
        process.wait(timeout=STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def cache_of(artifact: Path) -> Path:
    """Return where the graphs that an artifact's first start makes are kept."""
    return artifact.parent / "cache"


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise PeerFailed(str(error)) from error


def _wait_until_ready(url: str, process: subprocess.Popen[Any], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise PeerFailed(f"it ended at its start: {log.read_text()[-500:]}")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.05)
    raise PeerFailed(f"it was not ready after {START_TIMEOUT_S} s")


@contextmanager
def _directory() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def _port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    yield port
