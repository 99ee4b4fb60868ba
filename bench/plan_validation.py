"""The planner against the host: segments of real traces, replayed over HTTP and simulated with that minute's rates.

    python bench/plan_validation.py ARTIFACT --traces DIR [--segments code-a code-b chat] [--threads N] [--repeats N]
                                    [--replays-between N] [--onto FILE] [--out FILE]

Every segment is sent to a real `pilotlight serve` on loopback, which sleeps and wakes meanwhile, each request at its
own time whatever became of the others. Right before and right after each replay the artifact's rates are measured, as
`pilotlight bench --rates` does, and the segment is simulated with both, at several phases of the host's second hand,
of which the replay had one. Nothing is fitted to the replay: what the simulation knows are the rates, the
trace and the configuration.

Machines change their speed by more than the planner is to be wrong, so that one replay says little: `--repeats` replays
the segments again and again, by turns, and `--onto` adds to an earlier run's. Each replay makes a pair with its own
simulation, and the table shows medians over the pairs. A pair is written to `--out` as soon as it is there. With a
larger model the rates take minutes: `--replays-between` has so many replays share the rates before and behind them.

A virtual machine shares its hardware, and Linux counts what others took of it. What was measured while that was more
than a hundredth of the cores' time says little: such rates are left out, and a pair is set aside, whatever its ratios,
if its replay was one of these or no rates are left. It is kept in the file and counted, and the segment is replayed
again, up to twice as many times in all as were asked for.
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
import uvloop

from http_client import Exchange, Response
from machine import describe_machine
from pilotlight.config import FunctionSettings
from pilotlight.host.bench import Bench
from pilotlight.host.rates import Rates
from pilotlight.host.stolen import NOTABLE_SHARE, StolenTime
from pilotlight.plan.outcomes import STAGES, percentile
from pilotlight.plan.plans import Place, Plan, Warmth
from pilotlight.plan.prices import read_prices
from pilotlight.plan.simulate import Conditions, simulate
from pilotlight.plan.trace import Arrival, Scaling, read_trace

CODE, CHAT = "AzureLLMInferenceTrace_code.csv", "mooncake_conversation_trace.jsonl"
CONTEXT = 512
NUM_PHASES = 6
GOLDEN = 0.618034
REPLAY_S = 75
TOLERANCE = 0.2
RATES_TRIES = 2
JUDGED = ("ttft_p50_s", "ttft_p95_s", "num_cold_starts")
COMPARED = (*JUDGED, "ttft_p99_s", "mean_ttft_s")
TTFT_BYTES = b"data: {"
REQUEST_ID = re.compile(rb"(?i)x-request-id: (\S+)")


@dataclass(frozen=True)
class Segment:
    """What is replayed, and by which function. ``held_out``: it was first replayed when the model was finished."""

    name: str
    trace: str
    scaling: Scaling
    sleep: str
    idle_timeout_s: float
    held_out: bool
    context: int = CONTEXT


def _code(from_s: float, duration_s: float, speed_up: float) -> Scaling:
    return Scaling(from_s, duration_s, None, speed_up, 1 / 24, 1 / 2, CONTEXT, 128)


DEPLOYED_CONTEXT = 1024


def _deployed_code(from_s: float, speed_up: float) -> Scaling:
    return Scaling(from_s, REPLAY_S * speed_up, None, speed_up, 1 / 24, 1 / 4, DEPLOYED_CONTEXT, 64)


def _deployed_chat(from_s: float, speed_up: float) -> Scaling:
    return Scaling(from_s, REPLAY_S * speed_up, None, speed_up, 1 / 32, 1 / 8, DEPLOYED_CONTEXT, 96)


SEGMENTS = {
    one.name: one
    for one in (
        Segment("code-a", CODE, _code(1350, 100, 1.25), "deep", 0.5, held_out=False),
        Segment("code-b", CODE, _code(1900, 100, 1.25), "light", 0.5, held_out=False),
        Segment("chat", CHAT, Scaling(600, 120, None, 1.7, 1 / 32, 1 / 8, CONTEXT, 96), "light", 0.5, held_out=False),
        Segment("135m-code", CODE, _deployed_code(1350, 0.2), "deep", 0.5, held_out=False, context=DEPLOYED_CONTEXT),
        Segment("135m-chat", CHAT, _deployed_chat(600, 0.5), "light", 0.5, held_out=False, context=DEPLOYED_CONTEXT),
        Segment("135m-code-new", CODE, _deployed_code(900, 0.3), "light", 0.5, held_out=True, context=DEPLOYED_CONTEXT),
        Segment("135m-chat-new", CHAT, _deployed_chat(1500, 0.4), "deep", 0.5, held_out=True, context=DEPLOYED_CONTEXT),
    )
}
"""Those that begin with 135m are for a model of 135 million weights. Each has the largest tenth of its trace's speed at
which, by the simulation alone, a machine slower by a tenth makes p50 and p95 longer by 15 % at most: beyond it, a
replay says more of the machine than of the model.
"""


@dataclass(frozen=True)
class Figures:
    """What was measured, or simulated. ``mean_stages_s``: where the time went, `plan.outcomes.STAGES`."""

    num_requests: int
    num_served: float
    num_refused: float
    num_cold_starts: float
    ttft_p50_s: float
    ttft_p95_s: float
    ttft_p99_s: float
    mean_ttft_s: float
    mean_stages_s: dict[str, float]


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


@dataclass(frozen=True)
class Asked:
    """A request that was sent: how late, when by the client's clock, and what came."""

    late_s: float
    sent_at: float
    exchange: Exchange


