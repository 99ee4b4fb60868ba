"""A Ray cluster of two worker nodes, one of which is killed and one drained while 200 answers stream.

Every stream is compared with what one engine alone generates for its prompt, and every record in the ledger with its
stream. ``make cluster-demo`` runs it. Needs root (network namespaces), PostgreSQL, and the environment of ``make ray``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from httptools import HttpParserError

from http_client import Exchange, Response
from netns_cluster import SERVE_PORT, Cluster, Node, Unable, cluster
from pilotlight.artifact import open_artifact
from pilotlight.config import FunctionSettings, load_settings
from pilotlight.engine.backend import EngineBackend
from pilotlight.engine.policy import Policy
from pilotlight.engine.session import OnnxSession
from pilotlight.metering.keyring import KeyDesk
from pilotlight.metering.keys import Limits
from pilotlight.metering.ledger_reader import LedgerReader
from pilotlight.metering.record import UsageRecord
from pilotlight.request import SamplingParams, Sequence
from postgres_server import NoPostgres, postgres_server

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 240.0
CONTEXT = 512
NUM_SLOTS = 24
IDLE_TIMEOUT_S = 8.0
NOTICE_S = 20.0

TOKEN_IDS = re.compile(rb'"token_ids":\[([0-9,]+)\]')

POOL = ("tales", "sums")
CONFIG = """
[host]
address = "0.0.0.0"
port = {port}
ledger = "{ledger}"
cache_dir = "{folder}/cache"

[cluster]
gateway_cpus = 0
gateway_resources = {{ gateway = 1 }}
replica_cpus = 1
notices = "file:$NODE_NOTICES"
pools = {{ shared = ["tales", "sums"] }}

[functions.demo]
artifact = "{artifact}"
deterministic = true
num_slots = {slots}
num_threads = 1
max_context_tokens = {context}
max_replicas = 3
max_queued_requests = 400
idle_timeout_s = {idle}

[functions.demo.prices]
prompt_per_million_tokens = "1"
completion_per_million_tokens = "2"
"""
POOLED = """
[functions.NAME]
artifact = "{artifact}"
deterministic = true
num_slots = {slots}
num_threads = 1
max_context_tokens = {context}
max_queued_requests = 400
idle_timeout_s = {idle}
"""
"""A function that shares replicas with others."""


@dataclass
class Stream:
    """One request, what it should give, and what its client got."""

    request_id: str
    function: str
    prompt_ids: tuple[int, ...]
    max_tokens: int
    seed: int
    expected: list[int] = field(default_factory=list)
    received: list[int] = field(default_factory=list)
    num_arrived: int = 0
    is_over: bool = False
    usage: dict[str, Any] | None = None
    problem: str = ""
    longest_pause_s: float = 0.0
    resumed_at: float = 0.0
    """When the longest pause was over."""


def streams_of(number: int, vocab_size: int, max_tokens: int, seed: int) -> list[Stream]:
    """Return requests, a fifth of which begin with one of four long beginnings."""
    rng = random.Random(seed)
    beginnings = [tuple(rng.randrange(3, vocab_size) for _ in range(128)) for _ in range(4)]
    found = []
    for index in range(number):
        prompt = tuple(rng.randrange(3, vocab_size) for _ in range(rng.randint(5, 40)))
        if index % 5 == 0:
            prompt = beginnings[index // 5 % 4] + prompt
        function = ("demo", "demo", "demo", "tales", "sums")[index % 5]
        length = rng.randint(max_tokens // 2, max_tokens)
        found.append(Stream(f"stream-{index}", function, prompt, length, rng.randrange(2**31)))
    return found


async def compute_expected(artifact_path: Path, streams: list[Stream]) -> None:
    """Let one engine, here and alone, say what each answer is."""
    artifact = open_artifact(artifact_path)
    policy = Policy.from_settings(FunctionSettings(str(artifact_path), deterministic=True))
    session = OnnxSession(artifact, policy.num_slots(NUM_SLOTS), CONTEXT, 1, None)
    backend = EngineBackend(session, 10_000, policy)
    backend.start()

    async def answer(stream: Stream) -> None:
        sampling = SamplingParams(temperature=0.8, seed=stream.seed)
        sequence = Sequence(stream.request_id, stream.prompt_ids, stream.max_tokens, sampling=sampling)
        stream.expected = [event.token_id async for event in backend.submit(sequence) if event.token_id is not None]

    await asyncio.gather(*(answer(stream) for stream in streams))
    await backend.close()


class Counted(Exchange):
    """An exchange whose tokens are counted as they come, so that the run knows how far it is."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self._stream = stream

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._stream.num_arrived += sum(ids.count(b",") + 1 for ids in TOKEN_IDS.findall(data))


