"""The planner against the host: segments of real traces, replayed over HTTP and simulated with that hour's rates.

    python bench/plan_validation.py ARTIFACT --traces DIR [--segments code-a code-b chat] [--out FILE]

First the artifact's rates are measured as `pilotlight bench --rates` does. Then every segment is sent to a real
`pilotlight serve` on loopback, which sleeps and wakes meanwhile, each request at its own time whatever became of the
others; and simulated, at several phases of the host's second hand, of which the replay had one by chance. Nothing is
fitted to the replay: what the simulation knows are the rates, the trace and the configuration.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from http_client import Response, exchange
from machine import describe_machine
from pilotlight.config import FunctionSettings
from pilotlight.host.bench import Bench
from pilotlight.host.rates import Rates
from pilotlight.plan.outcomes import percentile
from pilotlight.plan.plans import Place, Plan, Warmth
from pilotlight.plan.prices import read_prices
from pilotlight.plan.simulate import Conditions, simulate
from pilotlight.plan.trace import Arrival, Scaling, read_trace

CODE, CHAT = "AzureLLMInferenceTrace_code.csv", "mooncake_conversation_trace.jsonl"
CONTEXT = 512
NUM_PHASES = 12
TOLERANCE = 0.2
JUDGED = ("ttft_p50_s", "ttft_p95_s", "num_cold_starts")
TTFT_BYTES = b"data: {"


@dataclass(frozen=True)
class Segment:
    """What is replayed, and by which function. ``held_out``: it was first replayed when the model was finished."""

    name: str
    trace: str
    scaling: Scaling
    sleep: str
    idle_timeout_s: float
    held_out: bool


def _code(from_s: float, duration_s: float, speed_up: float) -> Scaling:
    return Scaling(from_s, duration_s, None, speed_up, 1 / 12, 1.0, CONTEXT, 128)


SEGMENTS = {
    one.name: one
    for one in (
        Segment("code-a", CODE, _code(1350, 100, 1.25), "deep", 0.5, held_out=False),
        Segment("code-b", CODE, _code(1900, 100, 1.25), "light", 0.5, held_out=True),
        Segment("chat", CHAT, Scaling(600, 120, None, 1.7, 1 / 32, 1 / 8, CONTEXT, 96), "light", 0.5, held_out=False),
    )
}


@dataclass(frozen=True)
class Figures:
    """What was measured, or simulated."""

    num_requests: int
    num_served: float
    num_refused: float
    num_cold_starts: float
    ttft_p50_s: float
    ttft_p95_s: float
    ttft_p99_s: float
    mean_ttft_s: float


def prompt_ids(number: int, arrival: Arrival) -> list[int]:
    """Return the tokens of a request: the same for the blocks that a trace calls the same, else random ones."""
    ids: list[int] = []
    for block_id in arrival.block_ids:
        ids += random.Random(f"block {block_id}").choices(range(3, 400), k=round(arrival.block_tokens))
    ids += random.Random(f"request {number}").choices(range(3, 400), k=arrival.num_prompt_tokens)
    return ids[: arrival.num_prompt_tokens]


def bodies(arrivals: list[Arrival]) -> list[bytes]:
    return [
        json.dumps({
            "model": "replayed", "prompt": prompt_ids(number, one), "max_tokens": one.num_new_tokens, "stream": True,
            "temperature": 0, "ignore_eos": True, "return_token_ids": True,
        }).encode()
        for number, one in enumerate(arrivals)
    ]  # fmt: skip


def replay(port: int, arrivals: list[Arrival]) -> tuple[list[float | None], float]:
    """Send all requests, each at its time; return their times to first token, None for who was refused, and the worst
    delay of a sending.
    """
    prepared = bodies(arrivals)

    async def ask(number: int, begun_at: float) -> tuple[float | None, float]:
        due_at = begun_at + arrivals[number].at_s
        await asyncio.sleep(due_at - time.monotonic())
        sent_at = time.monotonic()
        response = await exchange(port, "/v1/completions", prepared[number])
        if response.status == 503:
            return None, sent_at - due_at
        assert response.status == 200, (response.status, response.pieces[:1])
        return first_token_at(response) - sent_at, sent_at - due_at

    async def ask_all() -> list[tuple[float | None, float]]:
        begun_at = time.monotonic() + 0.5
        return list(await asyncio.gather(*(ask(number, begun_at) for number in range(len(arrivals)))))

    answers = asyncio.run(ask_all())
    return [wait for wait, _ in answers], max(late for _, late in answers)


def first_token_at(response: Response) -> float:
    return next(at for at, piece in response.pieces if TTFT_BYTES in piece)


@contextmanager
def server(artifact: Path, segment: Segment, num_threads: int) -> Iterator[int]:
    """Serve an artifact as a segment asks for it."""
    with tempfile.TemporaryDirectory() as directory:
        config = Path(directory) / "pilotlight.toml"
        config.write_text(
            f"[host]\nledger = {json.dumps(directory + '/usage.db')}\n[functions.replayed]\n"
            f"artifact = {json.dumps(str(artifact.resolve()))}\nnum_threads = {num_threads}\n"
            f'idle_timeout_s = {segment.idle_timeout_s}\nsleep = "{segment.sleep}"\nmax_context_tokens = {CONTEXT}\n'
            'speculation = "off"\n'
        )
        command = [sys.executable, "-m", "pilotlight", "serve", "--config", str(config), "--port", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                found = (re.search(r"serving http://\S+:(\d+)/v1", line) for line in process.stdout)
                yield next(int(match[1]) for match in found if match)
            finally:
                process.terminate()


def num_starts(port: int) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        text = answer.read().decode()
    found = re.search(r'^pilotlight_replica_start_seconds_count\{.*stage="fork".*\} (\S+)$', text, re.MULTILINE)
    return int(float(found[1])) if found else 0


@dataclass(frozen=True)
class Replayed:
    """A replay: its figures, how late the client was at worst, and what each request waited."""

    figures: Figures
    late_s: float
    waits_s: list[float | None]


def measured(artifact: Path, segment: Segment, arrivals: list[Arrival], num_threads: int) -> Replayed:
    with server(artifact, segment, num_threads) as port:
        waits, late_s = replay(port, arrivals)
        starts = num_starts(port)
    ordered = sorted(wait for wait in waits if wait is not None)
    p50, p95, p99 = (percentile(ordered, share) for share in (0.5, 0.95, 0.99))
    num_refused = len(waits) - len(ordered)
    found = Figures(len(waits), len(ordered), num_refused, starts, p50, p95, p99, statistics.fmean(ordered))
    return Replayed(found, late_s, waits)


def simulated(segment: Segment, arrivals: list[Arrival], rates: Rates) -> Figures:
    """Return the mean over phases of the host's second hand."""
    warmth = Warmth.COLD if segment.sleep == "deep" else Warmth.LIGHT
    settings = FunctionSettings(
        "", idle_timeout_s=segment.idle_timeout_s, sleep=segment.sleep, max_context_tokens=CONTEXT  # type: ignore[arg-type]
    )  # fmt: skip
    results = [
        simulate(Plan(Place.OWN, warmth), arrivals, Conditions(settings, rates, read_prices(), seed=seed))
        for seed in range(NUM_PHASES)
    ]
    mean = {
        name: statistics.fmean(getattr(one, name) for one in results)
        for name in (
            "num_served",
            "num_refused",
            "num_cold_starts",
            "ttft_p50_s",
            "ttft_p95_s",
            "ttft_p99_s",
            "mean_ttft_s",
        )
    }
    return Figures(len(arrivals), **mean)


