"""A deterministic session without a model, for tests: every next token is a hash of all tokens before it."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np

from pilotlight.engine.pace import DecodeGraph
from pilotlight.engine.session import Ids, Logits


def next_token(tokens: list[int], vocab_size: int) -> int:
    """Return the token which ``FakeSession`` makes the likeliest after ``tokens``."""
    return zlib.crc32(np.array(tokens, np.int64).tobytes()) % vocab_size


class FakeSession:
    """Keeps each slot's tokens where a real session keeps keys and values, and checks every run against them.

    ``before_run`` is called on the engine's thread before each run; it may block or raise.
    """

    def __init__(
        self,
        vocab_size: int = 512,
        num_slots: int = 4,
        max_context_tokens: int = 64,
        before_run: Callable[[], object] = lambda: None,
        has_batch_graph: bool = False,
    ) -> None:
        self.vocab_size = vocab_size
        self.num_slots = num_slots
        self.max_context_tokens = max_context_tokens
        self.kv_bytes_per_token = 8
        self.has_batch_graph = has_batch_graph
        self.before_run = before_run
        self.slots: list[list[int]] = [[] for _ in range(num_slots)]
        self.num_runs = 0
        self.run_s = 0.001

    def prefill(self, slot: int, token_ids: Ids, past_tokens: int) -> Logits:
        self._begin()
        self._append(slot, token_ids.tolist(), past_tokens)
        return self._logits([self.slots[slot]])

    def decode(self, token_ids: Ids, past_tokens: Ids, graph: DecodeGraph = DecodeGraph.MAIN) -> Logits:
        assert self.has_batch_graph or graph is DecodeGraph.MAIN
        self._begin()
        for slot, (token_id, past) in enumerate(zip(token_ids.tolist(), past_tokens.tolist(), strict=True)):
            self._append(slot, [token_id], past)
        return self._logits(self.slots[: len(token_ids)])

    def verify(self, slot: int, token_ids: Ids, past_tokens: int, graph: DecodeGraph = DecodeGraph.MAIN) -> Logits:
        assert self.has_batch_graph or graph is DecodeGraph.MAIN
        self._begin()
        self._append(slot, token_ids.tolist(), past_tokens)
        ends = range(past_tokens + 1, past_tokens + len(token_ids) + 1)
        return self._logits([self.slots[slot][:end] for end in ends])

    def move(self, source: int, target: int, num_tokens: int) -> None:
        self.slots[target] = self.slots[source][:num_tokens]

    def save_prefix(self, slot: int, start: int, end: int) -> Ids:
        assert end <= len(self.slots[slot])
        return np.array(self.slots[slot][start:end], np.int64)

    def load_prefix(self, slot: int, start: int, held: Ids) -> None:
        self.slots[slot] = [*self.slots[slot][:start], *held.tolist()]
        assert len(self.slots[slot]) == start + len(held)

    def _begin(self) -> None:
        self.before_run()
        self.num_runs += 1

    def _append(self, slot: int, token_ids: list[int], past_tokens: int) -> None:
        held = self.slots[slot]
        if past_tokens > len(held) or past_tokens + len(token_ids) > self.max_context_tokens:
            raise AssertionError(f"slot {slot} holds {len(held)} tokens, the run expects {past_tokens}")
        self.slots[slot] = held[:past_tokens] + token_ids

    def _logits(self, slots: list[list[int]]) -> Logits:
        logits = np.zeros((len(slots), self.vocab_size), np.float32)
        for row, tokens in enumerate(slots):
            logits[row, next_token(tokens, self.vocab_size)] = 10.0
        return logits