def replay(port: int, arrivals: list[Arrival], after_s: float) -> list[Asked]:
    """Send all requests, each at its time, the first after so long. What comes is read as HTTP when all is over: the
    client shares the cores with the server.
    """
    prepared = bodies(arrivals)

    async def ask(number: int, begun_at: float) -> Asked:
        due_at = begun_at + arrivals[number].at_s
        await asyncio.sleep(due_at - time.monotonic())
        sent_at = time.monotonic()
        transport, ours = await asyncio.get_running_loop().create_connection(Exchange, "127.0.0.1", port)
        try:
            transport.write(head(len(prepared[number])) + prepared[number])
            await ours.closed
        finally:
            transport.close()
        return Asked(sent_at - due_at, sent_at, ours)

    async def ask_all() -> list[Asked]:
        begun_at = time.monotonic() + after_s
        return list(await asyncio.gather(*(ask(number, begun_at) for number in range(len(arrivals)))))

    return uvloop.run(ask_all())


def head(num_bytes: int) -> bytes:
    return (
        "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: application/json\r\n"
        f"Content-Length: {num_bytes}\r\n\r\n"
    ).encode()


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
            f'idle_timeout_s = {segment.idle_timeout_s}\nsleep = "{segment.sleep}"\n'
            f'max_context_tokens = {segment.context}\nspeculation = "off"\n'
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
    """A replay: its figures, how late the client was at worst, and by request the milliseconds of each stage; and what
    part of the cores' time went to other guests of the hardware.
    """

    figures: Figures
    late_s: float
    stages_ms: list[dict[str, float] | None]
    stolen_share: float = 0.0


def measured(artifact: Path, segment: Segment, arrivals: list[Arrival], num_threads: int, number: int) -> Replayed:
    """Replay a segment for the ``number``th time: how many replicas start hangs on when the host's clock ticks, so that
    every time has another distance from it.
    """
    with server(artifact, segment, num_threads) as port:
        stolen = StolenTime()
        asked = replay(port, arrivals, 0.5 + number * GOLDEN % 1.0)
        stolen_share = stolen.share()
        starts = num_starts(port)
        stages_ms = [stages_of(port, one) for one in asked]
    served = [one for one in stages_ms if one is not None]
    ordered = sorted(one["ttft"] / 1000 for one in served)
    p50, p95, p99 = (percentile(ordered, share) for share in (0.5, 0.95, 0.99))
    means = {name: statistics.fmean(one[name] for one in served) / 1000 for name in STAGES}
    found = Figures(
        len(asked), len(served), len(asked) - len(served), starts, p50, p95, p99, statistics.fmean(ordered), means
    )
    return Replayed(found, max(one.late_s for one in asked), stages_ms, stolen_share)


def stages_of(port: int, one: Asked) -> dict[str, float] | None:
    """Return milliseconds by stage, from the client's clock and the usage record; None if it was refused."""
    response = Response(one.exchange)
    if response.status == 503:
        return None
    assert response.status == 200, (response.status, response.pieces[:1])
    assert response.is_complete
    found = REQUEST_ID.search(b"".join(data for _, data in one.exchange.received))
    assert found is not None
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/usage/{found[1].decode()}") as answer:
        record = json.load(answer)
    ttft_ms = 1000 * (first_token_at(response) - one.sent_at)
    wait_ms, prefill_ms = record["queue_ms"] + record["cold_start_ms"], record["prefill_ms"]
    return {
        "ttft": round(ttft_ms, 2), "host": round(ttft_ms - wait_ms - prefill_ms, 2), "wait": wait_ms,
        "prefill": prefill_ms, "decode": record["decode_ms"],
    }  # fmt: skip


