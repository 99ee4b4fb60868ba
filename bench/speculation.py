"""What drafts from the prompt give and cost: the same requests with and without them, in turns, on one session.

``python bench/speculation.py ARTIFACT...`` prints, for answers that copy their prompt with an edit in every so many
tokens and for answers that repeat nothing, how long they take with ``speculation = "auto"`` relative to ``"off"``.
The graph runs as always, but which token comes next is dictated, so that the weights may be random ones.
"""

from __future__ import annotations

import queue
import random
import statistics
import sys
import time
from collections.abc import Sequence as Items
from pathlib import Path

import numpy as np

from pilotlight.artifact import open_artifact
from pilotlight.config import HostSettings
from pilotlight.engine.engine import Engine, Event
from pilotlight.engine.pace import DecodeGraph
from pilotlight.engine.policy import Policy
from pilotlight.engine.session import Ids, Logits, OnnxSession
from pilotlight.engine.speculation import PromptLookup
from pilotlight.host.sizing import num_cores
from pilotlight.request import SamplingParams, Sequence

PROMPT_TOKENS = 250
ANSWER_TOKENS = 200
CONTEXT = 512
ROUNDS = 5
TASKS = {"copies": 0, "copies, an edit in 40": 40, "copies, an edit in 10": 10, "repeats nothing": 1}
"""How many tokens lie between two edits."""


class Dictated(OnnxSession):
    """Finds the next token of its script the likeliest, after a run as always."""

    script: Items[int] = ()

    def prefill(self, slot: int, token_ids: Ids, past_tokens: int) -> Logits:
        return self._dictate(super().prefill(slot, token_ids, past_tokens), [past_tokens + len(token_ids)])

    def decode(self, token_ids: Ids, past_tokens: Ids, graph: DecodeGraph = DecodeGraph.MAIN) -> Logits:
        return self._dictate(super().decode(token_ids, past_tokens, graph), [past + 1 for past in past_tokens.tolist()])

    def verify(self, slot: int, token_ids: Ids, past_tokens: int, graph: DecodeGraph = DecodeGraph.MAIN) -> Logits:
        places = [past_tokens + 1 + place for place in range(len(token_ids))]
        return self._dictate(super().verify(slot, token_ids, past_tokens, graph), places)

    def _dictate(self, logits: Logits, places: list[int]) -> Logits:
        for row, place in enumerate(places):
            logits[row, self.script[place % len(self.script)]] = 1e4
        return logits


def script(rng: random.Random, vocab_size: int, tokens_between_edits: int) -> list[int]:
    """Return a prompt and its answer."""
    prompt = rng.sample(range(3, vocab_size), min(PROMPT_TOKENS, vocab_size - 3))
    answer = (prompt * 2)[:ANSWER_TOKENS]
    if tokens_between_edits:
        for place in range(0, len(answer), tokens_between_edits):
            answer[place] = rng.randrange(3, vocab_size)
    return [*prompt, *answer]


def timed(session: Dictated, policy: Policy, num_streams: int) -> tuple[float, float]:
    """Return the seconds from first to last token, and the share of the drafted tokens that came true."""
    events: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
    engine = Engine(session, events.put, policy)
    engine.start()
    prompt = tuple(session.script[:-ANSWER_TOKENS])
    try:
        for _ in range(2):  # the first time is for the pace to be measured
            for number in range(num_streams):
                engine.submit(Sequence(str(number), prompt, ANSWER_TOKENS, sampling=SamplingParams(temperature=0.0)))
            begun: dict[str, float] = {}
            num_ended = 0
            while num_ended < num_streams:
                for name, event in events.get():
                    assert event.error is None, event.error
                    begun.setdefault(name, event.at)
                    num_ended += event.finish is not None
            seconds = event.at - max(begun.values())
        signals = engine.signals()
    finally:
        engine.close()
    return seconds, signals.num_accepted_tokens / max(1, signals.num_drafted_tokens)


def lookup_us(num_tokens: int) -> float:
    """Return the microseconds that a token costs where nothing repeats, behind so many others."""
    rng = random.Random(1)
    lookup = PromptLookup(rng.choices(range(150_000), k=num_tokens))
    tokens = rng.choices(range(150_000), k=500)
    begun_at = time.perf_counter()
    for token_id in tokens:
        lookup.push(token_id)
        lookup.draft(15)
    return (time.perf_counter() - begun_at) / len(tokens) * 1e6


def measure(path: Path) -> None:
    artifact = open_artifact(path)
    session = Dictated(artifact, 2, CONTEXT, num_cores(), Path(HostSettings().cache_dir).expanduser())
    rng = random.Random(1)
    for num_streams in (1, 2):
        for task, tokens_between_edits in TASKS.items():
            ratios, shares, rates = [], [], []
            for number in range(ROUNDS):
                session.script = script(rng, artifact.manifest.shapes.vocab_size, tokens_between_edits)
                pair = {}
                for speculates in ((False, True), (True, False))[number % 2]:
                    pair[speculates] = timed(session, Policy(speculates=speculates), num_streams)
                ratios.append(pair[False][0] / pair[True][0])
                shares.append(pair[True][1])
                rates.append((ANSWER_TOKENS - 1) / pair[True][0])
            low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
            accepted = f"{statistics.median(shares):.0%} accepted" if max(shares) else "nothing drafted"
            rate = f"{statistics.median(rates):.0f} tokens/s a stream"
            print(
                f"{path.name}, {num_streams} streams, {task}: {middle:.2f} ({low:.2f}-{high:.2f}), {accepted}, {rate}"
            )


if __name__ == "__main__":
    for length in (250, 4_000, 32_000):
        print(f"a token behind {length:,} others: {lookup_us(length):.1f} us")
    for argument in sys.argv[1:]:
        measure(Path(argument))
