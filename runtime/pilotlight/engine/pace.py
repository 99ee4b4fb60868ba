"""How fast a session's runs are, as numbers: its engine measures, the scheduler decides by them. No clock here."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from enum import StrEnum

CHUNK_QUANTUM_TOKENS = 16
"""Chunks are multiples of this: smaller ones waste the kernels, and logits don't depend on the others' boundaries."""

DEFAULT_MIN_BATCH_ROWS = 4
"""Where the two graphs of a hybrid cross until it has been measured; docs/quantization.md has the speeds."""

PROBE_EVERY = 64
MIN_PROBES = 4
GAIN = 0.95
"""The other graph has to take at most this share of the time before it takes over a batch size."""
WEIGHT = 0.2
"""Of a new measurement in the running mean."""

TOKEN_COST = 0.25
"""Of a decode step of one row: what each further token of one sequence adds to it, until it has been measured."""
FORGET_AFTER_STEPS = 512
"""Runs of several tokens that were too slow to be chosen are tried again then: the machine may be another by now."""


class DecodeGraph(StrEnum):
    """Which of an artifact's graphs a decode step runs on: its main one, or the one for batches that a hybrid has."""

    MAIN = "main"
    BATCH = "batch"


@dataclass(slots=True)
class _Mean:
    value: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.count += 1
        self.value += (value - self.value) * max(WEIGHT, 1 / self.count)


@dataclass(slots=True)
class Pace:
    """Measured seconds per prompt token and per decode step, and what follows from them.

    A running stream gets its next token after one decode step and one chunk at the latest, so the chunk is what
    ``max_inter_token_ms`` leaves beside the decode step.
    """

    max_inter_token_ms: float | None = None
    has_batch_graph: bool = False
    min_batch_rows: int = DEFAULT_MIN_BATCH_ROWS
    _prefill: _Mean = field(default_factory=_Mean)
    _decode: dict[tuple[DecodeGraph, int], _Mean] = field(default_factory=lambda: defaultdict(_Mean))
    _steps_at_crossing: int = 0
    _verify: dict[tuple[DecodeGraph, int], _Mean] = field(default_factory=lambda: defaultdict(_Mean))
    _verified_at: dict[tuple[DecodeGraph, int], int] = field(default_factory=dict)
    _steps: dict[int, _Mean] = field(default_factory=lambda: defaultdict(_Mean))
    _num_steps: int = 0

    @property
    def prefill_tokens_per_s(self) -> float | None:
        return 1 / self._prefill.value if self._prefill.value else None

    def decode_s(self, num_rows: int) -> float | None:
        """Return how long a step of so many rows takes, None where nothing like it was measured."""
        known = [(abs(rows - num_rows), mean.value) for (_, rows), mean in self._decode.items() if mean.count]
        return min(known)[1] if known else None

    def observe_prefill(self, num_tokens: int, seconds: float) -> None:
        if num_tokens >= CHUNK_QUANTUM_TOKENS:
            self._prefill.add(seconds / num_tokens)

    def observe_decode(self, graph: DecodeGraph, num_rows: int, seconds: float) -> None:
        self._decode[graph, num_rows].add(seconds)
        self._move_crossing(num_rows)

    def observe_step(self, num_rows: int, seconds: float) -> None:
        """Note how long a decode step took with all that is done around its run, such as sampling."""
        self._num_steps += 1
        self._steps[num_rows].add(seconds)

    def step_s(self, num_rows: int) -> float | None:
        """Return how long such a step of so many rows takes, None where nothing like it was measured."""
        known = [(abs(rows - num_rows), mean.value) for rows, mean in self._steps.items()]
        return min(known)[1] if known else None

    def observe_verify(self, graph: DecodeGraph, num_tokens: int, seconds: float) -> None:
        """Note how long such a step took on so many tokens of one sequence."""
        self._num_steps += 1
        is_first = (graph, num_tokens) not in self._verified_at
        self._verified_at[graph, num_tokens] = self._num_steps
        if not is_first:  # which also pays for what is only made once
            self._verify[graph, num_tokens].add(seconds)

    def verify_s(self, graph: DecodeGraph, num_tokens: int) -> float:
        """Return how long a step on so many tokens of one sequence takes; for ever, before the first decode step."""
        measured = self._verify[graph, num_tokens]
        if measured.count and self._num_steps - self._verified_at[graph, num_tokens] <= FORGET_AFTER_STEPS:
            return measured.value
        step_s = self.step_s(1)
        return math.inf if step_s is None else step_s * (1 + TOKEN_COST * (num_tokens - 1))

    def graph_for(self, num_rows: int) -> DecodeGraph:
        """Choose the graph of a step; at the crossing the other one is tried now and then.

        A lone stream is never tried on: its tokens stay what they were.
        """
        if not self.has_batch_graph:
            return DecodeGraph.MAIN
        usual, other = DecodeGraph.MAIN, DecodeGraph.BATCH
        if num_rows >= self.min_batch_rows:
            usual, other = other, usual
        if num_rows > 1 and num_rows in (self.min_batch_rows - 1, self.min_batch_rows):
            self._steps_at_crossing += 1
            if self._steps_at_crossing % PROBE_EVERY == 0:
                return other
        return usual

    def chunk_tokens(self, num_rows: int, max_chunk_tokens: int) -> int:
        """Return how many prompt tokens may be read beside a decode step of so many rows."""
        per_token, step_s = self._prefill.value, self.decode_s(num_rows)
        if self.max_inter_token_ms is None or not num_rows or not per_token or step_s is None:
            return max_chunk_tokens
        fits = int((self.max_inter_token_ms / 1000 - step_s) / per_token)
        fits -= fits % CHUNK_QUANTUM_TOKENS
        return min(max_chunk_tokens, max(CHUNK_QUANTUM_TOKENS, fits))

    def _move_crossing(self, num_rows: int) -> None:
        if not self.has_batch_graph or num_rows not in (self.min_batch_rows - 1, self.min_batch_rows):
            return
        main, batch = self._decode[DecodeGraph.MAIN, num_rows], self._decode[DecodeGraph.BATCH, num_rows]
        if min(main.count, batch.count) < MIN_PROBES:
            return
        if num_rows == self.min_batch_rows - 1 and batch.value < GAIN * main.value:
            self.min_batch_rows -= 1
        elif num_rows == self.min_batch_rows and main.value < GAIN * batch.value:
            self.min_batch_rows += 1
