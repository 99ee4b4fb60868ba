"""What metering costs: the throughput with many streams at all times with the ledger, and without any.

    python bench/metering.py ARTIFACT [--streams 100] [--tokens 200] [--rounds 20] [--server]

With ``--server``, the streams go over HTTP to two servers which both stay, and else to an engine in this process. The
rounds take turns, so that what else the machine does falls on all of them alike; every other round goes backwards. The
smaller the model, the more tokens there are to meter in a second, and the more metering weighs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, TypeVar

import uvloop

from http_client import Response, exchange, token_times
from pilotlight.artifact import open_artifact
from pilotlight.engine.backend import EngineBackend
from pilotlight.engine.policy import Policy
from pilotlight.engine.session import OnnxSession
from pilotlight.function import Function, Request, UsageLedger
from pilotlight.metering.idempotency import Claim
from pilotlight.metering.keyring import KeyDesk
from pilotlight.metering.keys import Limits
from pilotlight.metering.ledger import Ledger
from pilotlight.metering.limits import Admitted
from pilotlight.metering.marks import Mark
from pilotlight.metering.prices import PriceTable
from pilotlight.metering.record import Admission, UsageRecord, final_record, utc_text
from pilotlight.metering.usage import Timings, Usage
from pilotlight.request import FinishReason
from serving_cost import PILOTLIGHT, Server, body_of, num_tokens_of, process_cpu_s, serve

T = TypeVar("T")
SETTLE_S = 0.8
WINDOW_S = 3.0
PROMPT_IDS = tuple(range(10, 42))
PRICES = PriceTable.from_config({"prompt_per_million_tokens": "0.1", "completion_per_million_tokens": "0.4"})


class Cost(NamedTuple):
    """One round of a server: microseconds of the host's processor time a token, and the speed."""

    host_us: float
    tokens_per_s: float


class NoLedger:
    """Meters nothing."""

    checkpoint_tokens = 1_000_000

    async def admit(self, admission: Admission, claim: Claim | None = None) -> Admitted:
        return Admitted()

    def note(self, marks: Mapping[str, Mark]) -> None:
        pass

    async def checkpoint(self, request_id: str, usage: Usage) -> None:
        pass

    async def finish(self, record: UsageRecord) -> None:
        pass

    def get(self, request_id: str) -> UsageRecord | None:
        return None

    def receipt(self, request_id: str) -> str | None:
        return None


async def stream(function: Function, request_id: str, num_tokens: int, key_id: str | None) -> list[float]:
    """Return when each token of one answer came, up to the cancellation of this task."""
    request = Request(
        id=request_id, token_ids=PROMPT_IDS, max_new_tokens=num_tokens, ignore_eos=True, key_id=key_id, tenant=key_id
    )
    times: list[float] = []
    invocation = await function.invoke(request)
    async for delta in invocation:
        times += [time.monotonic()] * len(delta.token_ids)
    return times


def admission(request_id: str, num_tokens: int) -> Admission:
    return Admission(
        request_id=request_id,
        function="bench",
        artifact_digest="sha256:0",
        precision="int4",
        provider="cpu",
        replica_id="bench",
        started_at_utc=utc_text(datetime.now(UTC)),
        prices=PRICES,
        reserved_tokens=len(PROMPT_IDS) + num_tokens,
        reserved_micros=1000,
    )


async def cpu_s_per_token(ledger: Ledger, label: str, num_streams: int, num_tokens: int) -> float:
    """Return the processor time of all that metering does for so many streams, by itself and on all threads."""
    admissions = [admission(f"{label}-{number}", num_tokens) for number in range(num_streams)]
    usage = Usage(len(PROMPT_IDS), 0, num_tokens, num_tokens, 0, 1000)
    began_at = time.process_time()
    await asyncio.gather(*(ledger.admit(each) for each in admissions))
    for token in range(num_tokens):
        ledger.note({each.request_id: Mark(len(PROMPT_IDS), 0, token, token) for each in admissions})
        if token % ledger.checkpoint_tokens == 0:
            await asyncio.gather(*(ledger.checkpoint(each.request_id, usage) for each in admissions))
    records = (final_record(each, usage, Timings(), FinishReason.LENGTH) for each in admissions)
    await asyncio.gather(*(ledger.finish(record) for record in records))
    return (time.process_time() - began_at) / (num_streams * num_tokens)