async def ask(address: str, token: str, stream: Stream) -> None:
    """Send one request, and read its stream once it is over: who reads meanwhile is late on a busy machine."""
    body = {
        "model": stream.function, "prompt": list(stream.prompt_ids), "max_tokens": stream.max_tokens,
        "seed": stream.seed, "temperature": 0.8, "top_p": 1, "top_k": 0, "ignore_eos": True, "stream": True,
        "return_token_ids": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    encoded = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {token}\r\nX-Request-Id: {stream.request_id}\r\nContent-Length: {len(encoded)}\r\n\r\n"
    )
    try:
        loop = asyncio.get_running_loop()
        transport, ours = await loop.create_connection(lambda: Counted(stream), address, SERVE_PORT)
        transport.write(head.encode() + encoded)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await ours.closed
        finally:
            transport.close()
        read(stream, Response(ours))
    except (OSError, HttpParserError) as error:
        stream.problem = f"{type(error).__name__}: {error}"
    finally:
        stream.is_over = True


def read(stream: Stream, response: Response) -> None:
    """Take what a response brought: tokens, usage, problems, and the longest pause between two tokens."""
    if response.status != 200:
        stream.problem = f"{response.status}: {b''.join(piece for _, piece in response.pieces)[:300]!r}"
        return
    last_at: float | None = None
    rest = b""
    for at, piece in response.pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for event in (json.loads(line[6:]) for line in lines if line.startswith(b"data: {")):
            if "error" in event:
                stream.problem = str(event["error"])
            for ids in (choice["token_ids"] for choice in event.get("choices", ()) if choice.get("token_ids")):
                pause_s = at - (at if last_at is None else last_at)
                if pause_s >= stream.longest_pause_s:
                    stream.longest_pause_s, stream.resumed_at = pause_s, at
                last_at = at
                stream.received += ids
            stream.usage = event.get("usage") or stream.usage
    if not response.is_complete:
        stream.problem = stream.problem or "the connection ended early"


async def reach(streams: list[Stream], share: float) -> None:
    """Wait until so much of all answers has arrived."""
    total = sum(len(stream.expected) for stream in streams)
    while sum(stream.num_arrived for stream in streams) < share * total:
        if all(stream.is_over for stream in streams):
            return
        await asyncio.sleep(0.02)


async def replicas(found: Cluster) -> dict[str, int]:
    """Return how many replicas of each deployment run or start."""
    script = (
        "import json, ray, sys\nfrom ray import serve\n"
        "ray.init(address=sys.argv[1], log_to_driver=False, configure_logging=False)\n"
        "app = serve.status().applications['pilotlight']\n"
        "print(json.dumps({name: sum(one.replica_states.values()) for name, one in app.deployments.items()}))"
    )
    out = await asyncio.to_thread(found.run, found.python, "-c", script, found.address)
    states: dict[str, int] = json.loads(out.strip().splitlines()[-1])
    return states


