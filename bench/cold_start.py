"""Cold start: request sent → first token received over HTTP, beside llama-server's process spawn → first token.

    python bench/cold_start.py --artifact DIR --gguf FILE --llama-server PATH [--rounds 10] [--out FILE]

`make bench` runs it for its models, where it has a llama-server.

A round measures each once, in turn first: llama-server as it comes, llama-server at its leanest, ours from deep sleep
(only the zygote is left) and from light sleep (a template is kept). The page cache is warm. The paired ratio is what
counts: deep against the default, light against the leanest.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PROMPT = list(range(5, 21))
LEAN = ["-c", "512", "--no-warmup"]
"""What makes llama-server's start shorter: a small context, and no run before the first request."""


def first_token_s(port: int, path: str, body: dict[str, object], since: float) -> float | None:
    """Send a streamed request and return the seconds from ``since`` to its first token, None if nobody takes it yet."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            return None
        for line in response:
            if line.startswith(b"data: {"):
                return time.perf_counter() - since
    except (ConnectionError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    return None


def llama_server(program: str, gguf: Path, num_threads: int, *options: str) -> float:
    """Start the server, and ask until it answers."""
    port = free_port()
    command = [program, "-m", str(gguf), "--port", str(port), "--host", "127.0.0.1", "-np", "1", "--no-webui",
               "-t", str(num_threads), *options]  # fmt: skip
    body: dict[str, object] = {"prompt": PROMPT, "n_predict": 1, "stream": True, "temperature": 0}
    since = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            while (taken_s := first_token_s(port, "/completion", body, since)) is None:
                if process.poll() is not None:
                    raise SystemExit("llama-server ended at its start")
                time.sleep(0.002)
            return taken_s
        finally:
            process.kill()


@contextmanager
def pilotlight(artifact: Path, sleep: str, num_threads: int) -> Iterator[Callable[[], float]]:
    """Serve an artifact that goes to sleep after each request; yield what measures one waking."""
    with tempfile.TemporaryDirectory() as directory:
        port = free_port()
        config = Path(directory) / "pilotlight.toml"
        config.write_text(
            f"[host]\nport = {port}\nledger = {json.dumps(directory + '/usage.db')}\n"
            f"[functions.cold]\nartifact = {json.dumps(str(artifact))}\nnum_threads = {num_threads}\n"
            f'idle_timeout_s = 0.1\nsleep = "{sleep}"\nmax_context_tokens = 2048\n'
        )
        command = [sys.executable, "-m", "pilotlight", "serve", "--config", str(config)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            while "serving" not in process.stdout.readline():
                pass

            def ask() -> float:
                body: dict[str, object] = {
                    "model": "cold", "prompt": PROMPT, "max_tokens": 1, "stream": True, "temperature": 0,
                    "return_token_ids": True,
                }  # fmt: skip
                taken_s = first_token_s(port, "/v1/completions", body, time.perf_counter())
                assert taken_s is not None
                return taken_s

            def wake() -> float:
                wait_for_sleep(process.pid, sleep)
                return ask()

            try:
                ask()  # the first start keeps the optimized graphs, and a template comes with the first sleep
                wake()
                yield wake
            finally:
                process.terminate()
                process.wait()


def wait_for_sleep(pid: int, sleep: str) -> None:
    """Wait until no replica is left, and the template is there where one is kept."""
    while True:
        names = [name for _, name in children(pid)]
        if "pl-replica" not in names and (sleep == "deep" or "pl-template" in names):
            time.sleep(0.3)
            return
        time.sleep(0.05)


def children(pid: int) -> Iterator[tuple[int, str]]:
    """Yield the processes below ``pid``."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                name, _, rest = (entry / "stat").read_text().partition("(")[2].rpartition(")")
            except OSError:
                continue
            state, parent = rest.split()[:2]
            if int(parent) == pid and state != "Z":
                yield int(entry.name), name
                yield from children(int(entry.name))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def measure(artifact: Path, gguf: Path, program: str, num_threads: int, num_rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each round by what was measured."""
    taken: dict[str, list[float]] = {}
    with pilotlight(artifact, "deep", num_threads) as deep, pilotlight(artifact, "light", num_threads) as light:
        ways: dict[str, Callable[[], float]] = {
            "llama-server, default": lambda: llama_server(program, gguf, num_threads),
            "llama-server, leanest": lambda: llama_server(program, gguf, num_threads, *LEAN),
            "pilotlight, deep sleep": deep,
            "pilotlight, light sleep": light,
        }
        for number in range(num_rounds):
            for name in [*ways][:: 1 if number % 2 == 0 else -1]:
                taken.setdefault(name, []).append(ways[name]())
    return taken


def report(taken: dict[str, list[float]], artifact: Path, num_threads: int, out: Path | None) -> None:
    """Print medians and paired ratios, with their spread, and write every figure to ``out``."""
    for name, values in taken.items():
        low, high = min(values), max(values)
        print(f"{name:<26} {statistics.median(values) * 1000:6.0f} ms   ({low * 1000:.0f}–{high * 1000:.0f})")
    ratios = {
        "deep / default": ratio(taken, "pilotlight, deep sleep", "llama-server, default"),
        "light / leanest": ratio(taken, "pilotlight, light sleep", "llama-server, leanest"),
    }
    for name, values in ratios.items():
        print(f"{name:<26} {statistics.median(values):6.2f}      ({min(values):.2f}–{max(values):.2f})")
    if out is not None:
        num_rounds = max(map(len, taken.values()))
        machine = {"cores": num_threads, "architecture": platform.machine(), "rounds": num_rounds}
        found = {"machine": machine, "model": artifact.name, "seconds": taken, "ratios": ratios}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n")


def ratio(taken: dict[str, list[float]], ours: str, theirs: str) -> list[float]:
    return [a / b for a, b in zip(taken[ours], taken[theirs], strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--llama-server", required=True)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    taken = measure(args.artifact, args.gguf, args.llama_server, args.threads, args.rounds)
    report(taken, args.artifact, args.threads, args.out)


if __name__ == "__main__":
    main()