async def throughput(ask: Callable[[str, int], Awaitable[T]], num_streams: int, num_tokens: int) -> list[T]:
    """Have so many clients ask one request after the other for a round, and return all answers.

    Their first requests are of different lengths, so that they don't end and begin together ever after.
    """
    until = time.monotonic() + SETTLE_S + WINDOW_S

    async def client(number: int) -> list[T]:
        answers = [await ask(f"{number}-0", max(1, num_tokens * number // num_streams))]
        while time.monotonic() < until:
            answers.append(await ask(f"{number}-{len(answers)}", num_tokens))
        return answers

    return [answer for answers in await asyncio.gather(*map(client, range(num_streams))) for answer in answers]


def tokens_per_s(began_at: float, token_times: Iterable[Sequence[float]]) -> float:
    """Return the throughput of a round once all clients were under way, and before the first one stopped."""
    start = began_at + SETTLE_S
    return sum(start <= at < start + WINDOW_S for times in token_times for at in times) / WINDOW_S


async def measure(
    path: Path, num_streams: int, num_tokens: int, num_rounds: int
) -> tuple[dict[str, list[float]], list[float]]:
    """Return the throughput of every round without metering, with it, and with a key that has limits.

    Beside that, the seconds of processor time a token that metering takes by itself.
    """
    artifact = open_artifact(path)
    context = min(artifact.manifest.shapes.max_context_tokens, len(PROMPT_IDS) + num_tokens)
    session = OnnxSession(artifact, num_streams, context, os.cpu_count() or 1)
    backend = EngineBackend(session, num_streams, Policy())
    found: dict[str, list[float]] = {"unmetered": [], "metered": [], "metered, with a key": []}
    with tempfile.TemporaryDirectory() as folder:
        ledger_path = Path(folder) / "usage.db"
        with KeyDesk(ledger_path) as desk:
            limits = Limits(tokens_per_minute=10**12, tokens_per_month=10**15, requests_per_minute=10**9)
            key, _ = desk.create("bench", "bench", None, limits)
        with Ledger(ledger_path) as ledger:
            ledgers: dict[str, UsageLedger] = dict.fromkeys(found, ledger) | {"unmetered": NoLedger()}
            functions = {
                name: Function("bench", artifact, backend, of, PRICES, max_context_tokens=context)
                for name, of in ledgers.items()
            }
            backend.start()
            for number in range(num_rounds + 1):
                for name, function in in_turns(functions, number):
                    key_id = key.key_id if name == "metered, with a key" else None
                    began_at = time.monotonic()
                    label = f"{name}-{number}"

                    async def ask(
                        of: str,
                        count: int,
                        function: Function = function,
                        key_id: str | None = key_id,
                        label: str = label,
                    ) -> list[float]:
                        return await stream(function, f"{label}-{of}", count, key_id)

                    answers = await throughput(ask, num_streams, num_tokens)
                    if number > 0:  # the first round warms up
                        found[name].append(tokens_per_s(began_at, answers))
            await backend.close()
            alone = [
                await cpu_s_per_token(ledger, f"alone-{number}", num_streams, num_tokens)
                for number in range(num_rounds)
            ]
    return found, alone


def in_turns(found: Mapping[str, T], number: int) -> list[tuple[str, T]]:
    """Return what a round asks, in its order."""
    return [*found.items()][:: 1 if number % 2 else -1]


def measure_servers(path: Path, num_streams: int, num_tokens: int, num_rounds: int) -> dict[str, list[Cost]]:
    """Return what every round cost over HTTP, by a server without metering and one with it."""
    unmetered = (str(Path(__file__).with_name("unmetered_server.py")),)
    found: dict[str, list[Cost]] = {"unmetered": [], "metered": []}
    with serve(path, num_streams, unmetered) as without, serve(path, num_streams, PILOTLIGHT) as metered:
        servers = {"unmetered": without, "metered": metered}
        for number in range(num_rounds + 1):
            for name, server in in_turns(servers, number):
                cost = _over_http(server, num_streams, num_tokens)
                if number > 0:
                    found[name].append(cost)
    return found


def _over_http(server: Server, num_streams: int, num_tokens: int) -> Cost:
    """Have one round asked. What came is read when it is over: reading costs time on the same cores."""

    async def ask(_: str, count: int) -> Response:
        return await exchange(server.port, "/v1/completions", json.dumps(body_of(count)).encode())

    before, began_at = process_cpu_s(server.pid), time.monotonic()
    responses = uvloop.run(throughput(ask, num_streams, num_tokens))
    after = process_cpu_s(server.pid)
    times = [token_times(response.pieces, num_tokens_of) for response in responses]
    return Cost((after - before) / sum(map(len, times)) * 1e6, tokens_per_s(began_at, times))


def report(found: Mapping[str, list[float]]) -> None:
    for name, speeds in found.items():
        pairs = zip(found["unmetered"], speeds, strict=True)
        costs = sorted(1 - metered / unmetered for unmetered, metered in pairs)
        spread = f"{min(speeds):,.0f} to {max(speeds):,.0f}"
        print(
            f"{name:<20} {statistics.median(speeds):>10,.0f} tokens/s ({spread}), "
            f"costs {statistics.median(costs):6.2%} ({costs[0]:.1%} to {costs[-1]:.1%})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--streams", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--server", action="store_true", help="measure two servers over HTTP")
    options = parser.parse_args()
    if options.server:
        costs = measure_servers(options.artifact, options.streams, options.tokens, options.rounds)
        report({name: [cost.tokens_per_s for cost in of] for name, of in costs.items()})
        for name, of in costs.items():
            print(
                f"{name}: {statistics.median(cost.host_us for cost in of):.1f} µs of the host's processor time a token"
            )
        return
    found, alone = asyncio.run(measure(options.artifact, options.streams, options.tokens, options.rounds))
    report(found)
    share = statistics.median(alone) * statistics.median(found["unmetered"])
    print(f"by itself, metering takes {statistics.median(alone) * 1e6:.1f} µs of processor time a token:")
    print(f"{share:.2%} of one core at the unmetered throughput, {share / (os.cpu_count() or 1):.2%} of this machine")


if __name__ == "__main__":
    main()
