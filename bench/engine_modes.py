"""What two of the engine's modes cost or give, on one artifact, alternating: `deterministic`, and the prefix cache.

    python bench/engine_modes.py deterministic ARTIFACT [--rounds 5]
    python bench/engine_modes.py prefix ARTIFACT [--rounds 5]

Prompts are random tokens. The medians are printed as one JSON object.
"""

from __future__ import annotations

import argparse
import json
import queue
import random
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pilotlight.artifact import open_artifact
from pilotlight.engine.engine import Engine, Event
from pilotlight.engine.policy import Policy
from pilotlight.engine.session import OnnxSession
from pilotlight.request import SamplingParams, Sequence, TokenLogprobs

SHARED_TOKENS, OWN_TOKENS = 1000, 24
NUM_NEW = 32
GREEDY = SamplingParams(temperature=0.0)
MODES = {"default": Policy(), "deterministic": Policy(deterministic=True)}


@dataclass
class Run:
    """What a batch of sequences gave: tokens with log probabilities, and the times of the first and later ones."""

    tokens: dict[str, list[tuple[int, TokenLogprobs | None]]]
    first_s: list[float]
    decode_tokens_per_s: float


def run(engine: Engine, events: queue.SimpleQueue[list[Event]], asked: list[Sequence]) -> Run:
    begun_at = time.monotonic()
    for one in asked:
        engine.submit(one)
    tokens: dict[str, list[tuple[int, TokenLogprobs | None]]] = {one.id: [] for one in asked}
    firsts, steady, num_ended = {}, [], 0
    while num_ended < len(asked):
        for name, event in events.get(timeout=120):
            assert event.token_id is not None, event.error
            tokens[name].append((event.token_id, event.logprobs))
            firsts.setdefault(name, event.at - begun_at)
            num_ended += event.finish is not None
            if len(firsts) == len(asked) and num_ended == 0:
                steady.append(event.at)
    rate = (len(steady) - len(asked)) / (steady[-1] - steady[0]) if len(steady) > 2 * len(asked) else 0.0
    return Run(tokens, list(firsts.values()), rate)


def measure(session: OnnxSession, asked: list[Sequence], policy: Policy) -> Run:
    events: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
    engine = Engine(session, events.put, policy)
    engine.start()
    try:
        return run(engine, events, asked)
    finally:
        engine.close()


def prompts(rng: random.Random, count: int, length: int, num_new: int) -> list[Sequence]:
    ids = [tuple(rng.choices(range(100, 5000), k=length)) for _ in range(count)]
    return [Sequence(f"s{n}", prompt, num_new, sampling=GREEDY, num_top_logprobs=1) for n, prompt in enumerate(ids)]


def deterministic(session: OnnxSession, rounds: int) -> dict[str, Any]:
    rng = random.Random(0)
    rates: dict[tuple[str, int], list[float]] = {}
    same: dict[str, bool] = dict.fromkeys(MODES, True)
    for round_ in range(rounds):
        asked = prompts(rng, 8, 128, NUM_NEW)
        for num_streams in (1, 2, 8):
            for name in sorted(MODES, reverse=bool(round_ % 2)):
                done = measure(
                    session, [replace(one, num_top_logprobs=None) for one in asked[:num_streams]], MODES[name]
                )
                rates.setdefault((name, num_streams), []).append(done.decode_tokens_per_s)
        if round_ == 0:
            for name, policy in MODES.items():
                together = measure(session, asked, policy).tokens
                alone = {one.id: measure(session, [one], policy).tokens[one.id] for one in asked}
                same[name] = together == alone
    figures = {f"{name}, {n} streams": round(statistics.median(of), 1) for (name, n), of in rates.items()}
    return {"decode tokens/s": figures, "eight together are bit for bit what each is alone": same}


def prefix(session: OnnxSession, rounds: int) -> dict[str, Any]:
    rng = random.Random(0)
    policy = Policy(prefix_cache_bytes=1 << 30)
    events: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
    engine = Engine(session, events.put, policy)
    engine.start()
    times: list[tuple[float, float]] = []
    try:
        for _ in range(rounds):
            shared = prompts(rng, 1, SHARED_TOKENS, 1)[0].prompt_ids
            asked = [replace(own, prompt_ids=shared + own.prompt_ids) for own in prompts(rng, 2, OWN_TOKENS, 1)]
            times.append(tuple(run(engine, events, [one]).first_s[0] for one in asked))  # type: ignore[arg-type]
    finally:
        engine.close()
    first, second = (statistics.median(column) * 1000 for column in zip(*times, strict=True))
    ratios = [b / a for a, b in times]
    return {
        "first_token_ms": {"first request": round(first, 1), "second request": round(second, 1)},
        "second/first": {"median": round(statistics.median(ratios), 3), "most": round(max(ratios), 3)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("deterministic", "prefix"))
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache-dir", type=Path)
    args = parser.parse_args()
    session = OnnxSession(open_artifact(args.artifact), 8, 2048, args.threads, args.cache_dir)
    figures = (deterministic if args.mode == "deterministic" else prefix)(session, args.rounds)
    print(json.dumps({"artifact": args.artifact.name, **figures}, indent=2))


if __name__ == "__main__":
    main()