class Run:
    """The whole run, and what is to be said of it."""

    def __init__(
        self, found: Cluster, address: str, token: str, streams: list[Stream], worker_arguments: list[str]
    ) -> None:
        self.cluster = found
        self.streams = streams
        self.report: dict[str, Any] = {}
        self._worker_arguments = worker_arguments
        self._began_at = 0.0
        self._address = address
        self._token = token

    async def start_worker(self, name: str) -> Node:
        node = self.cluster.add(name)
        await asyncio.to_thread(node.start, f"--address={self.cluster.address}", *self._worker_arguments)
        return node

    async def run(self, workers: list[Node]) -> None:
        """Stream, kill one node, bring another, drain one, and wait for sleep."""
        doomed, noticed = workers
        began_at = self._began_at = time.monotonic()
        asking = [asyncio.create_task(ask(self._address, self._token, stream)) for stream in self.streams]
        await reach(self.streams, 0.0001)
        self.report["first_token_s"] = round(time.monotonic() - began_at, 2)
        await reach(self.streams, 0.3)
        self.report["killed"] = self._state(doomed)
        self.report["killed"]["num_processes"] = doomed.kill()
        self._say(f"killed {self.report['killed']['num_processes']} processes of node {doomed.name}")
        await self.start_worker("d")
        self._say("node d has joined")
        await reach(self.streams, 0.55)
        self.report["drained"] = self._state(noticed)
        noticed.notice.write_text(json.dumps({"kind": "interruption", "seconds_left": NOTICE_S}))
        noticed_at = time.monotonic()
        self._say(f"node {noticed.name} was given a notice of {NOTICE_S:.0f} s")
        taken = asyncio.create_task(self._take_away(noticed, noticed_at))
        await asyncio.wait_for(asyncio.gather(*asking), TIMEOUT_S)
        self.report["streams_s"] = round(time.monotonic() - began_at, 2)
        self.report["pauses"] = self._pauses()
        self._say("all streams ended")
        await taken
        await self._sleep_and_wake()

    async def _take_away(self, node: Node, noticed_at: float) -> None:
        await asyncio.sleep(max(0.0, noticed_at + NOTICE_S - time.monotonic()))
        node.kill()
        self._say(f"node {node.name} was taken away")

    async def _sleep_and_wake(self) -> None:
        slept_at = time.monotonic()
        while any(number for name, number in (await replicas(self.cluster)).items() if name != "gateway"):
            if time.monotonic() - slept_at > TIMEOUT_S:
                raise RuntimeError(f"no sleep: {await replicas(self.cluster)}")
            await asyncio.sleep(0.5)
        self.report["asleep_after_s"] = round(time.monotonic() - slept_at, 2)
        self._say("no replica is left")
        last = self.streams[0]
        again = Stream("woken", last.function, last.prompt_ids, last.max_tokens, last.seed, last.expected)
        asked_at = time.monotonic()
        await ask(self._address, self._token, again)
        self.report["woken_s"] = round(time.monotonic() - asked_at, 2)
        self.streams.append(again)

    def _state(self, node: Node) -> dict[str, Any]:
        open_streams = sum(not stream.is_over for stream in self.streams)
        return {"node": node.name, "num_open_streams": open_streams, "num_processes": len(node.pids()),
                "added_niceness": node.added_niceness()}  # fmt: skip

    def _pauses(self) -> list[str]:
        """Return the longest pause, and every sixth after it, each with when it began and ended."""
        longest = sorted(self.streams, key=lambda stream: -stream.longest_pause_s)[:30:6]
        return [
            f"{one.request_id} ({one.function}): {one.longest_pause_s:.1f} s, "
            f"{one.resumed_at - one.longest_pause_s - self._began_at:.1f} to {one.resumed_at - self._began_at:.1f} s"
            for one in longest
        ]

    def _say(self, text: str) -> None:
        print(f"  {time.monotonic() - self._began_at:5.1f} s: {text}", flush=True)


