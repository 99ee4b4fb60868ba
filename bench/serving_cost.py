"""What serving costs beside the model: processor time a streamed token, of the host, its replica and the client.

    python bench/serving_cost.py ARTIFACT [--streams 8 32 100] [--tokens 200] [--rounds 5]

Streams begin together, over HTTP; each round asks every number of streams once. Processor time is what Linux counts for
a process, so it says little of what else the machine does meanwhile.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cold_start import children, free_port
from http_client import Event, stream_all
from measure import Stream, steady_tokens_per_s

PROMPT = list(range(5, 37))
PILOTLIGHT = ("-m", "pilotlight")


@dataclass(frozen=True)
class Cost:
    """One round: microseconds of processor time a token, and the speed while all streams decoded."""

    host_us: float
    replica_us: float
    client_us: float
    tokens_per_s: float


@dataclass(frozen=True)
class Server:
    port: int
    pid: int

    @property
    def replica_pid(self) -> int:
        return next(pid for pid, name in children(self.pid) if name == "pl-replica")


@contextmanager
def serve(artifact: Path, num_slots: int, program: Sequence[str] = PILOTLIGHT) -> Iterator[Server]:
    """Serve an artifact with so many slots, and have its replica started."""
    with tempfile.TemporaryDirectory() as directory:
        port = free_port()
        config = Path(directory) / "pilotlight.toml"
        config.write_text(
            f"[host]\nport = {port}\nledger = {json.dumps(directory + '/usage.db')}\n"
            f"[functions.bench]\nartifact = {json.dumps(str(artifact))}\nmin_replicas = 1\nnum_slots = {num_slots}\n"
            "prefix_cache_mb = 0\n"
        )
        command = [sys.executable, *program, "serve", "--config", str(config)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            while "serving" not in process.stdout.readline():
                pass
            try:
                yield Server(port, process.pid)
            finally:
                process.terminate()
                process.wait()


def body_of(num_tokens: int) -> dict[str, Any]:
    """Return a request for so many tokens."""
    return {
        "model": "bench", "prompt": PROMPT, "max_tokens": num_tokens, "ignore_eos": True, "temperature": 0,
        "stream": True, "return_token_ids": True,
    }  # fmt: skip


def ask(port: int, num_streams: int, num_tokens: int) -> list[Stream]:
    return stream_all(port, "/v1/completions", [body_of(num_tokens)] * num_streams, num_tokens_of)


def measure(server: Server, num_streams: int, num_tokens: int) -> Cost:
    before = _cpu_s(server)
    answers = ask(server.port, num_streams, num_tokens)
    after = _cpu_s(server)
    count = sum(len(answer.token_times) for answer in answers)
    assert count == num_streams * num_tokens, count
    host, replica, client = ((b - a) / count * 1e6 for a, b in zip(before, after, strict=True))
    return Cost(host, replica, client, steady_tokens_per_s(answers))


def num_tokens_of(event: Event) -> int:
    return sum(len(choice.get("token_ids") or ()) for choice in event.get("choices", ()))


def _cpu_s(server: Server) -> tuple[float, float, float]:
    return process_cpu_s(server.pid), process_cpu_s(server.replica_pid), time.process_time()


def process_cpu_s(pid: int) -> float:
    """Return the processor time of all threads of a process."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--streams", type=int, nargs="+", default=[8, 32, 100])
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found: dict[int, list[Cost]] = {number: [] for number in options.streams}
    with serve(options.artifact, max(options.streams)) as server:
        ask(server.port, max(options.streams), 50)  # warms up
        for _ in range(options.rounds):
            for number, costs in found.items():
                costs.append(measure(server, number, options.tokens))
    if options.json:
        print(json.dumps({number: [vars(cost) for cost in costs] for number, costs in found.items()}))
        return
    print(f"{'streams':>7} {'host µs':>18} {'replica µs':>18} {'client µs':>18} {'tokens/s':>22}")
    for number, costs in found.items():
        columns: dict[str, list[float]] = {
            name: [getattr(cost, name) for cost in costs]
            for name in ("host_us", "replica_us", "client_us", "tokens_per_s")
        }
        print(f"{number:>7}", *(_spread(values).rjust(18) for values in columns.values()))


def _spread(values: list[Any]) -> str:
    return f"{statistics.median(values):,.0f} ({min(values):,.0f}–{max(values):,.0f})"


if __name__ == "__main__":
    main()
