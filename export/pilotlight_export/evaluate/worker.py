"""A process that holds one artifact and nothing else, so that its memory is that of the artifact.

It answers each line on its standard input with a line of JSON on its standard output: one run, and what it took.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

from pilotlight.artifact import Shapes, open_artifact
from pilotlight_export.verify.graph_runner import GraphRunner, Graphs

MAX_PROMPT_TOKENS = 256
MAX_NEW_TOKENS = 32


def main(path: Path) -> None:
    """Load the artifact, run it once, and then once for each line."""
    shapes = open_artifact(path).manifest.shapes
    graphs = Graphs(path, shapes, {})
    _measure(graphs, shapes)
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(_measure(graphs, shapes) | {"memory_mb": peak_memory_mb()}), flush=True)


def _measure(graphs: Graphs, shapes: Shapes) -> dict[str, float]:
    prompt_tokens = min(MAX_PROMPT_TOKENS, shapes.max_context_tokens // 2)
    new_tokens = min(MAX_NEW_TOKENS, shapes.max_context_tokens - prompt_tokens)
    tokens = np.random.default_rng(0).integers(0, shapes.vocab_size, prompt_tokens).tolist()
    runner = GraphRunner(graphs, 1, prompt_tokens + new_tokens)
    started_at = time.perf_counter()
    logits = runner.prefill([tokens], [[prompt_tokens - 1]])
    prefilled_at = time.perf_counter()
    for _ in range(new_tokens):
        logits = runner.decode(logits.argmax(axis=-1))
    ended_at = time.perf_counter()
    return {
        "prefill_tps": prompt_tokens / (prefilled_at - started_at),
        "decode_tps": new_tokens / (ended_at - prefilled_at),
    }


def peak_memory_mb() -> float:
    """Return the most memory that this process has held; files that are mapped count as far as they were read."""
    status = Path("/proc/self/status")
    if status.exists():  # what resource.getrusage calls a child's peak includes its parent's
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / 1e6
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


if __name__ == "__main__":
    main(Path(sys.argv[1]))