def simulated(segment: Segment, arrivals: list[Arrival], beside: list[Rates]) -> Figures:
    """Return the mean over the rates that were measured beside the replay, and phases of the host's second hand."""
    warmth = Warmth.COLD if segment.sleep == "deep" else Warmth.LIGHT
    settings = FunctionSettings(
        "", idle_timeout_s=segment.idle_timeout_s, sleep=segment.sleep, max_context_tokens=segment.context  # type: ignore[arg-type]
    )  # fmt: skip
    results = [
        simulate(Plan(Place.OWN, warmth), arrivals, Conditions(settings, rates, read_prices(), seed=seed))
        for rates in beside
        for seed in range(NUM_PHASES)
    ]
    names = [name for name in Figures.__dataclass_fields__ if name not in ("num_requests", "mean_stages_s")]
    mean = {name: statistics.fmean(getattr(one, name) for one in results) for name in names}
    stages = {name: statistics.fmean(one.mean_stages_s[name] for one in results) for name in STAGES}
    return Figures(len(arrivals), **mean, mean_stages_s=stages)


def pair(segment: Segment, real: Replayed, simulation: Figures, beside: list[Rates]) -> dict[str, Any]:
    """Return a replay beside its simulation, and whether the machine was its own meanwhile."""
    shares = [real.stolen_share, *(one.stolen_share for one in beside)]
    is_disturbed = real.stolen_share > NOTABLE_SHARE or min(shares[1:]) > NOTABLE_SHARE
    return {
        "stolen_shares": [round(share, 4) for share in shares], "is_disturbed": is_disturbed,
        "segment": segment.name, "held_out": segment.held_out, "latest_sending_ms": round(1000 * real.late_s, 1),
        "measured": asdict(real.figures), "simulated": asdict(simulation),
        "ratios": {name: getattr(simulation, name) / getattr(real.figures, name) for name in COMPARED},
        "ttft_ms": [None if one is None else one["ttft"] for one in real.stages_ms],
    }  # fmt: skip


def undisturbed(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one for one in pairs if not one["is_disturbed"]]


def summary(pairs: list[dict[str, Any]], num_set_aside: int) -> dict[str, Any]:
    """Return the medians over a segment's pairs."""
    ratios = {name: sorted(one["ratios"][name] for one in pairs) for name in COMPARED}
    middle = {name: statistics.median(found) for name, found in ratios.items()}
    return {
        "segment": pairs[0]["segment"], "held_out": pairs[0]["held_out"], "num_pairs": len(pairs),
        "num_set_aside": num_set_aside,
        "within_tolerance": all(abs(middle[name] - 1) <= TOLERANCE for name in JUDGED),
        "num_pairs_within": sum(all(abs(one["ratios"][name] - 1) <= TOLERANCE for name in JUDGED) for one in pairs),
        "median_ratio": middle, "least_ratio": {name: found[0] for name, found in ratios.items()},
        "largest_ratio": {name: found[-1] for name, found in ratios.items()},
    }  # fmt: skip