def judge(streams: list[Stream], records: list[UsageRecord]) -> dict[str, Any]:
    """Compare what clients got with what they should have got, and with the ledger."""
    by_id = {record.request_id: record for record in records}
    lost = doubled = 0
    wrong_records = []
    for stream in streams:
        common = sum(1 for a, b in zip(stream.received, stream.expected, strict=False) if a == b)
        lost += max(0, len(stream.expected) - common)
        doubled += max(0, len(stream.received) - common)
        told = (stream.usage or {}).get("completion_tokens")
        if not _is_right(by_id.get(stream.request_id), stream, told):
            wrong_records.append(stream.request_id)
    return {
        "num_streams": len(streams),
        "num_tokens": sum(len(stream.received) for stream in streams),
        "num_lost_tokens": lost,
        "num_doubled_tokens": doubled,
        "num_problems": sum(bool(stream.problem) for stream in streams),
        "num_records": len(records),
        "num_wrong_records": len(wrong_records),
        "num_moved_streams": sum(record.migrations > 0 for record in records),
        "num_recomputed_tokens": sum(record.recomputed_tokens for record in records),
        "longest_pause_s": round(max(stream.longest_pause_s for stream in streams), 2),
        "problems": [f"{stream.request_id}: {stream.problem}" for stream in streams if stream.problem][:5],
        "wrong_records": wrong_records[:5],
    }


def _is_right(record: UsageRecord | None, stream: Stream, told: int | None) -> bool:
    """Say whether ledger, client and reference agree."""
    if record is None or record.finish_reason != "length" or record.prompt_tokens != len(stream.prompt_ids):
        return False
    return record.completion_tokens == len(stream.received) == told == len(stream.expected)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="Write the report there, too.")
    options = parser.parse_args()
    try:
        report = _run(options)
    except (Unable, NoPostgres) as error:
        print(f"cannot run here: {error}", file=sys.stderr)
        return 3
    print(json.dumps(report, indent=2))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    verdict = report["num_lost_tokens"] + report["num_doubled_tokens"] + report["num_wrong_records"]
    return int(bool(verdict) or report["num_records"] != report["num_streams"])


def _run(options: argparse.Namespace) -> dict[str, Any]:
    vocab_size = open_artifact(options.artifact).manifest.shapes.vocab_size
    streams = streams_of(options.streams, vocab_size, options.max_tokens, options.seed)
    asyncio.run(compute_expected(options.artifact, streams))
    print(f"{len(streams)} answers of {sum(len(s.expected) for s in streams):,} tokens are known", flush=True)
    with postgres_server() as server, cluster(sys.executable) as found:
        ledger = server.fresh_url()
        with KeyDesk(ledger) as desk:
            _, token = desk.create("demo", "demo", None, Limits(tokens_per_day=10**9))
        config = found.folder / "pilotlight.toml"
        template = CONFIG + "".join(POOLED.replace("NAME", name) for name in POOL)
        config.write_text(
            template.format(port=SERVE_PORT, ledger=ledger, folder=found.folder, artifact=options.artifact.resolve(),
                            slots=NUM_SLOTS, context=CONTEXT, idle=IDLE_TIMEOUT_S)
        )  # fmt: skip
        load_settings(config)
        head = found.add("head")
        head.start("--head", "--port=6379", "--num-cpus=0", '--resources={"gateway": 2}', "--include-dashboard=false",
                   f"--temp-dir={found.folder}/ray")  # fmt: skip
        worker_arguments = ["--num-cpus=2"]
        run = Run(found, head.address, token, streams, worker_arguments)
        workers = [found.add(name) for name in "bc"]
        for worker in workers:
            worker.start(f"--address={found.address}", *worker_arguments)
        print(f"nodes: head {head.address}, {', '.join(f'{node.name} {node.address}' for node in workers)}", flush=True)
        deploy = ROOT / "functions" / "ray_app" / "ray_deploy.py"
        print(found.run(found.python, str(deploy), str(config), "--address", found.address, "--proxies", "HeadOnly"))
        asyncio.run(run.run(workers))
        with LedgerReader(ledger) as reader:
            records = list(reader.records())
        return {**run.report, **judge(run.streams, records)}


if __name__ == "__main__":
    sys.exit(main())