def table(rows: list[dict[str, Any]]) -> str:
    """Return the comparison as Markdown."""
    lines = [
        "| Segment | | Requests | Refused | Replica starts | TTFT p50 ms | p95 ms | p99 ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = f"{row['segment']}{' (held out)' if row['held_out'] else ''}"
        for kind in ("measured", "simulated"):
            one = row[kind]
            ttft = " | ".join(f"{1000 * one[f'ttft_{p}_s']:.0f}" for p in ("p50", "p95", "p99"))
            counts = f"{one['num_requests']} | {one['num_refused']:.0f} | {one['num_cold_starts']:.1f}"
            lines.append(f"| {name} | {kind} | {counts} | {ttft} |")
        errors = row["errors"]
        marks = " | ".join(f"{errors[f'ttft_{p}_s']:+.0%}" for p in ("p50", "p95", "p99"))
        lines.append(f"| | difference | | | {errors['num_cold_starts']:+.0%} | {marks} |")
    return "\n".join(lines)


def compare(segment: Segment, real: Replayed, simulation: Figures) -> dict[str, Any]:
    pairs = {
        name: (getattr(real.figures, name), getattr(simulation, name))
        for name in (*JUDGED, "ttft_p99_s", "mean_ttft_s")
    }
    errors = {name: found / wanted - 1 if wanted else float(found != wanted) for name, (wanted, found) in pairs.items()}
    within = all(abs(errors[name]) <= TOLERANCE for name in JUDGED)
    return {"segment": segment.name, "held_out": segment.held_out, "within_tolerance": within,
            "latest_sending_ms": round(1000 * real.late_s, 1), "measured": asdict(real.figures),
            "simulated": asdict(simulation), "errors": errors,
            "ttft_ms": [None if wait is None else round(1000 * wait, 1) for wait in real.waits_s]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--traces", type=Path, required=True)
    parser.add_argument("--segments", nargs="+", choices=SEGMENTS, default=list(SEGMENTS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rates", type=Path, help="Rates measured before, instead of now.")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rates = json.loads(args.rates.read_text()) if args.rates else Bench(args.artifact, args.threads).rates()
    typed = msgspec.convert(rates, Rates)
    rows = []
    for segment in (SEGMENTS[name] for name in args.segments):
        arrivals = read_trace(args.traces / segment.trace, segment.scaling)
        real = measured(args.artifact, segment, arrivals, args.threads)
        rows.append(compare(segment, real, simulated(segment, arrivals, typed)))
    print(table(rows))
    if args.out is not None:
        report = {"machine": describe_machine(args.threads), "rows": rows, "rates": rates}
        args.out.write_text(json.dumps(report) + "\n")
        args.out.with_suffix(".md").write_text(table(rows) + "\n")


if __name__ == "__main__":
    main()
