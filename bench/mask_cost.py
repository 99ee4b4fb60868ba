"""What constrained decoding costs: decode steps of eight sequences with a JSON schema, beside free ones.

    python bench/mask_cost.py artifacts/demo-int4 --tokens 60

Every pair of runs has the same prompts and lengths; the order alternates. Printed are the medians of a decode step.
"""

from __future__ import annotations

import argparse
import json
import queue
import statistics
import time
from pathlib import Path

from pilotlight.artifact import Artifact, open_artifact
from pilotlight.engine.engine import Engine, Event
from pilotlight.engine.grammar import Grammars
from pilotlight.engine.session import OnnxSession
from pilotlight.request import SamplingParams, Sequence
from pilotlight.text.grammar import json_schema_grammar

SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string"},
        "notes": {"type": "array", "items": {"type": "string", "minLength": 400}, "minItems": 50},
    },
    "required": ["title", "notes"],
    "additionalProperties": False,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    artifact = open_artifact(options.artifact)
    events: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
    context = min(artifact.manifest.shapes.max_context_tokens, 512)
    session = OnnxSession(artifact, options.batch, context, options.threads)
    engine = Engine(session, events.put, grammars=Grammars.of(artifact))
    engine.start()
    try:
        grammar = json_schema_grammar(SCHEMA, "schema")
        steps: dict[bool, list[float]] = {False: [], True: []}
        for number in range(options.rounds + 1):
            for held in (number % 2 == 0, number % 2 == 1):
                times = run(engine, events, artifact, options.batch, options.tokens, grammar if held else None)
                if number:  # the first round warms up
                    steps[held] += times
    finally:
        engine.close()
    free, held = statistics.median(steps[False]), statistics.median(steps[True])
    print(json.dumps({
        "artifact": options.artifact.name, "batch": options.batch, "vocab_size": artifact.manifest.shapes.vocab_size,
        "free_ms": round(free * 1000, 3), "constrained_ms": round(held * 1000, 3), "cost": round(held / free - 1, 4),
    }))  # fmt: skip


def run(
    engine: Engine,
    events: queue.SimpleQueue[list[Event]],
    artifact: Artifact,
    batch: int,
    num_tokens: int,
    grammar: str | None,
) -> list[float]:
    """Return the seconds between the steps in which all sequences got a token."""
    for number in range(batch):
        prompt = tuple((number * 7 + place) % artifact.manifest.shapes.vocab_size for place in range(8))
        engine.submit(
            Sequence(f"s{number}", prompt, num_tokens, sampling=SamplingParams(temperature=0.0), grammar=grammar)
        )
    ended, times, last_at = 0, [], None
    while ended < batch:
        step = events.get(timeout=120)
        now = time.perf_counter()
        ended += sum(event.finish is not None for _, event in step)
        assert not any(event.error for _, event in step)
        if len(step) == batch and ended == 0:
            if last_at is not None:
                times.append(now - last_at)
            last_at = now
        else:
            last_at = None
    return times


if __name__ == "__main__":
    main()
