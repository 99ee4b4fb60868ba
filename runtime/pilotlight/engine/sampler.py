"""Choose the next token of every row of a batch. A row's result depends on that row alone.

Letters: N rows, V vocabulary, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np
from numpy.typing import NDArray

from pilotlight.engine.grammar import GrammarState
from pilotlight.request import SamplingParams

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]

NUM_CANDIDATES = 1024
"""Rows with a filter are sorted down to this many tokens; the few which need more are sorted whole."""


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
    token_ids: Ids = logits.argmax(axis=1)
    drawing = [index for index, row in enumerate(rows) if not row.params.greedy]
    if drawing:
        drawn = _draw(logits[drawing], [rows[index] for index in drawing])
        token_ids[drawing] = drawn
    for row, token_id in zip(rows, token_ids.tolist(), strict=True):
        row.commit(token_id)
    return token_ids


def uniform(seeds: Rows[int], counters: Rows[int]) -> NDArray[np.float64]:
    """Return the ``counter``-th random number in [0, 1) of each seed's stream.

    Source: SplitMix64 (Steele, Lea and Flood 2014), whose n-th output is a hash of seed + n × the golden gamma.
    """
    z = np.array([seed & 0xFFFFFFFFFFFFFFFF for seed in seeds], np.uint64)
    z = _mix(z) + (np.array(counters, np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    return (_mix(z) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _draw(logits: Floats, rows: Rows[SamplingRow]) -> Ids:
    """Draw from each row's distribution [N, V] by inverting its cumulative one at the row's random number."""
    params = [row.params for row in rows]
    randoms = uniform([p.seed for p in params], [row.num_drawn for row in rows])
    temperatures = np.array([p.temperature for p in params], np.float32)[:, None]
    scaled = (logits - logits.max(axis=1, keepdims=True)) / temperatures
    token_ids = np.empty(len(rows), np.int64)
    plain = np.array([p.top_k == 0 and p.top_p >= 1.0 and p.min_p == 0.0 for p in params])
    if plain.any():
        token_ids[plain] = _invert(np.exp(scaled[plain], dtype=np.float64), randoms[plain])
    filtered = np.flatnonzero(~plain)
    if len(filtered):
        token_ids[filtered] = _draw_filtered(scaled[filtered], [params[int(i)] for i in filtered], randoms[filtered])
    return token_ids


def _draw_filtered(scaled: Floats, params: Rows[SamplingParams], randoms: NDArray[np.float64]) -> Ids:
    """Draw from the tokens that top-k, then top-p, then min-p leave; ``scaled`` [N, V] has its maximum at 0."""
    vocab_size = scaled.shape[1]
    totals = np.exp(scaled, dtype=np.float64).sum(axis=1)
    token_ids = np.empty(len(params), np.int64)
    undecided = np.arange(len(params))
    for width in dict.fromkeys((min(NUM_CANDIDATES, vocab_size), vocab_size)):
        ids, weights, whole = _filter(scaled[undecided], [params[int(i)] for i in undecided], totals[undecided], width)
        places = _invert(weights, randoms[undecided])
        token_ids[undecided[whole]] = ids[whole, places[whole]]
        undecided = undecided[~whole]
        if not len(undecided):
            break
    return token_ids


def _filter(
    scaled: Floats, params: Rows[SamplingParams], totals: NDArray[np.float64], width: int
) -> tuple[Ids, NDArray[np.float64], NDArray[np.bool_]]:
    """Return the ``width`` likeliest ids [N, K], their weights (0 where filtered out), and which rows that decides.

    A row is decided when the filter's boundary lies within the candidates.
    """
    ids = _likeliest(scaled, width)
    weights = np.exp(np.take_along_axis(scaled, ids, axis=1), dtype=np.float64)
    places = np.arange(width)[None, :]
    top_k = np.array([min(p.top_k, scaled.shape[1]) or scaled.shape[1] for p in params])[:, None]
    top_p = np.array([p.top_p for p in params])[:, None]
    min_p = np.array([p.min_p for p in params])[:, None]
    weights[places >= top_k] = 0.0
    mass = np.where(top_k < scaled.shape[1], weights.sum(axis=1, keepdims=True), totals[:, None])
    before = np.cumsum(weights, axis=1) - weights
    outside = (before >= top_p * mass) & (places > 0) | (weights < min_p * weights[:, :1])
    weights[outside] = 0.0
    # Undecided: a top-k wider than the candidates (its mass is unknown), or no boundary before their end.
    k = top_k[:, 0]
    decided = (k <= width) | ((k == scaled.shape[1]) & outside[:, -1])
    return ids, weights, decided


def _likeliest(scaled: Floats, width: int) -> Ids:
    """Return the ids [N, K] of the largest values, largest first, the smaller id first among equals."""
    if width < scaled.shape[1]:
        ids = np.argpartition(-scaled, width - 1, axis=1)[:, :width]
        ids.sort(axis=1)
    else:
        ids = np.broadcast_to(np.arange(width), scaled.shape).copy()
    order = np.argsort(-np.take_along_axis(scaled, ids, axis=1), axis=1, kind="stable")
    return np.take_along_axis(ids, order, axis=1)


def _invert(weights: NDArray[np.float64], randoms: NDArray[np.float64]) -> Ids:
    """Return, for each row of weights [N, K], the place where its running sum passes random × total."""
    running = np.cumsum(weights, axis=1)
    targets = randoms * running[:, -1]
    return np.array([np.searchsorted(row, target, side="right") for row, target in zip(running, targets, strict=True)])
