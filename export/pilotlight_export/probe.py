"""What an artifact answers to a fixed prompt, for its manifest: whoever loads it later can tell that it still does."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pilotlight.artifact import Probe, Shapes, SpecialTokens
from pilotlight_export.verify.graph_runner import GraphRunner, Graphs

NUM_PROMPT_TOKENS = 16
NUM_TOKENS = 8
CLEAR_MARGIN = 0.5
"""Logits between the best token and the next one; with less, another processor's rounding could turn them round."""


def record_probe(directory: Path, shapes: Shapes, special_tokens: SpecialTokens, prompt_ids: list[int]) -> Probe:
    """Generate greedily from the first tokens of ``prompt_ids``, up to an end or a near tie."""
    prompt = prompt_ids[: min(NUM_PROMPT_TOKENS, shapes.max_context_tokens - NUM_TOKENS)]
    runner = GraphRunner(Graphs(directory, shapes), 1, len(prompt) + NUM_TOKENS)
    logits = runner.prefill([prompt], [[len(prompt) - 1]])[0]
    found: list[int] = []
    while len(found) < NUM_TOKENS:
        second, best = np.argsort(logits)[-2:].tolist()
        if logits[best] - logits[second] < CLEAR_MARGIN:
            break
        found.append(best)
        if best in special_tokens.eos_ids:
            break
        logits = runner.decode(np.array([best], np.int64))[0]
    return Probe(prompt, found)
