"""Choose the next token of every row of a batch. A row's result depends on that row alone.

Letters: N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np
from numpy.typing import NDArray

from pilotlight.engine.draw import draw
from pilotlight.engine.grammar import GrammarState
from pilotlight.request import SamplingParams

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]


MASK = 0xFFFFFFFFFFFFFFFF
TRIAL = 0xD1342543DE82EF95
"""Between the streams of a token's trials; odd, so that they all differ."""


class SamplingRow:
    """One sequence's sampling state: its parameters, how many tokens it has drawn, and what it has seen."""

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Rows[int],
        vocab_size: int,
        emitted_ids: Rows[int] = (),
        grammar: GrammarState | None = None,
    ) -> None:
        """Take up a sequence, behind the part of its answer that was drawn elsewhere."""
        self.params = params
        self.grammar: GrammarState | None = None
        self.num_drawn = 0
        self._bias_ids = np.fromiter(params.logit_bias.keys(), np.int64)
        self._bias = np.fromiter(params.logit_bias.values(), np.float32)
        self._counts: NDArray[np.int32] | None = None
        self._seen: NDArray[np.bool_] | None = None
        if params.penalised:
            self._counts = np.zeros(vocab_size, np.int32)
            self._seen = np.zeros(vocab_size, np.bool_)
            self._seen[np.asarray(prompt_ids, np.int64)] = True
        for token_id in emitted_ids:
            self.commit(token_id)
        self.grammar = grammar  # which is behind those tokens already

    @property
    def adjusts(self) -> bool:
        """Whether the logits change before the choice."""
        return self._counts is not None or len(self._bias) > 0 or self.grammar is not None

    def adjust(self, logits: Floats) -> None:
        """Apply the penalties, then the bias, then the grammar, to one row of logits [V] in place.

        The repetition penalty counts the prompt and the answer, the other two the answer only.
        """
        if self._counts is not None and self._seen is not None:
            penalty = np.float32(self.params.repetition_penalty)
            seen = logits[self._seen]
            logits[self._seen] = np.where(seen > 0, seen / penalty, seen * penalty)
            logits -= np.float32(self.params.frequency_penalty) * self._counts
            logits -= np.float32(self.params.presence_penalty) * (self._counts > 0)
        if len(self._bias):
            logits[self._bias_ids] += self._bias
        if self.grammar is not None:
            np.copyto(logits, -np.inf, where=self.grammar.banned)

    def random(self, trial: int) -> float:
        """Return the random number of the next token's n-th trial."""
        return uniform_at(self.params.seed + trial * TRIAL, self.num_drawn)

    def commit(self, token_id: int) -> None:
        self.num_drawn += 1
        if self.grammar is not None:
            self.grammar.commit(token_id)
        if self._counts is not None and self._seen is not None:
            self._counts[token_id] += 1
            self._seen[token_id] = True


def sample(logits: Floats, rows: Rows[SamplingRow]) -> Ids:
    """Return one token id [N] for each row of ``logits`` [N, V], which may be changed in place."""
    for index, row in enumerate(rows):
        if row.adjusts:
            row.adjust(logits[index])
    token_ids = np.empty(len(rows), np.int64)
    for index, row in enumerate(rows):
        greedy = row.params.greedy
        token_ids[index] = logits[index].argmax() if greedy else draw(logits[index], row.params, row.random)
    for row, token_id in zip(rows, token_ids.tolist(), strict=True):
        row.commit(token_id)
    return token_ids


def uniform_at(seed: int, counter: int) -> float:
    """Return the ``counter``-th random number in [0, 1) of a seed's stream.

    Source: SplitMix64 (Steele, Lea and Flood 2014), whose n-th output is a hash of seed + n × the golden gamma.
    """
    z = _mix(seed & MASK) + (counter + 1) * 0x9E3779B97F4A7C15 & MASK
    return (_mix(z) >> 11) * 2.0**-53


def _mix(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)
