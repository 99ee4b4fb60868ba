"""The servers that are measured: each starts as a process of its own and streams token by token over HTTP."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx
import psutil

START_TIMEOUT_S = 120


@dataclass(frozen=True)
class Running:
    """A server that answers at ``url``."""

    url: str
    process: subprocess.Popen[bytes]

    def memory_mib(self) -> tuple[float, float]:
        """Return the private and the shared (mapped) resident memory of the process and its children, in MiB."""
        processes = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        maps = [process.memory_full_info() for process in processes]
        return sum(m.uss for m in maps) / 2**20, sum(m.rss - m.uss for m in maps) / 2**20


class Server(Protocol):
    """How a server is started and asked."""

    name: str

    def command(self, model: Path, port: int, num_slots: int, num_threads: int, directory: Path) -> list[str]:
        """Return the command line that serves ``model``."""

    def request(self, prompt: list[int], num_tokens: int) -> tuple[str, dict[str, Any]]:
        """Return path and body of a streamed request for exactly ``num_tokens`` tokens."""

    def num_tokens(self, event: dict[str, Any]) -> int:
        """Return how many tokens a streamed event carries."""


class Pilotlight:
    name = "pilotlight"

    def command(self, model: Path, port: int, num_slots: int, num_threads: int, directory: Path) -> list[str]:
        config = directory / "pilotlight.toml"
        config.write_text(
            f"[host]\nport = {port}\nledger = {json.dumps(str(directory / 'usage.db'))}\n"
            f"[functions.bench]\nartifact = {json.dumps(str(model))}\nnum_slots = {num_slots}\n"
            f"num_threads = {num_threads}\nmax_queued_requests = 1000\n"
        )
        return [sys.executable, "-m", "pilotlight", "serve", "--config", str(config)]

    def request(self, prompt: list[int], num_tokens: int) -> tuple[str, dict[str, Any]]:
        wanted = {"max_tokens": num_tokens, "ignore_eos": True, "return_token_ids": True, "temperature": 0}
        return "/v1/completions", {"model": "bench", "prompt": prompt, "stream": True, **wanted}

    def num_tokens(self, event: dict[str, Any]) -> int:
        return sum(len(choice.get("token_ids", ())) for choice in event["choices"])


class LlamaServer:
    name = "llama-server"

    def __init__(self, program: str) -> None:
        self._program = program

    def command(self, model: Path, port: int, num_slots: int, num_threads: int, directory: Path) -> list[str]:
        context = 2048 * num_slots if num_slots == 1 else 512 * num_slots
        return [
            self._program, "-m", str(model), "--port", str(port), "--host", "127.0.0.1", "-t", str(num_threads),
            "-tb", str(num_threads), "-np", str(num_slots), "-c", str(context), "--no-webui", "--cache-ram", "0",
        ]  # fmt: skip

    def request(self, prompt: list[int], num_tokens: int) -> tuple[str, dict[str, Any]]:
        wanted = {"n_predict": num_tokens, "ignore_eos": True, "temperature": 0, "cache_prompt": False}
        return "/completion", {"prompt": prompt, "stream": True, "return_tokens": True, **wanted}

    def num_tokens(self, event: dict[str, Any]) -> int:
        return 0 if event.get("stop") else max(1, len(event.get("tokens", ())))


@contextmanager
def running(server: Server, model: Path, num_slots: int, num_threads: int) -> Iterator[Running]:
    """Start a server on a free loopback port, wait until it is ready, and stop it at the end."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    directory = Path(tempfile.mkdtemp(prefix="bench-"))
    command = server.command(model, port, num_slots, num_threads, directory)
    url = f"http://127.0.0.1:{port}"
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            _wait_until_ready(url, process, directory / "log")
            yield Running(url, process)
        finally:
            process.terminate()
            process.wait(timeout=30)
            shutil.rmtree(directory, ignore_errors=True)


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"a server ended at its start:\n{log.read_text()[-2000:]}")
        try:
            if httpx.get(f"{url}/v1/models").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise SystemExit(f"a server was not ready after {START_TIMEOUT_S} s")
