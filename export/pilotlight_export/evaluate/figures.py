"""What is known about an artifact once it has been evaluated."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from pilotlight_export.verify.figures import rounded


@dataclass(frozen=True)
class Spread:
    """The median of repeated measurements, and the least and the most of them."""

    median: float
    least: float
    most: float


@dataclass(frozen=True)
class Speed:
    """What a process that holds one artifact does, batch 1.

    Units:
        tokens per second, megabytes
    """

    prefill_tps: Spread
    decode_tps: Spread
    memory_mb: float


@dataclass(frozen=True)
class Quality:
    """How well an artifact predicts a text, and how closely it follows the most precise artifact of its model.

    Bits per byte can be compared between all models, perplexity only between models with the same tokenizer.

    Units:
        divergences in nats
    """

    bits_per_byte: float
    perplexity: float
    top1_agreement: float
    mean_kl: float
    p99_kl: float
    compared_with: str


@dataclass(frozen=True)
class Row:
    """One artifact, evaluated."""

    name: str
    model: str
    precision: str
    size_mb: float
    memory_mb: float
    prefill_tps: Spread
    decode_tps: Spread
    bits_per_byte: float
    perplexity: float
    top1_agreement: float
    mean_kl: float
    p99_kl: float
    compared_with: str


def spread_of(values: Sequence[float]) -> Spread:
    """Sum up measurements of the same thing."""
    return Spread(rounded(statistics.median(values)), rounded(min(values)), rounded(max(values)))