def by_segment(pairs: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return each segment's pairs without those that are set aside."""
    found = [[one for one in undisturbed(pairs) if one["segment"] == name] for name in SEGMENTS]
    return [pairs for pairs in found if pairs]


def summaries(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = by_segment(pairs)
    num_all = [sum(one["segment"] == some[0]["segment"] for one in pairs) for some in found]
    return [summary(some, number - len(some)) for some, number in zip(found, num_all, strict=True)]


def table(pairs: list[dict[str, Any]]) -> str:
    """Return the comparison as Markdown."""
    lines = [
        "| Segment | | Requests | Refused | Replica starts | TTFT p50 ms | p95 ms | p99 ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for found, whole in zip(by_segment(pairs), summaries(pairs), strict=True):
        name = f"{whole['segment']}{' (held out)' if whole['held_out'] else ''}"
        for kind in ("measured", "simulated"):
            ttft = " | ".join(f"{1000 * _median(found, kind, f'ttft_{p}_s'):.0f}" for p in ("p50", "p95", "p99"))
            counts = f"{found[0][kind]['num_requests']} | {_median(found, kind, 'num_refused'):.0f}"
            lines.append(f"| {name} | {kind} | {counts} | {_median(found, kind, 'num_cold_starts'):.1f} | {ttft} |")
        marks = " | ".join(
            _spread(whole, name) for name in ("num_cold_starts", "ttft_p50_s", "ttft_p95_s", "ttft_p99_s")
        )
        kept = f"{whole['num_pairs']} pairs, {whole['num_set_aside']} set aside"
        lines.append(f"| | simulated / measured, {kept} | | | {marks} |")
    return "\n".join(lines)


def stages_table(pairs: list[dict[str, Any]]) -> str:
    """Return where the time went as Markdown."""
    lines = [f"| Mean ms | {' | '.join(STAGES)} |", f"|---|{'---|' * len(STAGES)}"]
    for found in by_segment(pairs):
        for kind in ("measured", "simulated"):
            means = [statistics.median(one[kind]["mean_stages_s"][name] for one in found) for name in STAGES]
            lines.append(f"| {found[0]['segment']}, {kind} | {' | '.join(f'{1000 * mean:.1f}' for mean in means)} |")
    return "\n".join(lines)


def _median(pairs: list[dict[str, Any]], kind: str, name: str) -> float:
    return float(statistics.median(one[kind][name] for one in pairs))


def _spread(whole: dict[str, Any], name: str) -> str:
    middle, least, largest = (whole[f"{which}_ratio"][name] for which in ("median", "least", "largest"))
    return f"{middle:.2f} ({least:.2f}–{largest:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--traces", type=Path, required=True)
    parser.add_argument("--segments", nargs="+", choices=SEGMENTS, default=["code-a", "code-b", "chat"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--replays-between", type=int, default=1, help="replays for each measurement of the rates")
    parser.add_argument("--onto", type=Path, help="An earlier run's --out, whose pairs are kept.")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    bench = Bench(args.artifact, args.threads)
    earlier = json.loads(args.onto.read_text()) if args.onto else {"pairs": [], "rates": []}
    pairs, before = earlier["pairs"], steady_rates(bench)
    all_rates = [*earlier["rates"], before]
    for some in rounds([SEGMENTS[name] for name in args.segments], pairs, args.repeats, args.replays_between):
        replays = []
        for segment in some:
            arrivals = read_trace(args.traces / segment.trace, segment.scaling)
            number = sum(one["segment"] == segment.name for one in pairs)
            replays.append((segment, arrivals, measured(args.artifact, segment, arrivals, args.threads, number)))
        after = steady_rates(bench)
        all_rates.append(after)
        beside = [msgspec.convert(one, Rates) for one in (before, after)]
        before = after
        for segment, arrivals, real in replays:
            usable = [one for one in beside if one.stolen_share <= NOTABLE_SHARE] or beside
            pairs.append(pair(segment, real, simulated(segment, arrivals, usable), beside))
            ratios = {name: round(ratio, 2) for name, ratio in pairs[-1]["ratios"].items()}
            print(segment.name, ratios, "stolen", pairs[-1]["stolen_shares"], flush=True)
            if args.out is not None:
                write(args.out, args.threads, pairs, all_rates)
    print(f"{table(pairs)}\n\n{stages_table(pairs)}")


def steady_rates(bench: Bench) -> dict[str, Any]:
    """Return rates that were measured while the machine was its own, or the last of a few that were not."""
    for _ in range(RATES_TRIES):
        rates = bench.rates()
        if rates["stolen_share"] <= NOTABLE_SHARE:
            break
    return rates


def rounds(
    segments: list[Segment], pairs: list[dict[str, Any]], num_wanted: int, num_together: int
) -> Iterator[list[Segment]]:
    """Return segments to replay, so many at a time, until each has as many undisturbed pairs more as are wanted."""
    num_before = len(pairs)
    for _ in range(2 * num_wanted):
        found = [one["segment"] for one in undisturbed(pairs[num_before:])]
        yield from batched([one for one in segments if found.count(one.name) < num_wanted], num_together)


def batched(segments: list[Segment], num_together: int) -> Iterator[list[Segment]]:
    """Return the segments in their order, so many at a time."""
    return (segments[first : first + num_together] for first in range(0, len(segments), num_together))


def write(out: Path, num_threads: int, pairs: list[dict[str, Any]], rates: list[dict[str, Any]]) -> None:
    """Write what has been found so far, whole or not at all: a run that is interrupted keeps its pairs."""
    report = {"machine": describe_machine(num_threads), "summary": summaries(pairs),
              "pairs": pairs, "rates": rates}  # fmt: skip
    for path, text in (
        (out, json.dumps(report) + "\n"),
        (out.with_suffix(".md"), f"{table(pairs)}\n\n{stages_table(pairs)}\n"),
    ):
        beside = path.with_name(path.name + ".new")
        beside.write_text(text)
        beside.replace(path)


if __name__ == "__main__":
    main()
