"""``make bench``: this project and the peers that are installed, side by side, alternating in one run.

    python bench/run.py [--model smollm2-135m] [--rows prefill decode-128] [--peers llama-server] [--rounds 5]

Peers of a row stay open together. In each round each of them is asked once, another one first every time, and only the
ratio within a round counts, since absolute figures drift. A peer that fails loses its own figures and no others.
bench/README.md says how peers are installed and what the figures mean.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import cold_start
from machine import describe_machine, sha256
from measure import prompt_ids
from memory import read_gb_per_s
from models import SHAPES, Shape, write_model
from peer import Opened, Peer, PeerFailed, Setting
from plot import plot
from report import mean_context, table
from results import PeerRecord, Result, Values, read
from rows import WORKLOADS, Measured, Workload, step_bytes
from servers import OUR_ENGINE, OURS, LlamaServer, Pilotlight
from workers import OurEngine, Worker

Models = Mapping[Peer, Path]
WARM_TOKENS = 8
WARM_SEED = 10_000
COLD_START = "cold-start"
COLD_START_ROUNDS = 10
ROWS = [*WORKLOADS, COLD_START]


def all_peers(recipe: str, llama_server: str | None, environments: Path) -> list[Peer]:
    """Return ourselves, served and as an engine alone, and every peer, installed or not."""

    def python(name: str) -> Path | None:
        path = environments / name / "bin" / "python"
        return path.absolute() if path.exists() else None

    genai, openvino = python("onnxruntime-genai"), python("openvino-genai")
    torch = python("transformers") or Path(sys.executable)  # the export extra holds it as well
    sizes = (32, 128)
    served = Pilotlight(recipe)
    return [
        served,
        OurEngine(served),
        LlamaServer(llama_server),
        *(
            Worker(f"onnxruntime-genai-{n}", "genai_worker.py", genai, f"genai-{n}", ("--block-size", str(n)))
            for n in sizes
        ),
        Worker("openvino-genai", "openvino_worker.py", openvino, "openvino"),
        *(
            Worker(
                f"transformers-{name}", "transformers_worker.py", torch, options=(("dtype", dtype),), is_four_bit=False
            )
            for name, dtype in (("bf16", "bfloat16"), ("fp32", "float32"))
        ),
    ]


def measure_shape(
    shape: Shape,
    models: Models,
    workloads: Sequence[Workload],
    rounds: int,
    num_threads: int,
    result: Result,
    path: Path,
) -> None:
    """Measure workloads; those on one number of slots share their processes. Write after each."""
    for num_slots in sorted({workload.num_streams for workload in workloads}):
        group = [workload for workload in workloads if workload.num_streams == num_slots]
        setting = Setting(num_threads, num_slots, group[0].max_context_tokens)
        with ExitStack() as stack:
            opened = _open_all(models, setting, stack, result)
            for workload in group:
                measure_workload(shape, workload, opened, rounds, num_threads, result)
                result.write(path)
                print(f"{shape.name}: {workload.name} measured", flush=True)


def _open_all(models: Models, setting: Setting, stack: ExitStack, result: Result) -> dict[str, Opened]:
    opened = {}
    for peer, model in models.items():
        try:
            opened[peer.name] = stack.enter_context(peer.open(model, setting))
        except PeerFailed as error:
            _note_failure(result, f"{setting.num_slots} slots", peer.name, error)
        else:
            result.peers[peer.name] = PeerRecord(
                "measured", peer.is_four_bit, peer.is_server, opened[peer.name].versions
            )
    return opened


def measure_workload(
    shape: Shape, workload: Workload, opened: dict[str, Opened], rounds: int, num_threads: int, result: Result
) -> None:
    """Ask every peer once a round, after one short warm-up each."""
    figures: dict[str, dict[str, Values]] = {
        figure.title: {name: [None] * rounds for name in opened} for figure in workload.figures
    }
    result.rows[workload.name] = figures
    result.errors.pop(workload.name, None)
    result.bandwidth_gb_per_s.pop(workload.name, None)
    for name in list(opened):
        _try(shape, workload, opened, name, WARM_SEED, min(WARM_TOKENS, workload.num_tokens), result)
    for number in range(rounds):
        if workload.name.startswith("decode"):
            num_bytes = step_bytes(shape, mean_context(workload))
            result.bandwidth_gb_per_s.setdefault(workload.name, []).append(read_gb_per_s(num_bytes, num_threads))
        for name in _rotated(list(opened), number):
            measured = _try(shape, workload, opened, name, number, workload.num_tokens, result)
            if measured:
                for figure in workload.figures:
                    figures[figure.title][name][number] = figure.value(measured)


def _rotated(names: list[str], number: int) -> list[str]:
    first = number % len(names) if names else 0
    return names[first:] + names[:first]


def _try(
    shape: Shape, workload: Workload, opened: dict[str, Opened], name: str, seed: int, num_tokens: int, result: Result
) -> Measured | None:
    """Run a workload once; a peer that fails is not asked again while these processes run."""
    prompts = [
        prompt_ids(workload.num_prompt_tokens, shape.vocab_size, seed * 1000 + number)
        for number in range(workload.num_streams)
    ]
    try:
        return Measured(opened[name].generate(prompts, num_tokens), opened[name].peak_memory())
    except PeerFailed as error:
        del opened[name]
        _note_failure(result, workload.name, name, error)
        return None


def _note_failure(result: Result, where: str, name: str, error: PeerFailed) -> None:
    result.errors.setdefault(where, {})[name] = str(error)
    print(f"{result.shape}: {where}: {name} failed: {error}", file=sys.stderr, flush=True)


def _prepare_all(shape: Shape, peers: Sequence[Peer], directory: Path, result: Result) -> dict[Peer, Path]:
    source = write_model(shape, directory / shape.name)
    models = {}
    for peer in peers:
        missing = peer.missing()
        if missing:
            result.peers[peer.name] = PeerRecord(f"not installed: {missing}", peer.is_four_bit, peer.is_server)
            continue
        try:
            models[peer] = peer.prepare(shape, source, directory)
        except PeerFailed as error:
            result.peers[peer.name] = PeerRecord(f"failed: {error}", peer.is_four_bit, peer.is_server)
            print(f"{shape.name}: {peer.name}: {error}", file=sys.stderr, flush=True)
    return models


def run_shape(shape: Shape, peers: Sequence[Peer], args: argparse.Namespace) -> None:
    """Measure a shape and write its JSON, table and picture."""
    path = args.out / f"bench-{args.recipe}-{shape.name}.json"
    weights = write_model(shape, args.models / shape.name) / "model.safetensors"
    result = Result(shape.name, args.recipe, sha256(weights), describe_machine(args.threads))
    if args.resume and path.exists():
        result = resumed(read(path), result)
    workloads = [WORKLOADS[name] for name in args.rows if name in WORKLOADS and name not in result.rows]
    if workloads or COLD_START in args.rows:
        models = _prepare_all(shape, peers, args.models, result)
        if not args.prepare_only:
            measure_shape(shape, models, workloads, args.rounds, args.threads, result, path)
        if COLD_START in args.rows and not args.prepare_only:
            measure_cold_start(shape, models, args)
    if result.rows:
        path.with_suffix(".md").write_text(table(result))
        plot(result, path.with_suffix(".svg"))
        print(table(result), flush=True)


def measure_cold_start(shape: Shape, models: Models, args: argparse.Namespace) -> None:
    """Measure the first token after a sleep beside llama-server's start, where both are there."""
    found = {peer.name: model for peer, model in models.items()}
    if not {OURS, LlamaServer.name} <= found.keys():
        print(f"{shape.name}: no cold start without {LlamaServer.name}", file=sys.stderr, flush=True)
        return
    artifact = found[OURS]
    taken = cold_start.measure(artifact, found[LlamaServer.name], args.llama_server, args.threads, COLD_START_ROUNDS)
    cold_start.report(taken, artifact, args.threads, args.out / f"cold-start-{shape.name}.json")


