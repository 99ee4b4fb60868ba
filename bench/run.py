"""``make bench``: this project and the peers that are installed, side by side, alternating in one run.

    python bench/run.py [--shape smollm2-135m] [--rounds 5] [--llama-server PATH] [--out bench/results]

Every row is measured round by round, each server once a round and in turn first, and reported as the median of the
servers' figures and of the round-wise ratios, with their spread. Absolute figures drift on a shared machine; the paired
ratio is what counts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gguf_model import write_gguf
from measure import decode_tokens_per_s, many_streams, one_stream, steady_tokens_per_s, total_tokens_per_s
from models import SHAPES, Shape, write_model
from servers import LlamaServer, Pilotlight, Running, Server, running

Figures = dict[str, float]
Measure = Callable[[Running, Server, Shape, int], Figures]


@dataclass(frozen=True)
class Row:
    """Some figures that come from one kind of request."""

    num_slots: int
    measure: Measure


def _prefill(at: Running, server: Server, shape: Shape, seed: int) -> Figures:
    answer = one_stream(at, server, shape.vocab_size, 512, 2, seed)
    return {"prefill 512, tok/s": 512 / answer.ttft_s}


def _decode(length: int) -> Measure:
    def measure(at: Running, server: Server, shape: Shape, seed: int) -> Figures:
        answer = one_stream(at, server, shape.vocab_size, length, 64, seed)
        return {f"decode, 1 stream, context {length}, tok/s": decode_tokens_per_s(answer)}

    return measure


def _streams(num_streams: int) -> Measure:
    def measure(at: Running, server: Server, shape: Shape, seed: int) -> Figures:
        answers = many_streams(at, server, shape.vocab_size, num_streams, 128, 64, seed)
        private, mapped = at.memory_mib()
        return {
            f"{num_streams} streams, steady decode, tok/s": steady_tokens_per_s(answers),
            f"{num_streams} streams, prefill included, tok/s": total_tokens_per_s(answers),
            f"{num_streams} streams, private memory, MiB": private,
            f"{num_streams} streams, mapped memory, MiB": mapped,
        }

    return measure


ROWS = (
    Row(1, _prefill),
    Row(1, _decode(128)),
    Row(1, _decode(1024)),
    Row(8, _streams(8)),
    Row(32, _streams(32)),
)


def measure_shape(shape: Shape, servers: dict[Server, Path], rounds: int, num_threads: int) -> list[dict[str, object]]:
    """Measure all rows; each round starts with another server."""
    results = []
    for row in ROWS:
        figures: dict[str, dict[str, list[float]]] = {}
        for number in range(rounds):
            order = [*servers.items()]
            for server, model in order if number % 2 == 0 else order[::-1]:
                with running(server, model, row.num_slots, num_threads) as at:
                    row.measure(at, server, shape, 10_000 + number)  # warm
                    for name, value in row.measure(at, server, shape, number).items():
                        figures.setdefault(name, {}).setdefault(server.name, []).append(value)
        for name, by_server in figures.items():
            results.append(_result(shape.name, name, by_server))
            print(_line(results[-1]), flush=True)
    return results


def _result(shape: str, name: str, by_server: dict[str, list[float]]) -> dict[str, object]:
    ours = by_server[Pilotlight.name]
    ratios = {
        peer: [a / b for a, b in zip(ours, values, strict=True)]
        for peer, values in by_server.items()
        if peer != Pilotlight.name
    }
    return {"shape": shape, "row": name, "figures": by_server, "ratios": ratios}


def _line(result: dict[str, object]) -> str:
    figures, ratios = result["figures"], result["ratios"]
    assert isinstance(figures, dict)
    assert isinstance(ratios, dict)
    cells = [f"{server} {statistics.median(values):.1f}" for server, values in figures.items()]
    cells += [
        f"ratio to {peer} {statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"
        for peer, values in ratios.items()
    ]
    return f"{result['shape']:<13} {result['row']:<46} {'  '.join(cells)}"


def _artifact(shape: Shape, precision: str, directory: Path) -> Path:
    source = write_model(shape, directory / shape.name)
    target = directory / f"{shape.name}-{precision}"
    if not target.exists():
        command = [sys.executable, "-m", "pilotlight", "export", str(source), "--precision", precision]
        subprocess.run([*command, "--out", str(target)], check=True)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES, "all"], default="all")
    parser.add_argument("--precision", default="int4")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--llama-server", default=shutil.which("llama-server"), help="the program, where it is built")
    parser.add_argument("--models", type=Path, default=Path("artifacts/bench"))
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    args = parser.parse_args()
    results = []
    for shape in SHAPES.values() if args.shape == "all" else [SHAPES[args.shape]]:
        servers: dict[Server, Path] = {Pilotlight(): _artifact(shape, args.precision, args.models)}
        if args.llama_server:
            servers[LlamaServer(args.llama_server)] = write_gguf(shape, args.models / f"{shape.name}-q4_0.gguf")
        results += measure_shape(shape, servers, args.rounds, args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    machine = {"cores": args.threads, "architecture": platform.machine(), "rounds": args.rounds}
    report = {"machine": machine, "precision": args.precision, "results": results}
    (args.out / f"bench-{args.precision}.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
