"""Draw a token from one row of logits [V]: what the filters keep first, then one place in it.

Nothing sorts the ids of a whole row, which would take longer than all the rest.

Letters: V vocabulary, K candidates, likeliest first.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pilotlight.request import SamplingParams

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]
Weights = NDArray[np.float64]

WIDTHS = (128, 1024)
"""A filter's boundary is looked for among so many of the likeliest tokens before it is among all of them."""

STRIDE = 32
"""A sample of every so many logits tells where the likeliest ones begin."""

BLOCK = 256
"""Running sums are those of blocks first: one long running sum is slow."""


def draw(logits: Floats, params: SamplingParams, random: float) -> int:
    """Return the token at the place ``random`` of the row's distribution, in the order of ids."""
    peak = logits.max()
    if params.top_k == 0 and params.top_p >= 1.0 and params.min_p == 0.0:
        weights = _weights(logits, peak, params.temperature)
        return _place(weights, random * weights.sum())
    ids = kept(logits, params)
    weights = _weights(logits[ids], peak, params.temperature)
    return int(ids[_place(weights, random * weights.sum())])


def kept(logits: Floats, params: SamplingParams) -> Ids:
    """Return the ids that top-k, then top-p, then min-p keep, in their own order.

    Among equal logits at the boundary the smaller ids are kept.
    """
    most = min(params.top_k or len(logits), len(logits))
    mass = None
    if params.top_p < 1.0 and not params.top_k:
        mass = float(_weights(logits, logits.max(), params.temperature).sum())
    for width in WIDTHS:
        if width < params.top_k and width < most:
            continue  # top-p's mass is that of all that top-k keeps
        ids = likeliest(logits, min(width, most))
        is_all = len(ids) < width or len(ids) == most
        count = _count(logits[ids], params, mass)
        if is_all or count < len(ids):
            return np.sort(ids[:count])
    values = np.sort(logits)[::-1][:most]
    count = _count(values, params, mass)
    return _largest(logits, values[count - 1], count)


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


def _count(values: Floats, params: SamplingParams, mass: float | None) -> int:
    """Return how many of the largest logits [K], largest first, top-p (of a mass, None: of theirs) and min-p keep."""
    count = len(values)
    weights = _weights(values, values[0], params.temperature)
    if params.top_p < 1.0:
        target = params.top_p * (weights.sum() if mass is None else mass)
        count = min(count, _place(weights, target, side="left") + 1)
    if params.min_p > 0.0:
        count = min(count, int(np.searchsorted(-weights, -params.min_p * weights[0], side="right")))
    return max(1, count)


def _largest(logits: Floats, smallest: np.float32, count: int) -> Ids:
    """Return the ids of the ``count`` largest logits, whose smallest is given."""
    above = np.flatnonzero(logits > smallest)
    equal = np.flatnonzero(logits == smallest)[: count - len(above)]
    return np.sort(np.concatenate([above, equal]))


def _weights(logits: Floats, peak: np.float32, temperature: float) -> Weights:
    """Return weights relative to that of the peak, each exact to about a part in ten million."""
    weights: Weights = np.exp((logits - peak) / np.float32(temperature)).astype(np.float64)
    return weights


def _place(weights: Weights, target: float, side: Literal["left", "right"] = "right") -> int:
    """Return where the running sum of weights [K] reaches (left) or passes (right) a target, K - 1 at most."""
    sums = np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), BLOCK)))
    block = min(int(np.searchsorted(sums, target, side)), len(sums) - 1)
    begun = sums[block - 1] if block else 0.0
    running = begun + np.cumsum(weights[block * BLOCK : (block + 1) * BLOCK])
    return min(block * BLOCK + int(np.searchsorted(running, target, side)), len(weights) - 1)
