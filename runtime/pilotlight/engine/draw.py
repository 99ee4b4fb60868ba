"""Draw a token from one row of logits [V] without sorting it.

Top-k and min-p are found by a threshold. Top-p by trial: a token is drawn from what the others leave, and kept if the
mass before it, in the order of weights, is less than top-p. A token that is not kept rules out all behind it for the
next trial, so few are needed; what is kept follows the filtered distribution exactly.

Letters: V vocabulary, K candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pilotlight.request import SamplingParams

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]
Weights = NDArray[np.float32]

STRIDE = 32
"""A sample of every so many logits tells where the likeliest ones begin."""

BLOCK = 256
"""Running sums are those of blocks first: one long running sum is slow."""


def draw(logits: Floats, params: SamplingParams, random: Callable[[int], float]) -> int:
    """Return a token of the row's distribution, by the random numbers of its trials 0, 1, …"""
    if 0 < params.top_k < len(logits):
        ids = np.sort(likeliest(logits, params.top_k))
        return draw_among(ids, logits[ids], params, random)
    return draw_among(None, logits, params, random)


def draw_among(ids: Ids | None, logits: Floats, params: SamplingParams, random: Callable[[int], float]) -> int:
    """Return one of ``ids`` [K], in ascending order and with their logits [K]; None stands for the whole row."""
    weights: Weights = np.exp((logits - logits.max()) / np.float32(params.temperature))
    mass = params.top_p * float(weights.sum(dtype=np.float64))
    if params.min_p > 0.0:
        ids, weights = _only(weights >= params.min_p, ids, weights)
    trial = 0
    while True:
        place = _place(weights, random(trial))
        before = _before(weights, place)
        if params.top_p >= 1.0 or not before.any() or weights[before].sum(dtype=np.float64) < mass:
            return place if ids is None else int(ids[place])
        ids, weights = _only(before, ids, weights)
        trial += 1


def _before(weights: Weights, place: int) -> NDArray[np.bool_]:
    """Return which weights [K] come before one: the larger ones, and of equal ones those of smaller ids."""
    before: NDArray[np.bool_] = weights > weights[place]
    before[:place] |= weights[:place] == weights[place]
    return before


def _only(kept: NDArray[np.bool_], ids: Ids | None, weights: Weights) -> tuple[Ids, Weights]:
    places = np.flatnonzero(kept)
    return (places if ids is None else ids[places]), weights[places]


def likeliest(logits: Floats, count: int) -> Ids:
    """Return the ids [K] of the ``count`` largest logits, largest first, the smaller id first among equals.

    Tokens that are impossible (minus infinity) are left out.
    """
    threshold = _threshold(logits, count) if count < len(logits) else -np.inf
    ids = np.flatnonzero(logits >= threshold if threshold > -np.inf else logits > -np.inf)
    return ids[np.argsort(-logits[ids], kind="stable")[:count]]


def _threshold(logits: Floats, count: int) -> np.float32:
    """Return a value that at least ``count`` logits reach, and hardly more than that where it is easy to tell."""
    sample = logits[::STRIDE]
    expected = count / STRIDE
    place = math.ceil(expected + 4 * math.sqrt(expected) + 2)
    if place < len(sample):
        guess: np.float32 = np.partition(sample, len(sample) - place)[len(sample) - place]
        if np.count_nonzero(logits >= guess) >= count:
            return guess
    exact: np.float32 = np.partition(logits, len(logits) - count)[len(logits) - count]
    return exact


def _place(weights: Weights, random: float) -> int:
    """Return where the running sum of weights [K] passes random × total; never a weight of 0."""
    sums = np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), BLOCK)), dtype=np.float64)
    target = random * sums[-1]
    block = min(int(np.searchsorted(sums, target, side="right")), len(sums) - 1)
    begun = sums[block - 1] if block else 0.0
    inside = weights[block * BLOCK : (block + 1) * BLOCK]
    running = begun + np.cumsum(inside, dtype=np.float64)
    place = int(np.searchsorted(running, target, side="right"))
    if place == len(inside) or inside[place] == 0.0:  # where the two sums round apart
        place = int(np.flatnonzero(inside)[-1])
    return block * BLOCK + place