def resumed(old: Result, new: Result) -> Result:
    """Return the old result to go on with.

    Raises:
        SystemExit: it is of another model or other code, and can't be continued.
    """
    if (old.model_sha256, old.machine) != (new.model_sha256, new.machine):
        raise SystemExit("the result to resume is of another model, machine or commit; run without --resume")
    return old


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*SHAPES, "all"], default="all", help="whose shape")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument(
        "--peers", nargs="*", metavar="NAME", help="beside Pilotlight; all that are installed by default"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--recipe", default="hybrid", help="of Pilotlight's artifact")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the result has already")
    parser.add_argument("--prepare-only", action="store_true", help="make every peer's model and measure nothing")
    parser.add_argument("--llama-server", default=shutil.which("llama-server"), help="the program, where it is built")
    parser.add_argument("--environments", type=Path, default=Path("artifacts/bench/environments"), help="of the peers")
    parser.add_argument("--models", type=Path, default=Path("artifacts/bench"))
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that peers are stopped when we are
    peers = all_peers(args.recipe, args.llama_server, args.environments)
    if args.peers is not None:
        unknown = set(args.peers) - {peer.name for peer in peers}
        if unknown:
            parser.error(f"no such peer: {', '.join(sorted(unknown))}; there are {', '.join(p.name for p in peers)}")
        peers = [peer for peer in peers if peer.name in {OURS, OUR_ENGINE, *args.peers}]
    for shape in SHAPES.values() if args.model == "all" else [SHAPES[args.model]]:
        run_shape(shape, peers, args)


if __name__ == "__main__":
    main()
